"""What a quantized folder says about itself: where it came from, its sizes, costs and notes."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from arc_ao.calibration.few_tokens import ENOUGH
from arc_ao.cost import extra_cost
from arc_ao.integrations.huggingface import SUMMARY_FILE
from arc_ao.methods.tuning.record import TuningRecord
from arc_ao.summary import SUMMARY, model_bytes
from arc_ao.tensor import ARCTensor


def describe_model(
    label: str, path: Path, model: nn.Module, tensors: dict[str, ARCTensor]
) -> dict[str, Any]:
    """Name, costs, the summary of `quantize_` as the folder keeps it (else None), and notes."""
    summary = getattr(model, SUMMARY, None) or _stored_summary(path)
    weights = sum(tensor.shape[0] * tensor.in_features for tensor in tensors.values())
    extra = sum(tensor.shape[0] * tensor.extra_channels for tensor in tensors.values())
    cost = extra_cost(tensors.values())
    return {
        "label": label,
        "name": path.resolve().name,
        "path": str(path),
        "architecture": type(model).__name__,
        "bytes": model_bytes(model),
        "linears": len(tensors),
        "extra_channels": extra / max(1, weights),
        "extra_multiply_adds": cost.multiply_adds,
        "bits_per_weight": 8 * sum(t.nbytes_stored for t in tensors.values()) / max(1, weights),
        "summary": summary,
        "notes": ["The folder has no summary of its quantization."]
        if summary is None
        else notes(summary),
    }


def _stored_summary(path: Path) -> dict[str, Any] | None:
    file = path / SUMMARY_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def notes(summary: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know: source, measured candidates, rounding, tuning."""
    found = [summary["source"]] if summary.get("source") else []
    for trials in summary.get("trials", []):
        if trials:
            fields = ", ".join(f"{k} {v}" for k, v in trials[0].items() if k != "divergence")
            found.append(f"Measured {len(trials)} candidates, chose {fields}.")
    found += _rounding_notes(summary["layers"])
    if summary.get("tuning"):
        found.append(str(TuningRecord(**summary["tuning"])))
    return found


def _rounding_notes(layers: dict[str, dict[str, Any]]) -> list[str]:
    judged = {name: layer for name, layer in layers.items() if layer.get("damping") is not None}
    few = [n for n, layer in judged.items() if layer["tokens"] < ENOUGH * layer["shape"][1]]
    nearest = sum(layer["rounding"] == "nearest" for layer in judged.values())
    found = []
    if few:
        found.append(
            f"Fewer than {ENOUGH} calibration tokens for each input channel at {len(few)} of "
            f"{len(judged)} linears that GPTQ was to round, such as {few[0]}."
        )
    if nearest:
        found.append(
            f"{nearest} of {len(judged)} linears were rounded to nearest, which left less error "
            "than GPTQ on tokens kept aside."
        )
    return found


def fact_rows(models: list[dict[str, Any]], original: nn.Module | None) -> list[dict[str, Any]]:
    """Sizes and costs: key, name, the original's value and that of every model."""
    before = None if original is None else model_bytes(original)
    if before is None:
        before = next((m["summary"]["bytes_before"] for m in models if m["summary"]), None)
    rows = [
        ("bytes", "parameters and buffers", before, [m["bytes"] for m in models]),
        ("bits_per_weight", "bits per weight of quantized linears", None, None),
        ("extra_channels", "extra channels over in_features", None, None),
        ("extra_multiply_adds", "extra multiply-adds", None, None),
        ("linears", "linears quantized", None, None),
        ("skipped", "linears left alone", None, [_of(m, "skipped", len) for m in models]),
        ("seconds", "seconds to quantize", None, [_of(m, "seconds", _total) for m in models]),
    ]
    return [
        {
            "key": key,
            "name": name,
            "original": of_original,
            "models": [m[key] for m in models] if values is None else values,
        }
        for key, name, of_original, values in rows
    ]


def _of(model: dict[str, Any], field: str, function: Any) -> Any:
    """function(a field of the summary); None where there is none."""
    summary = model["summary"] or {}
    return function(summary[field]) if field in summary else None


def _total(seconds: dict[str, float]) -> float | None:
    return sum(seconds.values()) or None
