"""A report's dictionary without a model, and a reader of its page."""

import random
from html.parser import HTMLParser
from typing import Any

from arc_ao.report_page.channels import COLUMNS, channels_per_column
from arc_ao.report_page.data import block_of, budget_by_kind, kind_of

SMOLLM2_LAYERS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
VOID = {"meta", "img"}  # without an end, of those that a page has


class Page(HTMLParser):
    """Elements of a page, as (tag, attributes); fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.data: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.data.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> set[str]:
        """Of its elements."""
        return {attributes["id"] for _, attributes in self.elements if attributes.get("id")}

    def values(self) -> list[float]:
        """The numbers of all cells, unrounded."""
        cells = [attributes.get("data-value") for attributes in self.all("td")]
        return [float(cell) for cell in cells if cell]


def report_dictionary(blocks: int = 2, models: int = 1, seed: int = 0) -> dict[str, Any]:
    """What ReportData.to_dict gives, of a model with the layers of SmolLM2."""
    rng = random.Random(seed)
    layers = [
        _layer(f"model.layers.{block}.{kind}", shape, models, rng)
        for block in range(blocks)
        for kind, shape in SMOLLM2_LAYERS.items()
    ]
    labels = "AB"[:models]
    return {
        "title": "Quantization report: " + " and ".join(labels),
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"python": "3.11", "torch": "2.13"},
        "original": {
            "name": "o",
            "path": "models/o",
            "architecture": "Llama",
            "bytes": 269_000_000,
        },
        "models": [_model(label) for label in labels],
        "facts": _rows({"bytes": 2.69e8, "bits_per_weight": None, "seconds": None}, models, rng),
        "layers": layers,
        "layer_text": "calibration_mixed.txt",
        "layer_tokens": 2048,
        "measured": "the unquantized model",
        "layers_missing": "",
        "budget": budget_by_kind(layers, models),
        "quality": {
            "metrics": _rows({"perplexity": 17.0, "mean_kl": None}, models, rng),
            "missing": "",
            "tokens": 4096,
            "window": 512,
            "text": "heldout.txt",
        },
        "samples": [_sample(models)],
    }


def _model(label: str) -> dict[str, Any]:
    config = {"_type": "ARCConfig", "_version": 1, "_data": {"recipe": label, "budget": 0.06}}
    skipped = {"lm_head": "output head"}
    summary = {"configs": [config], "skipped": skipped, "seconds": {"calibrate": 12.5}}
    costs = {"bytes": 8e7, "linears": 14, "bits_per_weight": 4.6, "extra_channels": 0.06}
    facts = costs | {"extra_multiply_adds": 0.06, "summary": summary, "notes": ["A note."]}
    names = {"label": label, "name": label, "path": f"models/{label}", "architecture": "Llama"}
    return names | facts


def _rows(original: dict[str, float | None], models: int, rng: random.Random) -> list[dict]:
    return [
        {
            "key": key,
            "name": key,
            "original": value,
            "models": [rng.random() for _ in range(models)],
        }
        for key, value in original.items()
    ]


def _sample(models: int) -> dict[str, Any]:
    found = [{"text": "the sea is deep", "tokens": 4, "same_tokens": 3}] * models
    return {"prompt": "Say", "original": "the sea is blue", "models": found}


def _layer(name: str, shape: tuple[int, int], models: int, rng: random.Random) -> dict[str, Any]:
    out_features, in_features = shape
    width = channels_per_column(in_features)
    columns = -(-in_features // width)
    assert columns <= COLUMNS
    outliers = {rng.randrange(columns) for _ in range(4)}
    amax = [rng.lognormvariate(0, 0.5) * (20 if i in outliers else 1) for i in range(columns)]
    return {
        "name": name,
        "kind": kind_of(name),
        "block": block_of(name),
        "out_features": out_features,
        "in_features": in_features,
        "input": {
            "column_amax": [float(f"{value:.4g}") for value in amax],
            "median_amax": 1.0,
            "channels_per_column": width,
        },
        "models": [_layer_of(columns, rng) for _ in range(models)],
    }


def _layer_of(columns: int, rng: random.Random) -> dict[str, Any]:
    blocks = sorted(rng.sample(range(columns // 8), 3))
    act = [block * 8 + i for block in blocks for i in range(8)]
    plain = rng.uniform(17, 24)
    return {
        "sqnr_plain_db": plain,
        "sqnr_db": plain + rng.uniform(0, 6),
        "act_channels": 48,
        "weight_channels": 16,
        "rank": 0,
        "bits_per_weight": 4.5 + rng.random() / 2,
        "rotated": False,
        "act_columns": act,
        "weight_columns": act[:8],
    }
