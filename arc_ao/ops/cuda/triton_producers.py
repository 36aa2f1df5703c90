"""arc::quant_augment and the fused producers on NVIDIA GPUs from sm_80 on, by one Triton kernel.

The functions have the operators' own signatures; dispatch.py registers them. x above 2^31 elements
is addressed in 64 bits, and strided inputs are read where they lie.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_ao.ops.cuda import triton_inputs as inputs
from arc_ao.ops.cuda import triton_quantize as kernels
from arc_ao.ops.cuda.device import on_device
from arc_ao.ops.producers import check_gelu, check_norm, check_same
from arc_ao.ops.quant_augment import augmented_shapes, check_augmentation

MAX_TILE = 1024  # blocks: a row of 16384 channels stays in registers
LONG_TILE = 512  # blocks of a longer row read at a time
HEAVY_TILE = 256  # blocks, in a row or of one, where larger tiles would spill registers
FEW = 16  # extra blocks at a time
ELEMENTS_PER_WARP = 1024
# Two live polynomials an element, two inputs, or searched scales: more would spill.
HEAVY_ELEMENTS_PER_WARP = 512
SEARCH_ELEMENTS_PER_WARP = 256  # where scales are searched; with 512, sm_80 spilled


class Source(NamedTuple):
    """What a row is made from: x alone, or with another input, or with a norm's weight."""

    kind: int
    first: Tensor
    second: Tensor | None = None
    weight: Tensor | None = None
    eps: float = 0.0


def quant_augment(x: Tensor, *augmentation) -> tuple[Tensor, Tensor, Tensor]:
    """`quant_augment_eager` by the kernel."""
    return _run("quant_augment", Source(inputs.PLAIN.value, x), *augmentation)[:3]


def rms_norm_quant_augment(
    x: Tensor, weight: Tensor, eps: float, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_quant_augment_eager` by the kernel."""
    op = "rms_norm_quant_augment"
    check_norm(op, x, weight)
    source = Source(inputs.RMS_NORM.value, x, weight=weight, eps=eps)
    return _run(op, source, *augmentation)[:3]


def add_rms_norm_quant_augment(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *augmentation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_rms_norm_quant_augment_eager` by the kernel."""
    op = "add_rms_norm_quant_augment"
    check_same(op, "residual", x, residual)
    check_norm(op, x, weight)
    return _run(op, Source(inputs.ADD_RMS_NORM.value, x, residual, weight, eps), *augmentation)


def silu_mul_quant_augment(
    gate: Tensor, up: Tensor, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`silu_mul_quant_augment_eager` by the kernel."""
    op = "silu_mul_quant_augment"
    check_same(op, "up", gate, up)
    return _run(op, Source(inputs.SILU_MUL.value, gate, up), *augmentation)[:3]


def gelu_quant_augment(
    x: Tensor, up: Tensor | None, approximate: str, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`gelu_quant_augment_eager` by the kernel."""
    check_gelu(x, up, approximate)
    alone, gated = (
        (inputs.GELU, inputs.GELU_MUL)
        if approximate == "none"
        else (inputs.TANH_GELU, inputs.TANH_GELU_MUL)
    )
    kind = alone if up is None else gated
    return _run("gelu_quant_augment", Source(kind.value, x, up), *augmentation)[:3]


def _run(
    op: str,
    source: Source,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    outer_scale: Tensor | None,
    scale_mode: str,
    channel_order: Tensor | None = None,
    act_channels: Tensor | None = None,
    block_scale: str = "amax",
    plan: str = "",
    scale_layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """qdata, scale, outer and, for ADD_RMS_NORM, the sum in the shape of x. Scales are plain:
    dispatch.py leaves swizzled ones to others."""
    x = source.first
    check_augmentation(
        op, x, act_blocks, weight_blocks, outer_scale, scale_mode, channel_order, act_channels,
        block_scale, plan, scale_layout,
    )  # fmt: skip
    qdata, scale, outer = augmented_shapes(x, act_blocks, weight_blocks, scale_mode, act_channels)
    adds = source.kind == inputs.ADD_RMS_NORM.value
    total = torch.empty_like(x, memory_format=torch.contiguous_format) if adds else None
    if not x.numel():
        outer.zero_() if outer_scale is None else outer.copy_(outer_scale)
        return qdata, scale, outer, total
    ids = (act_blocks, act_channels, weight_blocks)
    launch = partial(_launch, source, ids, channel_order, block_scale)
    if scale_mode == "token":
        launch(kernels.ROW_AMAX, None, qdata, scale, outer, total)
    elif scale_mode == "static":
        launch(kernels.GIVEN_SCALE, outer_scale, qdata, scale, outer, total)
    else:
        rows = x.new_empty(qdata.shape[0], dtype=torch.float32)
        launch(kernels.ONLY_AMAX, None, qdata, scale, rows, total)
        launch(kernels.GIVEN_AMAX, rows.amax().reshape(1), qdata, scale, outer, total)
    return qdata, scale, outer, total


def tile_blocks(blocks: int, is_heavy: bool = False) -> tuple[int, bool]:
    """Blocks in a tile, and whether a row of `blocks` is one tile; `is_heavy`: see `_is_heavy`."""
    most, long_tile = (HEAVY_TILE, HEAVY_TILE) if is_heavy else (MAX_TILE, LONG_TILE)
    tile = max(2, triton.next_power_of_2(blocks))
    return (tile, True) if tile <= most else (long_tile, False)


def _is_heavy(kind: int, ordered: bool, block_scale: str) -> bool:
    """Whether a tile of MAX_TILE or LONG_TILE blocks spilled registers."""
    is_norm = kind in (inputs.RMS_NORM.value, inputs.ADD_RMS_NORM.value)
    return block_scale != "amax" or (ordered and is_norm)


def num_warps(tile: int, kind: int, block_scale: str = "amax") -> int:
    """Warps for a tile of blocks of a kind of input, whose scales are chosen so."""
    is_heavy = kind == inputs.ADD_RMS_NORM.value or kind >= inputs.GELU.value
    elements = HEAVY_ELEMENTS_PER_WARP if is_heavy else ELEMENTS_PER_WARP
    if block_scale == "mse":
        elements = SEARCH_ELEMENTS_PER_WARP
    return min(16, max(1, tile * 16 // elements))


def _launch(
    source: Source,
    ids: tuple[Tensor, Tensor | None, Tensor],
    order: Tensor | None,
    block_scale: str,
    origin: tl.constexpr,
    scale_in: Tensor | None,
    qdata: Tensor,
    scale: Tensor,
    outer: Tensor,
    total: Tensor | None,
) -> None:
    """One program per row. For an absent tensor the kernel gets x and does not read it."""
    first = _rows(source.first)
    second = first if source.second is None else _rows(source.second)
    weight = first if source.weight is None else source.weight
    act_blocks, act_channels, weight_blocks = ids
    gathered = 0 if act_channels is None else act_channels.shape[0] // 16
    blocks = math.ceil(first.shape[1] / 16)
    is_heavy = _is_heavy(source.kind, order is not None, block_scale)
    tile, whole = tile_blocks(blocks, is_heavy)
    with on_device(first):
        kernels.quantize_row[(first.shape[0],)](
            first, second, weight, _or(total, first), _or(order, first), _or(scale_in, first),
            act_blocks.contiguous(), _or(act_channels, act_blocks).contiguous(),
            weight_blocks.contiguous(), qdata, scale, outer,
            first.shape[1], blocks, act_blocks.shape[0], gathered, weight_blocks.shape[0],
            source.eps, *first.stride(), *second.stride(),
            1 if source.weight is None else weight.stride(0),
            kind=source.kind, origin=origin.value, ordered=order is not None,
            block_scale=block_scale, whole=whole, TILE=tile, FEW=FEW,
            num_warps=num_warps(tile, source.kind, block_scale), enable_fp_fusion=False,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[M, K], a view where the strides allow it."""
    return x.reshape(-1, x.shape[-1])


def _or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor.contiguous()
