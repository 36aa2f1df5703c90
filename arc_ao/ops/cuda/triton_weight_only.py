"""arc::nvfp4_weight_only_gemm (W4A16) on NVIDIA GPUs from sm_80 on.

The kernels of triton_gemm.py with x as it is on the left: its channels are read in the order in
which the weight's are decoded. fp32 inputs always take the route over cuBLAS (in the precision that
torch.backends sets for it): as tiles, which tensor cores do not take, they spilled thousands of
registers.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from arc_ao.ops.cuda import triton_products as products
from arc_ao.ops.cuda.device import on_device
from arc_ao.ops.cuda.triton_gemm import store_product
from arc_ao.ops.cuda.triton_halves import channel_at, decode_tile, word_scale
from arc_ao.ops.cuda.tuning import Rule, choose
from arc_ao.ops.layout import from_panels
from arc_ao.ops.nvfp4_weight_only_gemm import augmented, check_weight_only

FACTOR = tl.constexpr(2.0**7)  # the weight is decoded times 2^-7


@triton.jit
def multiply(
    x, b, b_scale, b_outer, bias, weight_blocks, y,
    rows, columns, channels, blocks, base_blocks, split_blocks, x_row_stride, x_stride,
    partial: tl.constexpr, has_bias: tl.constexpr, assembly: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of the sum over `split_blocks` blocks of K, as `multiply_tiles` does.

    Args:
        x: [rows, channels] by strides; b: int64 [columns, blocks], b_scale: uint8, alike.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0)
    m = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // row_tiles % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tile // row_tiles // column_tiles
    x_row = x + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * x_row_stride
    b_row = tl.minimum(n, columns - 1).to(tl.int64)[:, None] * blocks
    place = tl.arange(0, 16 * BLOCK_K)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = tl.minimum((split + 1) * split_blocks, blocks)
    for start in range(split * split_blocks, end, BLOCK_K):
        of = start + place // 16
        repeats = (of >= base_blocks) & (of < end)
        source = tl.load(weight_blocks + (of - base_blocks), mask=repeats, other=0)
        channel = tl.where(of < base_blocks, of, source) * 16 + channel_at(place % 16)
        exists = (of < end) & (channel < channels)
        at = channel.to(tl.int64)[None, :] * x_stride
        left = tl.load(x_row + at, mask=exists[None, :], other=0.0)
        block = start + tl.arange(0, BLOCK_K)
        mask = (block < end)[None, :]
        w = tl.load(b + b_row + block[None, :], mask=mask, other=0)
        scale = word_scale(tl.load(b_scale + b_row + block[None, :], mask=mask, other=0), dtype)
        right = decode_tile(w, scale, BLOCK_N, BLOCK_K, dtype, assembly)
        total = tl.dot(right, tl.trans(left), total)
    total = tl.trans(total)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    if partial:
        tl.store(y + split.to(tl.int64) * rows * columns + at, total * FACTOR, mask=mask)
    else:
        n = tl.minimum(n, columns - 1)
        store_product(y + at, total * FACTOR, 1.0, tl.load(b_outer), bias, m, n, mask, has_bias)


def nvfp4_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    weight_blocks: Tensor,
    b_layout: str = "plain",
) -> Tensor:
    """`nvfp4_weight_only_gemm_eager` by the route that the GPU's table names."""
    return multiply_by(x, b, b_scale, b_outer, bias, weight_blocks, b_layout)


def multiply_by(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    weight_blocks: Tensor,
    b_layout: str = "plain",
    *,
    rule: Rule | None = None,
) -> Tensor:
    """`nvfp4_weight_only_gemm`, by `rule` where one is given; "row" is taken as "tiles", and fp32
    takes "decode"."""
    check_weight_only(x, b, b_scale, b_outer, bias, weight_blocks, b_layout)
    if b_layout == "panels":  # of a weight that was packed for a CPU: right, and slow
        b, b_scale = from_panels(b, b_scale)
    rows = x.detach().reshape(-1, x.shape[-1])  # [M, K]
    y = x.new_empty((rows.shape[0], b.shape[0]))
    if not y.numel():
        return y
    rule = rule or choose(products.capability_of(x.device), *y.shape, 2 * b.shape[1])
    right = (products.aligned(b), b_scale.contiguous())
    epilogue = (b_outer.new_ones(1), b_outer, None if bias is None else bias.contiguous())
    with on_device(x):
        if rule.route == "decode" or x.dtype == torch.float32:
            _by_cublas(rows, right, weight_blocks, epilogue, y, rule)
        else:
            rule = Rule("tiles") if rule.route == "row" else rule
            _in_kernel(rows, right, weight_blocks, epilogue, y, rule)
    return y


def _in_kernel(
    x: Tensor,
    right: products.Operand,
    weight_blocks: Tensor,
    epilogue: products.Epilogue,
    y: Tensor,
    rule: Rule,
) -> None:
    rows, columns = y.shape
    blocks = right[1].shape[1]
    tiles = math.ceil(rows / rule.block_m) * math.ceil(columns / rule.block_n)
    steps = math.ceil(blocks / rule.block_k)
    splits, split_steps = products.parts_of(rule, tiles, steps, y.device)
    partial = splits > 1
    out = y.new_empty((splits, rows, columns), dtype=torch.float32) if partial else y
    _, b_outer, bias = epilogue
    multiply[(tiles * splits,)](
        x, right[0].view(torch.int64), right[1], b_outer, b_outer if bias is None else bias,
        weight_blocks.contiguous(), out,
        rows, columns, x.shape[1], blocks, blocks - weight_blocks.shape[0],
        split_steps * rule.block_k, *x.stride(),
        partial=partial, has_bias=bias is not None, assembly=x.is_cuda,
        BLOCK_M=rule.block_m, BLOCK_N=rule.block_n, BLOCK_K=rule.block_k,
        num_warps=rule.num_warps, num_stages=rule.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if partial:
        products.combine(out, epilogue, y, 1.0)


def _by_cublas(
    x: Tensor,
    right: products.Operand,
    weight_blocks: Tensor,
    epilogue: products.Epilogue,
    y: Tensor,
    rule: Rule,
) -> None:
    """By chunks of columns, as in triton_products.py."""
    a_outer, b_outer, bias = epilogue
    nothing = (weight_blocks[:0], 0)
    left = augmented(x, weight_blocks)
    chunk = rule.chunk or products.default_chunk(y.shape[0])
    for start in range(0, y.shape[1], chunk):
        some = slice(start, min(start + chunk, y.shape[1]))
        w = products.decode((right[0][some], right[1][some]), nothing, x.dtype)
        part = (a_outer, b_outer, None if bias is None else bias[some])
        sums = products.matmul_fp32(left, w.t())
        products.combine(sums.unsqueeze(0), part, y[:, some], FACTOR.value)
