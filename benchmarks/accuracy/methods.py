"""The rows of the accuracy record: name -> config, one line each.

A row is an ARCConfig, or MXFP4: rounding to nearest in that format alone, without kernels. Rows in
MAIN run with several seeds and on the lm-eval tasks. Block scales are amax where the paper has it;
rows named "ours" are this project's recipes, all others compete with them.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arc_ao import (
    ARCConfig,
    ARHQConfig,
    BudgetConfig,
    NVFP4Config,
    SERQConfig,
    SVDQuantConfig,
    quantize_,
)
from arc_ao.cost import PLAIN_BITS, extra_cost
from arc_ao.flow.targets import FilterFn, collect_targets
from arc_ao.formats import mxfp4
from arc_ao.formats.rotation import hadamard_signs, rotate
from arc_ao.recipes import RECIPES
from arc_ao.summary import arc_tensors

REFERENCE, PLAIN = "unquantized", "plain NVFP4"
PAPER, DEFAULT, OURS = "ARC (paper) 10 %", "arc_ao 6 %", "arc_ao 10 %"
BEST, TUNED = "arc_ao best 10 %", "arc_ao tuned 10 %"
WEIGHT_ONLY = "W4A16, mse scales"  # activations in 16 bits: another format, not a rival
REAL_OTHERS = ("RTN, mse scales", "four over six", "GPTQ")
UNQUANTIZED_BITS = 16.0  # of a target that a row leaves alone
MXFP4_BITS = 4.25


@dataclass(frozen=True)
class MXFP4:
    """Both operands rounded to MXFP4, after a block Hadamard rotation of `rotation` (0: none)."""

    rotation: int = 0


Row = ARCConfig | MXFP4


def quantized_rows() -> dict[str, ARCConfig]:
    """Configs that every accuracy benchmark compares, by the name of their row."""
    return {
        PLAIN: ARCConfig(budget=0.0, recipe="plain"),
        "plain, per tensor": ARCConfig(budget=0.0, recipe="plain", activation_scale="tensor"),
        "ARC (paper) 6 %": ARCConfig(budget=0.06, recipe="paper"),
        PAPER: ARCConfig(budget=0.10, recipe="paper"),
        DEFAULT: ARCConfig(budget=0.06),
        OURS: ARCConfig(budget=0.10),
        "arc_ao best 6 %": ARCConfig(budget=0.06, recipe="best"),
        BEST: ARCConfig(budget=0.10, recipe="best"),
    }


def is_ours(name: str) -> bool:
    """Whether a row is one of this project's recipes."""
    return name.startswith("arc_ao ")


def other_rows() -> dict[str, Row]:
    """The rest of the record: formats, roundings, the neighbouring methods, combinations."""
    balanced: dict[str, Any] = {"recipe": "balanced"}
    plain_mse = {"budget": 0.0} | balanced
    arc = {"exchange_rate": 0.0, "budget": 0.10} | balanced
    gptq: dict[str, Any] = {"rounding": "gptq"}
    return {
        "plain, static": NVFP4Config(activation_scale="static"),
        "RTN, mse scales": ARCConfig(**plain_mse),
        "four over six": NVFP4Config(
            weight_scale="four_over_six", activation_block_scale="four_over_six"
        ),
        "local Hessian": NVFP4Config(weight_scale="local_hessian"),
        "GPTQ": ARCConfig(**plain_mse, **gptq),
        "GPTQ, amax scales": NVFP4Config(**gptq),
        "ARC 10 % + GPTQ": ARCConfig(**arc, **gptq),
        "SERQ 10 %": SERQConfig(budget=0.10),
        "SERQ 10 %, not flattened": SERQConfig(budget=0.10, smooth="none"),
        "SERQ 10 % + GPTQ": SERQConfig(budget=0.10, **gptq),
        "SERQ 10 %, not flattened + GPTQ": SERQConfig(budget=0.10, smooth="none", **gptq),
        "SVDQuant r16": SVDQuantConfig(rank=16),
        "SVDQuant r32": SVDQuantConfig(rank=32),
        "SVDQuant r32 + GPTQ": SVDQuantConfig(rank=32, **gptq),
        "ARHQ r16": ARHQConfig(rank=16),
        "ARHQ r32": ARHQConfig(rank=32),
        "ARHQ r32, iterated": ARHQConfig(rank=32, branch_iterations=100),
        "ARHQ r32 + GPTQ": ARHQConfig(rank=32, **gptq),
        "smoothing": ARCConfig(smooth="search", **plain_mse),
        "smoothing + GPTQ": ARCConfig(smooth="search", **plain_mse, **gptq),
        "AWQ's scales": ARCConfig(smooth="awq", **plain_mse),
        "AWQ's scales + GPTQ": ARCConfig(smooth="awq", **plain_mse, **gptq),
        "ARC 10 %": ARCConfig(**arc),
        "smoothing + ARC 10 %": ARCConfig(smooth="search", **arc),
        "Hadamard 16": NVFP4Config(rotation=16),
        "Hadamard 128": NVFP4Config(rotation=128),
        "arc_ao mix 10 %": BudgetConfig(extra_bits=0.25, budget=0.10, **gptq),
        "MXFP4 (format only)": MXFP4(),
        "MXFP4, Hadamard 32 (format only)": MXFP4(rotation=32),
    }


def real_main_rows() -> dict[str, ARCConfig]:
    """Main rows of real models; "tuned" where this version of the package has that recipe."""
    rows = {name: row for name, row in quantized_rows().items() if name != "plain, per tensor"}
    return rows | ({TUNED: ARCConfig(budget=0.10, recipe="tuned")} if "tuned" in RECIPES else {})


def real_rows() -> dict[str, Row]:
    """Every row that real models have unless more are asked for, the main ones first."""
    other = other_rows()
    return {
        **real_main_rows(),
        WEIGHT_ONLY: ARCConfig(activation="bf16", budget=0.0, recipe="balanced"),
        **{name: other[name] for name in REAL_OTHERS},
        "best 10 %, Hessians of inputs": ARCConfig(budget=0.10, recipe="best", hessian="inputs"),
    }


def all_rows() -> dict[str, Row]:
    """Every row, the main ones first."""
    return quantized_rows() | other_rows()


def describe(row: Row) -> dict[str, Any]:
    """A row's settings that are not defaults: they tell one version of a row from another."""
    own = ((f.name, f.default, getattr(row, f.name)) for f in dataclasses.fields(row))
    return {"class": type(row).__name__, **{k: v for k, default, v in own if v != default}}


def is_seeded(row: Row) -> bool:
    """Whether another draw of calibration data can change the result."""
    return isinstance(row, ARCConfig) and row.needs_calibration


@torch.no_grad()
def quantize_row(
    model: nn.Module, row: Row, calibration: list[Any], filter_fn: FilterFn | None
) -> dict[str, Any]:
    """Quantize in place as a row says; ragged layers are padded.

    Returns:
        "cost" (see `cost`), "cpu_seconds" of quantizing by all threads together, and "applied",
        the resolved configs.
    """
    config = ARCConfig(budget=0.0, recipe="plain") if isinstance(row, MXFP4) else row
    config = dataclasses.replace(config, pad_in_features=True)
    targets = collect_targets(model, config, filter_fn).modules
    start = time.process_time()
    if isinstance(row, MXFP4):
        round_to_mxfp4(targets, row.rotation)
        rotations = sum(m.in_features * row.rotation for m in targets.values())
        weights = sum(m.weight.numel() for m in targets.values())
        found = {
            "extra_channels": 0.0,
            "extra_bits": MXFP4_BITS - PLAIN_BITS,
            "extra_multiply_adds": rotations / weights,
        }
        spent = time.process_time() - start
        return {"cost": found, "cpu_seconds": spent, "applied": [describe(row)]}
    summary = quantize_(
        model, config, calibration_data=calibration, filter_fn=filter_fn, progress=False
    )
    spent = time.process_time() - start
    found = cost(model, list(targets))
    return {"cost": found, "cpu_seconds": spent, "applied": summary.configs}


def cost(model: nn.Module, targets: list[str]) -> dict[str, float]:
    """What the linears named `targets` cost over plain NVFP4, together (arc_ao/cost.py).

    Targets that were left in 16 bits count as such: 11.5 extra bits per weight, no multiply-adds.

    Returns:
        extra_channels, extra_bits (per weight) and extra_multiply_adds (0.06 is 6 %).
    """
    tensors = arc_tensors(model)
    quantized = sum(t.shape[0] * t.in_features for t in tensors.values())
    alone = sum(model.get_submodule(n).weight.numel() for n in targets if n not in tensors)
    both = quantized + alone
    extra = extra_cost(tensors.values())
    bits = quantized * extra.bits_per_weight + alone * (UNQUANTIZED_BITS - PLAIN_BITS)
    channels = sum(t.shape[0] * t.extra_channels for t in tensors.values())
    return {
        "extra_channels": channels / both,
        "extra_bits": bits / both,
        "extra_multiply_adds": extra.multiply_adds_per_token / both,
    }


def round_to_mxfp4(linears: dict[str, nn.Linear], rotation: int) -> None:
    """Round the weights of these linears, and their inputs from now on.

    Raises:
        ValueError: in_features that are not a multiple of `rotation`, naming the layer.
    """
    for name, module in linears.items():
        if rotation and module.in_features % rotation:
            raise ValueError(
                f"{name}: expected in_features that are a multiple of the rotation, {rotation}, "
                f"found {module.in_features}; choose a smaller rotation"
            )
    rounded = _rounded(hadamard_signs(rotation) if rotation else None)
    for module in linears.values():
        module.weight = nn.Parameter(rounded(module.weight.detach()), requires_grad=False)
        module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))


def _rounded(signs: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x [..., K] to its MXFP4 values in the dtype of x, rotated before if `signs` is given."""

    def rounded(x: Tensor) -> Tensor:
        turned = x if signs is None else rotate(x, signs)
        return mxfp4.dequantize(*mxfp4.quantize(turned), x.dtype)[..., : x.shape[-1]]

    return rounded
