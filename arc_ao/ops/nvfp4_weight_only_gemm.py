"""arc::nvfp4_weight_only_gemm: activations as they are times an NVFP4 weight (W4A16).

    y[m, n] = (sum_k x_aug[m, k] B[n, k]) * b_outer + bias[n]
    x_aug   = [ x | x[:, weight_blocks] ]           B = [ Q(w) | Q(w - Q(w))[:, weight_blocks] ]

For users who want the memory and not the arithmetic: no error from activations, hence no residual
of them. Accumulation is fp32 in any order, scaled, biased, and rounded once.
"""

import math

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import (
    BYTES,
    FLOATING,
    FP32,
    check,
    check_ids,
    check_rows,
    check_tensor,
    described,
)
from arc_ao.ops.layout import from_panels
from arc_ao.ops.registry import define

CHUNK_BLOCKS = 1 << 16  # of the weight, decoded to fp32 at a time: 4 MiB
LAYOUTS = ("plain", "panels")
NAME = "nvfp4_weight_only_gemm"


def nvfp4_weight_only_gemm_eager(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    weight_blocks: Tensor,
    b_layout: str = "plain",
) -> Tensor:
    """Multiply x [*, K] with an NVFP4 weight.

    Args:
        x: bf16, fp16 or fp32; K is padded with zeros to a multiple of 16.
        b, b_scale: uint8 [N, K_b/2] codes and [N, K_b/16] e4m3 bits: ceil(K/16) base blocks, then
            the residuals of weight_blocks.
        b_outer: fp32 [1].
        bias: [N] or None.
        weight_blocks: int32 [Rw], base blocks whose residual is stored.
        b_layout: "plain", or "panels" (see ops/layout.py).

    Returns:
        [M, N] in the dtype of x, M the product of its leading dimensions.

    Raises:
        RuntimeError: operands that do not fit together, naming them.
    """
    check_weight_only(x, b, b_scale, b_outer, bias, weight_blocks, b_layout)
    if b_layout == "panels":
        b, b_scale = from_panels(b, b_scale)
    rows = x.detach().reshape(-1, x.shape[-1])  # as the other products, it has no gradient
    left = augmented(rows.float(), weight_blocks)
    y = left.new_empty((left.shape[0], b.shape[0]))
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the sums to bf16
        for some in nvfp4.row_chunks(b_scale, CHUNK_BLOCKS):
            torch.mm(left, nvfp4.decode(b[some], b_scale[some]).t(), out=y[:, some])
    y.mul_(b_outer)
    if bias is not None:
        y.add_(bias.float())
    return y.to(x.dtype)


def augmented(rows: Tensor, weight_blocks: Tensor) -> Tensor:
    """[x | x[:, weight_blocks]] of rows [M, K], padded to whole blocks: [M, K_b]."""
    blocks = nvfp4.to_blocks(rows)  # [M, K/16, 16]
    if weight_blocks.numel():
        blocks = torch.cat((blocks, blocks.index_select(1, weight_blocks)), dim=1)
    return blocks.flatten(1)


def check_weight_only(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    weight_blocks: Tensor,
    b_layout: str,
) -> None:
    """Refuse operands that do not fit together; every message names the operator."""
    check(b_layout in LAYOUTS, f"{NAME}: b_layout must be one of {LAYOUTS}, got {b_layout!r}")
    check_rows(NAME, "x", x)
    base = math.ceil(x.shape[-1] / nvfp4.BLOCK_SIZE)
    check_ids(NAME, "weight_blocks", weight_blocks, base, x.device)
    for name, tensor in (("b", b), ("b_scale", b_scale)):
        check_tensor(NAME, name, tensor, BYTES, (None, None), x.device)
    blocks, half = base + weight_blocks.shape[0], nvfp4.BLOCK_SIZE // 2
    operands = lambda: (
        f"{NAME}: x has {x.shape[-1]} channels and {weight_blocks.shape[0]} residual blocks, so b "
        f"must be [N, {blocks * half}] and b_scale [N, {blocks}], got {described(b)} and "
        f"{described(b_scale)}"
    )
    for found, size in ((b.shape[1], blocks * half), (b_scale.shape[1], blocks)):
        check(found == size, operands)
    check(b.shape[0] == b_scale.shape[0], operands)
    check_tensor(NAME, "b_outer", b_outer, FP32, (1,), x.device)
    if bias is not None:
        check_tensor(NAME, "bias", bias, FLOATING, (b.shape[0],), x.device)


def _fake(x, b, b_scale, b_outer, bias, weight_blocks, b_layout="plain"):
    check_weight_only(x, b, b_scale, b_outer, bias, weight_blocks, b_layout)
    return x.new_empty((math.prod(x.shape[:-1]), b.shape[0]))


nvfp4_weight_only_gemm = define(
    "nvfp4_weight_only_gemm(Tensor x, Tensor b, Tensor b_scale, Tensor b_outer, Tensor? bias, "
    'Tensor weight_blocks, str b_layout="plain") -> Tensor',
    nvfp4_weight_only_gemm_eager,
    _fake,
)
