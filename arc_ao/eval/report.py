"""Per-layer report: output SQNR of plain NVFP4 and of the quantized layer, blocks, bits.

    SQNR = 10 log10( sum y^2 / sum (y - y_q)^2 )   in dB

y is the unquantized layer's output in fp32 on the inputs that the unquantized model gives it, so
that each layer is judged alone.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from arc_ao.calibration.data import to_batches
from arc_ao.calibration.padding import watched, without_padding
from arc_ao.calibration.session import Member
from arc_ao.config import ARCConfig
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.methods.plan import analyse_group, make_plans
from arc_ao.methods.weights import quantize_weight
from arc_ao.summary import arc_tensors
from arc_ao.tensor import ARCTensor


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear."""

    name: str
    out_features: int
    in_features: int
    sqnr_plain_db: float
    sqnr_db: float
    act_channels: int
    weight_channels: int
    bits_per_weight: float


def layer_report(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    tokenizer: Any = None,
    progress: bool = True,
) -> list[LayerReport]:
    """Compare every quantized linear of `model` with its counterpart in `original`.

    Args:
        model: quantized by `quantize_`.
        original: the same model before, any floating-point dtype.
        batches: inputs for `original`, in any form that `quantize_` takes as calibration_data.
        tokenizer: Hugging Face tokenizer, for strings.

    Raises:
        ValueError: nothing in `model` is quantized, `original` lacks one of its layers or is
            quantized itself, or there is no input.
    """
    batches = to_batches(batches, tokenizer)
    tensors = arc_tensors(model)
    if not tensors:
        raise ValueError("report: expected a quantized model, found no ARCTensor in it")
    originals = dict(original.named_modules())
    for name, tensor in tensors.items():
        _check_counterpart(name, tensor, originals.get(name))
    meters = {name: _Meter(name, tensor) for name, tensor in tensors.items()}
    handles = [
        originals[name].register_forward_pre_hook(meter, with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        with evaluation_mode(original), watched(original):
            for batch in tqdm(batches, desc="report", disable=not progress, leave=False):
                run_model(original, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [meter.row() for meter in meters.values()]


def _check_counterpart(name: str, tensor: ARCTensor, module: nn.Module | None) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight.shape != tensor.shape:
        raise ValueError(
            f"report: the original model has no linear {name!r} of shape {tuple(tensor.shape)}"
        )
    if isinstance(weight, ARCTensor):
        raise ValueError(f"report: expected the unquantized original, found {name!r} quantized")


class _Meter:
    """Forward pre-hook that accumulates the output energies of one linear."""

    def __init__(self, name: str, quantized: ARCTensor) -> None:
        self.name, self.quantized = name, quantized
        self.plain: ARCTensor | None = None
        self.signal = self.noise = self.plain_noise = 0.0

    def __call__(self, module: nn.Linear, args: tuple[Tensor, ...], kwargs: dict) -> None:
        x = without_padding(args[0] if args else kwargs["input"]).float()
        reference = F.linear(x, module.weight.float())
        if self.plain is None:
            self.plain = quantize_plain(module)
        self.signal += _energy(reference)
        self.plain_noise += _energy(reference - F.linear(x, self.plain))
        self.noise += _energy(reference - F.linear(x, self.quantized))

    def row(self) -> LayerReport:
        """Figures so far."""
        return LayerReport(
            name=self.name,
            out_features=self.quantized.shape[0],
            in_features=self.quantized.in_features,
            sqnr_plain_db=_decibel(self.signal, self.plain_noise),
            sqnr_db=_decibel(self.signal, self.noise),
            act_channels=self.quantized.num_act_channels,
            weight_channels=self.quantized.num_weight_channels,
            bits_per_weight=self.quantized.bits_per_weight,
        )


def quantize_plain(module: nn.Linear) -> ARCTensor:
    """The weight of a linear in plain NVFP4: amax scales, no residuals."""
    config = ARCConfig(budget=0.0, recipe="plain", pad_in_features=True).resolve()
    member = Member("plain", module)
    (plan,) = make_plans([analyse_group([member], None, config)], config).values()
    return quantize_weight(module.weight.detach(), plan)


def _energy(x: Tensor) -> float:
    return x.double().square().sum().item()


def _decibel(signal: float, noise: float) -> float:
    return float("inf") if noise == 0 else (10 * torch.log10(torch.tensor(signal / noise))).item()


def format_report(rows: list[LayerReport]) -> Table:
    """rich table of a report."""
    table = Table(title="Output SQNR per layer (dB)")
    for column in ("layer", "N x K", "plain", "ARC", "gain", "act", "weight", "bits/weight"):
        name = column == "layer"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.out_features} x {row.in_features}",
            f"{row.sqnr_plain_db:.2f}",
            f"{row.sqnr_db:.2f}",
            f"{row.sqnr_db - row.sqnr_plain_db:+.2f}",
            str(row.act_channels),
            str(row.weight_channels),
            f"{row.bits_per_weight:.2f}",
        )
    return table


def save_report(rows: list[LayerReport], path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
