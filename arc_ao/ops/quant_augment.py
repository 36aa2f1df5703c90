"""arc::quant_augment: quantize activations to NVFP4 and append the columns that correct them.

    R     = x - Q(x)
    A_aug = [ Q(x) | Q(R)[:, act_blocks] | Q'(R[:, act_channels]) | Q(x)[:, weight_blocks] ]

Q quantizes blocks of 16 channels, in the order `channel_order` where one is given. The residual
blocks have their own block scales and share the outer scale. Q' gathers the residuals of single
channels into blocks of their own. See arXiv 2601.07475 (activation residuals) and 2603.08185
(weight residuals: the activation columns are duplicates).
"""

import math

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import FP32, check, check_ids, check_rows, check_tensor
from arc_ao.ops.layout import SCALE_LAYOUTS, swizzle, swizzled_shape
from arc_ao.ops.registry import define

# The arguments that the fused producers share, in this order.
AUGMENTATION = (
    "Tensor act_blocks, Tensor weight_blocks, Tensor? outer_scale, str scale_mode, "
    "Tensor? channel_order=None, Tensor? act_channels=None, "
    'str block_scale="amax", str plan="", str scale_layout="plain"'
)
SCALE_MODES = ("token", "tensor", "static")
CHUNK_ELEMENTS = 1 << 18  # rows quantized at a time: 1 MiB per fp32 temporary


def quant_augment_eager(
    x: Tensor,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    outer_scale: Tensor | None,
    scale_mode: str,
    channel_order: Tensor | None = None,
    act_channels: Tensor | None = None,
    block_scale: str = "amax",
    plan: str = "",
    scale_layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [*, K] and append its residual columns.

    Args:
        x: bf16, fp16 or fp32 [*, K]; K is padded with zeros to a multiple of 16.
        act_blocks: int32 [Ra], block ids whose residual is appended.
        weight_blocks: int32 [Rw], block ids that are repeated for the weight's residual.
        outer_scale: fp32 [1] for scale_mode "static", else None.
        scale_mode: "token" (one outer scale per row), "tensor" (one), "static" (the given one).
        channel_order: int32 [K], permutation applied to the channels first.
        act_channels: int32 [multiple of 16], channels (after the permutation) whose residuals are
            gathered into blocks of their own.
        block_scale: how each block's scale is chosen: "amax", "four_over_six" or "mse" (see
            `nvfp4.quantize_blocks`).
        plan: digest of all arguments but x, or "". It changes nothing here: graph passes, which do
            not see the values of tensors, take calls of equal digests for equal calls.
        scale_layout: "plain", or "swizzled" for weights in that layout (see ops/layout.py).

    Returns:
        qdata uint8 [M, K_aug/2], scale uint8 [M, K_aug/16] (e4m3 bits), outer fp32 [M] or [1],
        with M the product of the leading dimensions of x; qdata and scale padded where swizzled.

    Raises:
        RuntimeError: unknown scale_mode, block_scale or scale_layout; outer_scale missing or
            unexpected; what does not fit in dtype, shape, layout or device; ids that x lacks.
    """
    check_augmentation(
        "quant_augment", x, act_blocks, weight_blocks, outer_scale, scale_mode, channel_order,
        act_channels, block_scale, plan, scale_layout,
    )  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    inverse, outer = _outer_scales(rows, outer_scale, scale_mode)
    blocks = _augmented_blocks(x, act_blocks, weight_blocks, act_channels)
    qdata = x.new_empty((rows.shape[0], blocks * nvfp4.BLOCK_SIZE // 2), dtype=torch.uint8)
    scale = x.new_empty((rows.shape[0], blocks), dtype=torch.uint8)
    for some in nvfp4.row_chunks(rows, CHUNK_ELEMENTS):
        scaled = rows[some].float()
        if channel_order is not None:
            scaled = scaled.index_select(1, channel_order)
        scaled = nvfp4.to_blocks(scaled).flatten(1)  # padded first: -0 under a negative scale
        scaled = scaled * (inverse[some] if scale_mode == "token" else inverse)
        parts = _parts(scaled, act_blocks, weight_blocks, act_channels, block_scale)
        qdata[some] = nvfp4.pack(torch.cat([part.codes for part in parts], dim=1).flatten(1))
        scale[some] = nvfp4.encode_e4m3(torch.cat([part.scale for part in parts], dim=1))
    if scale_layout == "swizzled":
        qdata, scale = swizzle(qdata, scale)
    return qdata, scale, outer


def quant_augment_fake(
    op: str,
    x: Tensor,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    outer_scale: Tensor | None,
    scale_mode: str,
    channel_order: Tensor | None = None,
    act_channels: Tensor | None = None,
    block_scale: str = "amax",
    plan: str = "",
    scale_layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of operator `op`, which quantizes something of the shape of x."""
    check_augmentation(
        op, x, act_blocks, weight_blocks, outer_scale, scale_mode, channel_order, act_channels,
        block_scale, plan, scale_layout,
    )  # fmt: skip
    return augmented_shapes(x, act_blocks, weight_blocks, scale_mode, act_channels, scale_layout)


def augmented_shapes(
    x: Tensor,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    scale_mode: str,
    act_channels: Tensor | None,
    scale_layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty qdata, scale and outer scale for x [*, K]."""
    rows = math.prod(x.shape[:-1])
    blocks = _augmented_blocks(x, act_blocks, weight_blocks, act_channels)
    scale_shape = (rows, blocks)
    if scale_layout == "swizzled":
        blocks += blocks % 2
        scale_shape = swizzled_shape(rows, blocks)
    return (
        x.new_empty((rows, blocks * nvfp4.BLOCK_SIZE // 2), dtype=torch.uint8),
        x.new_empty(scale_shape, dtype=torch.uint8),
        x.new_empty((rows if scale_mode == "token" else 1,), dtype=torch.float32),
    )


def check_augmentation(
    op: str,
    x: Tensor,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    outer_scale: Tensor | None,
    scale_mode: str,
    channel_order: Tensor | None = None,
    act_channels: Tensor | None = None,
    block_scale: str = "amax",
    plan: str = "",
    scale_layout: str = "plain",
) -> None:
    """Refuse arguments that do not fit together; every message names the operator."""
    for name, choice, choices in (
        ("scale_mode", scale_mode, SCALE_MODES),
        ("block_scale", block_scale, nvfp4.BLOCK_SCALES),
        ("scale_layout", scale_layout, SCALE_LAYOUTS),
    ):
        check(choice in choices, f"{op}: {name} must be one of {choices}, got {choice!r}")
    check(
        (scale_mode == "static") == (outer_scale is not None),
        f"{op}: outer_scale belongs to scale_mode 'static' and only to it, got scale_mode "
        f"{scale_mode!r} {'without' if outer_scale is None else 'with'} outer_scale",
    )
    check_rows(op, "x", x)
    if outer_scale is not None:
        check_tensor(op, "outer_scale", outer_scale, FP32, (1,), x.device)
    channels, blocks = x.shape[-1], -(-x.shape[-1] // nvfp4.BLOCK_SIZE)
    check_ids(op, "act_blocks", act_blocks, blocks, x.device)
    check_ids(op, "weight_blocks", weight_blocks, blocks, x.device)
    check_ids(op, "channel_order", channel_order, channels, x.device, channels)
    check_ids(op, "act_channels", act_channels, blocks * nvfp4.BLOCK_SIZE, x.device)
    check(
        act_channels is None or act_channels.shape[0] % nvfp4.BLOCK_SIZE == 0,
        lambda: (
            f"{op}: act_channels must hold a multiple of {nvfp4.BLOCK_SIZE} channels, got "
            f"{act_channels.shape[0]}"
        ),
    )


def _augmented_blocks(
    x: Tensor, act_blocks: Tensor, weight_blocks: Tensor, act_channels: Tensor | None
) -> int:
    """K_aug / 16."""
    blocks = -(-x.shape[-1] // nvfp4.BLOCK_SIZE) + act_blocks.shape[0] + weight_blocks.shape[0]
    return blocks if act_channels is None else blocks + act_channels.shape[0] // nvfp4.BLOCK_SIZE


def _parts(
    scaled: Tensor,
    act_blocks: Tensor,
    weight_blocks: Tensor,
    act_channels: Tensor | None,
    block_scale: str,
) -> list[nvfp4.QuantizedBlocks]:
    """The quantized parts of A_aug, from rows [m, K] that the outer scale has been applied to."""
    blocks = nvfp4.to_blocks(scaled)  # [m, K/16, 16]
    base = nvfp4.quantize_blocks(blocks, method=block_scale)
    parts = [base]
    if act_blocks.numel() or act_channels is not None:
        residual = blocks - nvfp4.decode_blocks(base.codes, base.scale)
        for gathered in _gather(residual, act_blocks, act_channels):
            parts.append(nvfp4.quantize_blocks(gathered, method=block_scale))
    repeated = (part.index_select(1, weight_blocks) for part in base)
    return [*parts, nvfp4.QuantizedBlocks(*repeated)]


def _outer_scales(
    rows: Tensor, outer_scale: Tensor | None, scale_mode: str
) -> tuple[Tensor, Tensor]:
    """Quantize-side multiplier (broadcastable to rows) and outer scale [M] or [1]."""
    if outer_scale is not None:
        inverse = nvfp4.divide(1.0, outer_scale)
        return torch.where(
            outer_scale == 0, torch.zeros_like(inverse), inverse
        ), outer_scale.clone()
    if scale_mode == "token":
        amax = rows.abs().amax(1)
    else:
        amax = rows.abs().amax().reshape(1) if rows.numel() else rows.new_zeros(1)
    amax = amax.float()
    inverse = nvfp4.inverse_outer_scale(amax)
    return inverse.unsqueeze(1), nvfp4.outer_scale(amax)


def _gather(residual: Tensor, act_blocks: Tensor, act_channels: Tensor | None) -> list[Tensor]:
    """Residual blocks [M, Ra, 16] and gathered residual channels [M, channels/16, 16]."""
    gathered = [residual.index_select(1, act_blocks)]
    if act_channels is not None:
        gathered.append(nvfp4.to_blocks(residual.flatten(1).index_select(1, act_channels)))
    return gathered


quant_augment = define(
    f"quant_augment(Tensor x, {AUGMENTATION}) -> (Tensor, Tensor, Tensor)",
    quant_augment_eager,
    lambda x, *augmentation: quant_augment_fake("quant_augment", x, *augmentation),
)
