"""arc::nvfp4_gemm: the NVFP4 matrix product that carries main term and correction together.

    y[m, n] = (sum_k A_aug[m, k] W_aug[n, k]) * a_outer[m] * b_outer + bias[n]
    W_aug   = [ B[:, :base] | B[:, act_blocks] | B[:, base:] ]

B is what is stored: the base weight, then copies of single columns and the weight's residual
blocks. The blocks that meet activation residuals are read from the base a second time, so they
cost no bytes. Accumulation is fp32 in any order, scaled, biased, and rounded once.
"""

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import (
    BYTES,
    FLOATING,
    FP32,
    IDS,
    check,
    check_ids,
    check_tensor,
    described,
    names,
)
from arc_ao.ops.layout import LAYOUTS, from_panels, repeat_blocks, swizzled_shape, unswizzle
from arc_ao.ops.registry import define

NAME = "nvfp4_gemm"
CHUNK_BLOCKS = 1 << 16  # of the weight, decoded to fp32 at a time: 4 MiB


def nvfp4_gemm_eager(
    a: Tensor,
    a_scale: Tensor,
    a_outer: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    act_blocks: Tensor | None = None,
    base_blocks: int = 0,
    b_layout: str = "plain",
) -> Tensor:
    """Multiply augmented NVFP4 operands.

    Args:
        a, a_scale: uint8 [M, K_aug/2] codes and [M, K_aug/16] e4m3 bits from `quant_augment`;
            both swizzled where b_layout is.
        a_outer: fp32 [M] or [1].
        b, b_scale: uint8 [N, K_b/2] and [N, K_b/16], K_b = K_aug - 16 * len(act_blocks).
        b_outer: fp32 [1].
        bias: [N] or None.
        out_dtype: bf16, fp16 or fp32.
        act_blocks: int32 [Ra], base blocks of b that are read a second time.
        base_blocks: number of base blocks in b, after which the second reading is inserted.
        b_layout: "plain", "panels" or "swizzled" (see ops/layout.py). Swizzled b holds its repeated
            blocks; act_blocks and base_blocks are not read.

    Returns:
        [M, N] in out_dtype.

    Raises:
        RuntimeError: operands whose K_aug differ, naming both; whatever else does not fit them in
            dtype, shape, layout, device or value.
    """
    check_gemm(
        a, a_scale, a_outer, b, b_scale, b_outer, bias, out_dtype, act_blocks, base_blocks, b_layout
    )
    if b_layout == "swizzled":
        (a, a_scale), (b, b_scale) = unswizzle(a, a_scale), unswizzle(b, b_scale)
        act_blocks = None
    check_ids(NAME, "act_blocks", act_blocks, base_blocks, a.device)
    if b_layout == "panels":
        b, b_scale = from_panels(b, b_scale)
    left = nvfp4.decode(a, a_scale)  # [M, K_aug]
    y = left.new_empty((a.shape[0], b.shape[0]))
    with torch.autocast(a.device.type, enabled=False):  # autocast would round the sums to bf16
        for rows in nvfp4.row_chunks(b_scale, CHUNK_BLOCKS):
            right = decode_weight(b[rows], b_scale[rows], act_blocks, base_blocks)
            torch.mm(left, right.t(), out=y[:, rows])
    y.mul_(a_outer.unsqueeze(1)).mul_(b_outer)
    if bias is not None:
        y.add_(bias.float())
    return y.to(out_dtype)


def decode_weight(
    b: Tensor, b_scale: Tensor, act_blocks: Tensor | None, base_blocks: int
) -> Tensor:
    """Rows of W_aug, fp32 [n, K_aug], with the repeated blocks in their place."""
    if act_blocks is not None and act_blocks.numel():
        b, b_scale = repeat_blocks(b, b_scale, act_blocks, base_blocks)
    return nvfp4.decode(b, b_scale)


def _nvfp4_gemm_fake(
    a,
    a_scale,
    a_outer,
    b,
    b_scale,
    b_outer,
    bias,
    out_dtype,
    act_blocks=None,
    base_blocks=0,
    b_layout="plain",
):
    check_gemm(
        a, a_scale, a_outer, b, b_scale, b_outer, bias, out_dtype, act_blocks, base_blocks, b_layout
    )
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def check_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_outer: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    act_blocks: Tensor | None,
    base_blocks: int,
    b_layout: str,
) -> None:
    """Refuse arguments that do not fit together; every message names what it is about."""
    check(b_layout in LAYOUTS, f"{NAME}: b_layout must be one of {LAYOUTS}, got {b_layout!r}")
    for name, tensor in (("a", a), ("a_scale", a_scale), ("b", b), ("b_scale", b_scale)):
        check_tensor(NAME, name, tensor, BYTES, (None, None), a.device)
    if act_blocks is not None:
        check_tensor(NAME, "act_blocks", act_blocks, IDS, (None,), a.device)
    if b_layout == "swizzled":
        _check_swizzled(a, a_scale, b, b_scale)
    else:
        _check_operands(a, a_scale, b, b_scale, act_blocks, base_blocks)
    _check_epilogue(a_outer, b_outer, bias, a, b)
    check(
        out_dtype in FLOATING,
        lambda: f"{NAME}: out_dtype must be {names(FLOATING)}, got {out_dtype}",
    )


def _check_operands(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    act_blocks: Tensor | None,
    base_blocks: int,
) -> None:
    repeated = 0 if act_blocks is None else act_blocks.shape[0]
    channels = lambda: (
        f"{NAME}: a has K_aug = {2 * a.shape[1]}, b has {2 * b.shape[1]} plus {repeated} repeated "
        "blocks of 16; quantize x with the blocks of this weight"
    )
    check(a.shape[1] > 0, channels)
    check(a.shape[1] == b.shape[1] + repeated * nvfp4.BLOCK_SIZE // 2, channels)
    for name, codes, scale in (("a", a, a_scale), ("b", b, b_scale)):
        scales = lambda name=name, codes=codes, scale=scale: (
            f"{NAME}: {name} has {codes.shape[0]} rows of {2 * codes.shape[1]} codes and "
            f"{scale.shape[0]} rows of {scale.shape[1]} block scales, expected one scale per "
            f"{nvfp4.BLOCK_SIZE} codes"
        )
        check(codes.shape[0] == scale.shape[0], scales)
        check(codes.shape[1] == scale.shape[1] * nvfp4.BLOCK_SIZE // 2, scales)
    check(
        not repeated or 0 < base_blocks <= b_scale.shape[1],
        lambda: (
            f"{NAME}: base_blocks must be 1 to {b_scale.shape[1]}, the blocks of b, where "
            f"act_blocks repeats some of them, got {base_blocks}"
        ),
    )


def _check_swizzled(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    channels = lambda: (
        f"{NAME}: a has K_aug = {2 * a.shape[1]}, swizzled b has {2 * b.shape[1]}, expected equal "
        "multiples of 32; quantize x with the blocks of this weight and scale_layout 'swizzled'"
    )
    check(a.shape[1] > 0 and a.shape[1] % nvfp4.BLOCK_SIZE == 0, channels)
    check(a.shape[1] == b.shape[1], channels)
    for name, codes, scale in (("a", a, a_scale), ("b", b, b_scale)):
        expected = swizzled_shape(codes.shape[0], 2 * codes.shape[1] // nvfp4.BLOCK_SIZE)
        scales = lambda name=name, codes=codes, scale=scale, expected=expected: (
            f"{NAME}: {name} has {codes.shape[0]} rows of {2 * codes.shape[1]} codes and scales "
            f"{list(scale.shape)}, expected swizzled scales {list(expected)}"
        )
        for found, size in zip(scale.shape, expected, strict=True):
            check(found == size, scales)


def _check_epilogue(
    a_outer: Tensor, b_outer: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> None:
    check_tensor(NAME, "a_outer", a_outer, FP32, (None,), a.device)
    scales, rows = a_outer.shape[0], a.shape[0]
    check(
        (isinstance(scales, int) and scales == 1) or scales == rows,
        lambda: f"{NAME}: a_outer must have shape [1] or [{rows}], got {described(a_outer)}",
    )
    check_tensor(NAME, "b_outer", b_outer, FP32, (1,), a.device)
    if bias is not None:
        check_tensor(NAME, "bias", bias, FLOATING, (b.shape[0],), a.device)


nvfp4_gemm = define(
    "nvfp4_gemm(Tensor a, Tensor a_scale, Tensor a_outer, Tensor b, Tensor b_scale, "
    "Tensor b_outer, Tensor? bias, ScalarType out_dtype, Tensor? act_blocks=None, "
    'int base_blocks=0, str b_layout="plain") -> Tensor',
    nvfp4_gemm_eager,
    _nvfp4_gemm_fake,
)
