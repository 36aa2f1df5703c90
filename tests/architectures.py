"""What becomes of every architecture: quantize a tiny random model, run, save, load, run again.

`pytest tests/test_architectures.py -s` prints the table; `python tests/architectures.py` prints the
list of supported models that it stands for.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architecture_case import Architecture, Batch
from architecture_cases_decoders import DECODERS
from architecture_cases_encoders import ENCODER_DECODERS, ENCODERS
from architecture_cases_experts import EXPERT_DECODERS, STATE_SPACE
from architecture_cases_media import AUDIO, VISION
from architecture_cases_pairs import VISION_LANGUAGE
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import arc_ao

FAMILIES: dict[str, list[Architecture]] = {
    "decoders": DECODERS,
    "mixtures of experts": EXPERT_DECODERS,
    "state-space, hybrid": STATE_SPACE,
    "encoders": ENCODERS,
    "encoder-decoders": ENCODER_DECODERS,
    "vision": VISION,
    "audio": AUDIO,
    "vision-language": VISION_LANGUAGE,
}
CACHES = ("past_key_values", "cache_params", "state")
BATCHES = 2


@dataclass
class Outcome:
    """What one recipe made of one architecture.

    Attributes:
        quantized: number of linears.
        left: what stayed in 16 bits, "*" for numbers.
        unnamed: linears that are neither quantized nor listed.
        refused: the message, "" where the model was quantized.
        warned: messages of arc_ao.
        error: of the outputs, relative to the unquantized model's.
        reloaded: whether the saved model, loaded, gives the same outputs, bit for bit.
    """

    quantized: int = 0
    left: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()
    refused: str = ""
    warned: tuple[str, ...] = ()
    error: float = float("nan")
    reloaded: bool = False

    def __str__(self) -> str:
        if self.refused:
            return f"refused: {self.refused}"
        same = "same outputs when loaded" if self.reloaded else "OTHER OUTPUTS when loaded"
        left = f"; in 16 bits: {', '.join(self.left)}" if self.left else ""
        return f"{self.quantized:2d} linears, error {self.error:.3f}, {same}{left}"


def run(architecture: Architecture, recipe: str, folder: Path) -> Outcome:
    """Quantize, run, save below `folder`, load, run again."""
    architecture.build().save_pretrained(folder / "original")
    model = load(architecture, folder / "original")
    batch = next(architecture.batches(1, seed=1))
    expected = outputs(model, batch)
    linears = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            summary = quantize(architecture, model, recipe)
        except ValueError as error:
            return Outcome(refused=str(error))
    found = outputs(model, batch)
    arc_ao.save_pretrained(model, folder / "quantized")
    again = outputs(load(architecture, folder / "quantized"), batch)
    return Outcome(
        quantized=len(summary.layers),
        left=patterns(summary.skipped),
        unnamed=patterns(linears - summary.layers.keys() - summary.skipped.keys()),
        warned=tuple(str(w.message) for w in caught if "arc_ao" in w.filename),
        error=relative_error(expected, found),
        reloaded=all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
    )


def quantize(
    architecture: Architecture, model: PreTrainedModel, recipe: str
) -> arc_ao.QuantizationSummary:
    """By two small batches."""
    config, data = arc_ao.ARCConfig(recipe=recipe), architecture.batches(BATCHES)
    return arc_ao.quantize_(model, config, calibration_data=data, progress=False)


def load(architecture: Architecture, folder: Path) -> PreTrainedModel:
    """A fresh model from a folder that holds all of its weights and no others."""
    model_class = getattr(transformers, architecture.model)
    model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors that the model returns, but for its caches."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # masked autoencoders draw what they hide
        found = dict(model(**batch))
    return list(_tensors([value for key, value in found.items() if key not in CACHES]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def relative_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest |found - expected| / |expected| of the floating-point tensors."""
    pairs = [
        (a.float(), b.float())
        for a, b in zip(expected, found, strict=True)
        if a.is_floating_point()
    ]
    return max(float((b - a).norm() / a.norm()) for a, b in pairs)


def patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Names with "*" for numbers, each once, sorted."""
    return tuple(sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names}))


def report(outcomes: list[tuple[Architecture, str, Outcome]]) -> str:
    """One line for every architecture and recipe, and one for every family."""
    lines = [f"{a.model:36s} {recipe:9s} {outcome}" for a, recipe, outcome in outcomes]
    for family, rows in FAMILIES.items():
        done = [outcome for a, _, outcome in outcomes if a in rows]
        quantized = [outcome for outcome in done if not outcome.refused]
        same = sum(outcome.reloaded for outcome in quantized)
        lines.append(
            f"{family}: {len(quantized)} of {len(done)} runs quantized, {same} with the same "
            f"outputs when loaded, {len(done) - len(quantized)} refused as expected"
        )
    return "\n".join(lines)


def supported() -> str:
    """Markdown: the architectures of every family that are quantized, and those that are not."""
    table = [row for rows in FAMILIES.values() for row in rows]
    lines = [
        f"{sum(not row.refused for row in table)} model classes of transformers, as tiny random",
        "models: quantized by the default recipe and by `balanced`, run, saved, and loaded with",
        "the same outputs, bit for bit. Output heads and routers stay in 16 bits, and so do fused",
        "experts and weights that others than `nn.Linear` read; `tests/architecture_cases_*.py`",
        "list them all. Printed by `python tests/architectures.py`, checked by",
        "`pytest tests/test_architectures.py`.",
        "",
        "| family | quantized | refused, saying why |",
        "|---|---|---|",
    ]
    for family, rows in FAMILIES.items():
        good = dict.fromkeys(short_name(row) for row in rows if not row.refused)
        bad = dict.fromkeys(short_name(row) for row in rows if row.refused)
        lines.append(f"| {family} | {', '.join(good)} | {', '.join(bad) or '-'} |")
    return "\n".join(lines) + "\n"


def short_name(architecture: Architecture) -> str:
    """The class without what every class of its kind ends in, and what tells the row apart."""
    name = re.sub(r"(For[A-Z]\w+|LMHeadModel|MTModel|TextModel|Model)$", "", architecture.model)
    return f"{name} ({architecture.note})" if architecture.note else name


if __name__ == "__main__":
    print(supported(), end="")
