"""Everything that a report page shows, as one dictionary of plain values; page.py draws it.

    data = ReportData(tokenizer, layer_text, quality_text, original=original)
    data.add("first", model)
    data.add("second", other)       # of the same original
    data.to_dict()

Keys of the dictionary:

    title, date, versions       date in ISO form, UTC
    original                    name, path and bytes of the unquantized model, or None
    models                      label, name, path, architecture, summary (of `quantize_`, or None),
                                notes
    facts                       key, name, original, models: sizes and costs
    layers                      name, kind, block, in_features, out_features, input (column_amax,
                                median_amax, channels_per_column; None if not measured), models (a
                                dictionary for each, None where the layer is not quantized in it)
    layer_text, layer_tokens    what the layers were measured on; `measured`: by which model
    layers_missing              what could not be measured, and what to give for it
    budget                      by kind of layer: linears, and residual channels of each model
    quality, samples            see quality.py

Values are None where they do not apply or are not known. `models` of a row is as long as `models`.
"""

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from arc_ao.calibration.data import num_tokens, text_batches
from arc_ao.calibration.padding import watched
from arc_ao.env import env_report
from arc_ao.eval.report import LayerReport, layer_report
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.report_page.channels import (
    ChannelAmax,
    channel_amax,
    channels_per_column,
    column_amax,
    residual_columns,
)
from arc_ao.report_page.facts import describe_model, fact_rows
from arc_ao.report_page.quality import GIVE_ORIGINAL, Quality, Samples
from arc_ao.summary import arc_tensors, model_bytes
from arc_ao.tensor import ARCTensor
from arc_ao.text_models import calibration_window, require_text_input


@dataclass(frozen=True)
class Text:
    """What to measure on: its name, and how many of its first tokens."""

    name: str
    text: str
    max_tokens: int


class ReportData:
    """Measures quantized models of one original, one after the other; none of them is kept.

    Args:
        tokenizer: Hugging Face tokenizer of the models.
        layer_text: whose tokens reach the layers.
        quality_text: that the models are scored on.
        original: the unquantized model in any floating-point dtype, or None: then the layers'
            inputs are those of the first quantized model, and nothing is compared with an original.
        original_path: where it came from.
    """

    def __init__(
        self,
        tokenizer: Any,
        layer_text: Text,
        quality_text: Text,
        *,
        original: nn.Module | None = None,
        original_path: str | Path = "",
        progress: bool = True,
    ) -> None:
        self.tokenizer, self.layer_text, self.quality_text = tokenizer, layer_text, quality_text
        self.original, self.progress = original, progress
        self.original_path = Path(original_path)
        self.models: list[dict[str, Any]] = []
        self.layers: dict[str, dict[str, Any]] = {}
        self.layer_tokens = 0
        options = {"max_tokens": quality_text.max_tokens, "progress": progress}
        self.quality = Quality(original, tokenizer, quality_text.text, **options)
        self.samples = Samples(original, tokenizer)

    def add(self, path: str | Path, model: nn.Module) -> list[LayerReport]:
        """Measure a quantized model from the folder `path`.

        Returns:
            Its layers against those of the original; none without an original.

        Raises:
            ValueError: nothing in it is quantized, it is not of the same original as what was added
                before, or a text says nothing to it.
        """
        tensors = arc_tensors(model)
        if not tensors:
            raise ValueError(f"report: {path}: expected a quantized model, found no ARCTensor")
        self._add_names(path, tensors)
        rows, meters = self._measure_layers(model)
        reports = {row.name: row for row in rows}
        for name, layer in self.layers.items():
            tensor = tensors.get(name)
            row = None if tensor is None else _layer_of(tensor, reports.get(name))
            layer["models"].append(row)
            if name in meters:
                layer["input"] = _input(meters[name])
        self.quality.add(model)
        self.samples.add(model)
        label = chr(ord("A") + len(self.models))
        self.models.append(describe_model(label, Path(path), model, tensors))
        return rows

    def _add_names(self, path: str | Path, tensors: dict[str, ARCTensor]) -> None:
        for name, tensor in tensors.items():
            out_features, in_features = tensor.shape
            shape = {"out_features": out_features, "in_features": in_features}
            known = self.layers.get(name)
            if known is None:
                others = [None] * len(self.models)
                new = {"name": name, "kind": kind_of(name), "block": block_of(name), **shape}
                self.layers[name] = {**new, "input": None, "models": others}
            elif any(known[key] != value for key, value in shape.items()):
                raise ValueError(
                    f"report: {path}: {name}: expected shape {known['out_features']} x "
                    f"{known['in_features']} as in {self.models[0]['path']}, found {out_features} "
                    f"x {in_features}; compare two quantized folders of one model"
                )

    def _measure_layers(self, model: nn.Module) -> tuple[list[LayerReport], dict[str, ChannelAmax]]:
        """Rows of the layer report, and amax of the inputs that are not known yet."""
        measured = model if self.original is None else self.original
        options = {"window": calibration_window(measured), "max_tokens": self.layer_text.max_tokens}
        batches = text_batches(self.tokenizer, self.layer_text.text, **options)
        require_text_input(measured, batches)
        self.layer_tokens = sum(map(num_tokens, batches))
        rows = []
        with channel_amax(self._unmeasured(measured)) as meters:
            if self.original is not None:
                rows = layer_report(model, self.original, batches, progress=self.progress)
            elif meters:
                _run(model, batches)
        return rows, meters

    def _unmeasured(self, measured: nn.Module) -> dict[str, nn.Linear]:
        if self.original is None and self.models:
            return {}  # inputs of one model alone
        modules = dict(measured.named_modules())
        names = [name for name, layer in self.layers.items() if layer["input"] is None]
        return {name: modules[name] for name in names if isinstance(modules.get(name), nn.Linear)}

    def to_dict(self) -> dict[str, Any]:
        """The dictionary, which `json.dumps` accepts; see the module's docstring."""
        layers = list(self.layers.values())
        names = " and ".join(model["name"] for model in self.models)
        quality = self.quality.to_dict()
        return {
            "title": f"Quantization report: {names}",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": env_report()["versions"],
            "original": self._original(),
            "models": self.models,
            "facts": fact_rows(self.models, self.original),
            "layers": layers,
            "layer_tokens": self.layer_tokens,
            "layer_text": self.layer_text.name,
            "measured": self._measured(),
            "layers_missing": "" if self.original is not None else self._missing(),
            "budget": budget_by_kind(layers, len(self.models)),
            "quality": quality | {"text": self.quality_text.name},
            "samples": self.samples.to_list(),
        }

    def _measured(self) -> str:
        if self.original is not None:
            return "the unquantized model"
        return "the quantized model" + (" A" if len(self.models) > 1 else "")

    def _missing(self) -> str:
        return f"Not measured: SQNR of the layers' outputs; {GIVE_ORIGINAL}."

    def _original(self) -> dict[str, Any] | None:
        if self.original is None:
            return None
        path = {"name": self.original_path.name, "path": str(self.original_path)}
        return path | {
            "architecture": type(self.original).__name__,
            "bytes": model_bytes(self.original),
        }


def _run(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let the hooks of a model see its inputs."""
    with evaluation_mode(model), watched(model):
        for batch in batches:
            run_model(model, batch)


def _layer_of(tensor: ARCTensor, report: LayerReport | None) -> dict[str, Any]:
    """What one model makes of a layer."""
    measured = {} if report is None else asdict(report)
    return {
        "sqnr_plain_db": measured.get("sqnr_plain_db"),
        "sqnr_db": measured.get("sqnr_db"),
        "act_channels": tensor.num_act_channels,
        "weight_channels": tensor.num_weight_channels,
        "rank": tensor.rank,
        "bits_per_weight": tensor.bits_per_weight,
        "rotated": tensor.rotation is not None,
        **residual_columns(tensor),
    }


def _input(meter: ChannelAmax) -> dict[str, Any]:
    used = meter.amax[meter.amax > 0]
    return {
        "column_amax": column_amax(meter.amax),
        "median_amax": used.median().item() if len(used) else 0.0,
        "channels_per_column": channels_per_column(len(meter.amax)),
    }


def kind_of(name: str) -> str:
    """What layers of different blocks share: their names from the block's number on, further
    numbers as "*"; of layers outside of blocks the last part."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return parts[-1] if first is None else ".".join([*parts[:-1], "*"])
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def block_of(name: str) -> str:
    """The numbers in a layer's name, the block's first."""
    return ".".join(part for part in name.split(".") if part.isdigit())


def budget_by_kind(layers: list[dict[str, Any]], models: int) -> list[dict[str, Any]]:
    """Residual channels of every kind of layer, summed over its layers.

    `extra` is their columns over in_features, weighted by out_features; `share` that of the kind in
    all multiply-adds of residual channels.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["kind"], []).append(layer)
    totals = [sum(_extra_adds(layer, i) for layer in layers) for i in range(models)]
    return [
        {
            "kind": kind,
            "linears": len(found),
            "models": [_spent(found, i, totals[i]) for i in range(models)],
        }
        for kind, found in kinds.items()
    ]


def _spent(layers: list[dict[str, Any]], i: int, total: int) -> dict[str, Any]:
    rows = [layer["models"][i] for layer in layers if layer["models"][i] is not None]
    adds = sum(_extra_adds(layer, i) for layer in layers)
    weights = sum(
        layer["out_features"] * layer["in_features"] for layer in layers if layer["models"][i]
    )
    return {
        "act_channels": sum(row["act_channels"] for row in rows),
        "weight_channels": sum(row["weight_channels"] for row in rows),
        "extra": adds / weights if weights else 0.0,
        "share": adds / total if total else 0.0,
    }


def _extra_adds(layer: dict[str, Any], i: int) -> int:
    """Multiply-adds per token of a layer's residual channels."""
    row = layer["models"][i]
    if row is None:
        return 0
    return layer["out_features"] * (row["act_channels"] + row["weight_channels"])


def save_data(data: dict[str, Any], path: Path) -> None:
    """Write the dictionary as JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n")
