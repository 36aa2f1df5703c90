"""Linears that cpu/gemm.py compares, and the check of those that are ours.

bf16, fp32   F.linear
int8         torchao: int8 weight, int8 activation quantized per token, torch.compile
nvfp4        arc_ao without residual channels: arc::quant_augment, then arc::nvfp4_gemm
arc          arc_ao with RESIDUAL_SHARE extra channels, half of each kind
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from torchao.quantization import quantize_ as torchao_quantize_

from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.formats.nvfp4 import BLOCK_SIZE, decode
from arc_ao.ops import native, nvfp4_gemm, quant_augment
from arc_ao.tensor import arc_linear

PROVIDERS = ("bf16", "fp32", "int8", "nvfp4", "arc")
RESIDUAL_SHARE = 0.06  # of in_features
CHECKED_ELEMENTS = 1 << 14  # of y, in sampled columns
CHUNK_COLUMNS = 1024  # decoded to fp64 at a time
ROUNDED_EXACTLY = 0.999  # share of elements; the rest may differ by MAX_ULP
ROW_SUM_TOLERANCE = 1e-6
INT8_WARNING = "Int8Tensor does not implement _stable_hash_for_caching"


@dataclass(frozen=True)
class Provider:
    """One linear: copies of its weight and how to multiply with one."""

    weights: list[Any]
    weight_bytes: int  # of one copy, as stored
    channels: int  # K, with residual channels
    dtype: torch.dtype  # of x
    multiply: Callable[[Tensor, Any], Tensor]

    def runner(self, x: Tensor, *, warm: bool) -> Callable[[], Tensor]:
        """x times the first copy, or times all copies in turn."""
        x = x.to(self.dtype)
        weights = self.weights[:1] if warm else self.weights
        calls = 0

        def run() -> Tensor:
            nonlocal calls
            calls += 1
            return self.multiply(x, weights[calls % len(weights)])

        return run


def build(name: str, weight: Tensor, footprint: int) -> Provider:
    """A provider with as many copies of weight [N, K] as fill `footprint` bytes."""
    if name in ("bf16", "fp32"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        dense = weight.to(dtype)
        return _provider(dense, dense.nbytes, 0, dtype, F.linear, footprint)
    if name == "int8":
        stored = int8_weight(weight)
        size = stored.qdata.nbytes + stored.scale.nbytes
        return _provider(stored, size, 0, torch.bfloat16, compiled_linear(), footprint)
    stored = nvfp4_weight(weight, RESIDUAL_SHARE if name == "arc" else 0.0)
    size = stored.qdata.nbytes + stored.scale.nbytes
    extra = stored.extra_channels
    return _provider(stored, size, extra, torch.bfloat16, arc_linear, footprint)


def _provider(
    weight: Tensor,
    weight_bytes: int,
    extra: int,
    dtype: torch.dtype,
    multiply: Callable,
    footprint: int,
) -> Provider:
    copies = [weight, *(weight.clone() for _ in range(footprint // weight_bytes))]
    return Provider(copies, weight_bytes, weight.shape[1] + extra, dtype, multiply)


def int8_weight(weight: Tensor) -> Tensor:
    linear = _linear_with(weight)
    torchao_quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    return linear[0].weight.detach()


def compiled_linear() -> Callable[[Tensor, Any], Tensor]:
    """F.linear, compiled anew for every shape of x."""
    warnings.filterwarnings("ignore", message=INT8_WARNING)
    return torch.compile(lambda x, weight: F.linear(x, weight), dynamic=False)


def nvfp4_weight(weight: Tensor, share: float) -> ARCTensor:
    """Weight in panels with `share` of its channels again as residuals, half of each kind."""
    residual = round(share * weight.shape[1] / 2 / BLOCK_SIZE) * BLOCK_SIZE
    counts = {"num_act_channels": residual, "num_weight_channels": residual}
    linear = _linear_with(weight)
    x = torch.randn(16, weight.shape[1]).to(weight.dtype)
    config = ARCConfig(recipe="plain", **counts)
    quantize_(linear, config, calibration_data=[x], progress=False)
    return linear[0].weight.detach().to_layout("panels")


def _linear_with(weight: Tensor) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(linear)


def check(weight: ARCTensor, x: Tensor) -> dict[str, float]:
    """Compare x times weight with the float64 product of the decoded operands, in some columns.

    Raises:
        AssertionError: an element further than one bf16 ulp plus ROW_SUM_TOLERANCE of its absolute
            sum from the exact value, or too few that are the exact value rounded.
    """
    augmented = quant_augment(
        x, weight.act_blocks, weight.weight_blocks, None, weight.activation_scale
    )
    y = nvfp4_gemm(
        *augmented, weight.qdata, weight.scale, weight.outer_scale, None, torch.bfloat16,
        act_blocks=weight.act_blocks, base_blocks=weight.base_blocks,
        b_layout=weight.weight_layout,
    )  # fmt: skip
    a, a_scale, a_outer = augmented
    left = decode(a, a_scale).double() * a_outer.double().unsqueeze(1)
    count = min(weight.shape[0], max(256, CHECKED_ELEMENTS // x.shape[0]))
    columns = torch.randperm(weight.shape[0])[:count]
    plain = weight.to_layout("plain")
    same, worst = 0, 0.0
    for some in columns.split(CHUNK_COLUMNS):
        right = _augmented_rows(plain, some)
        exact, absolute = left @ right.t(), left.abs() @ right.abs().t()
        got, rounded = y[:, some].double(), exact.bfloat16().double()
        same += (got == rounded).sum().item()
        ulp = torch.exp2(exact.abs().clamp(min=2.0**-126).log2().floor() - 7)
        worst = max(
            worst, ((got - exact).abs() / (ulp + ROW_SUM_TOLERANCE * absolute)).max().item()
        )
    share = same / (x.shape[0] * count)
    assert worst <= 1.0, f"M={x.shape[0]}: an element is {worst:.2f} times the bound off"
    assert share >= ROUNDED_EXACTLY, f"M={x.shape[0]}: only {share:.4%} are rounded exactly"
    return {"columns": count, "rounded_exactly": share, "worst_of_bound": worst}


def _augmented_rows(weight: ARCTensor, rows: Tensor) -> Tensor:
    """Rows of the augmented weight in plain layout: fp64 [n, K_aug]."""
    values = decode(weight.qdata[rows], weight.scale[rows]).double() * weight.outer_scale.double()
    blocks = values.unflatten(1, (-1, BLOCK_SIZE))
    base = blocks[:, : weight.base_blocks]
    again = base.index_select(1, weight.act_blocks)
    return torch.cat((base, again, blocks[:, weight.base_blocks :]), dim=1).flatten(1)


def ceiling_of(name: str, available: list[str]) -> str:
    """Name of the arithmetic ceiling that a provider is compared with."""
    of_level = {"amx": ("amx_bf16",), "avx512": ("avx512_vnni",)}.get(native.cpu_level(), ())
    wanted = {
        "bf16": ("amx_bf16", "avx512_bf16"),
        "fp32": (),
        "int8": ("amx_int8", "avx512_vnni"),
    }.get(name, of_level)
    return next((ceiling for ceiling in wanted if ceiling in available), "fp32_fma")
