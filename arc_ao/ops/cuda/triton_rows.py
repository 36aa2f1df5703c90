"""The product for one or two rows (decoding of text): the weight streams by once, in integers.

A block of 16 channels is one exact integer sum (triton_bytes.py), which enters the fp32 sum of its
row and column times both scales, rounded once. Each thread keeps sums of its own, which are added
up at the end: with BLOCK_K = 64 * num_warps it holds all BLOCK_N columns of two neighbouring blocks
of channels, loads 16 bytes of codes at a time, and decodes a row's codes once for all columns.
"""

import triton
import triton.language as tl

from arc_ao.ops.cuda.triton_bytes import (
    SHIFTED_LOW,
    TWICE_LOW,
    dot4,
    hold,
    shifted_bytes,
    signed_bytes,
    unshift,
)
from arc_ao.ops.cuda.triton_gemm import store_product, stored_block
from arc_ao.ops.cuda.triton_nvfp4 import E4M3_NAN, ROUND, ROUND_BITS, decode_e4m3

TWO_POW_100 = tl.constexpr(2.0**100)
# The weight's scales are used times 2^-120, the row's times 2^100; codes are doubled on both sides.
FACTOR = tl.constexpr(2.0**18)


@triton.jit
def row_operand(a, a_scale, a_at, exists, even: tl.constexpr, assembly: tl.constexpr):
    """A step of one row: its codes as four int32 of bytes, what their sums start from, and fp32
    scales times 2^100; all [BLOCK_K]."""
    if even:
        x, bits = tl.load(a + a_at), tl.load(a_scale + a_at)
    else:
        x = tl.load(a + a_at, mask=exists, other=0)
        bits = tl.load(a_scale + a_at, mask=exists, other=0)
    low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
    x0, x1 = signed_bytes(low, assembly), signed_bytes(low >> 16, assembly)
    x2, x3 = signed_bytes(high, assembly), signed_bytes(high >> 16, assembly)
    # Sums are made in the last places of 1.5 * 2^23, where fp32 counts in ones.
    origin = unshift(x0, x1, x2, x3, ROUND_BITS, assembly)
    return x0, x1, x2, x3, origin, decode_e4m3(bits.to(tl.int32)) * TWO_POW_100


@triton.jit
def multiply_rows(
    a, a_scale, a_outer, b, b_scale, b_outer, bias, act_blocks, y,
    rows, columns, blocks, base_blocks, act_count, split_blocks,
    repeats: tl.constexpr, even: tl.constexpr, partial: tl.constexpr, has_bias: tl.constexpr,
    per_row: tl.constexpr, assembly: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows times BLOCK_N columns of y; arguments as in `multiply_tiles`."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0)
    m = (tile % row_tiles) * BLOCK_M
    n = (tile // row_tiles % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tile // row_tiles // column_tiles
    b_blocks = blocks - act_count if repeats else blocks
    b_row = tl.minimum(n, columns - 1).to(tl.int64)[:, None] * b_blocks
    twice, shifted = hold(TWICE_LOW, assembly), hold(SHIFTED_LOW, assembly)
    # Blocks that a thread holds side by side: all operands then lie alike, and none is exchanged.
    width: tl.constexpr = 1 if repeats else 2
    largest = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)  # bits of a scale; NaN is above all numbers
    sums = ()
    for _ in tl.static_range(BLOCK_M):
        sums += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    end = tl.minimum((split + 1) * split_blocks, blocks)
    for start in range(split * split_blocks, end, BLOCK_K):
        block = tl.max_contiguous(start + tl.arange(0, BLOCK_K), [width])
        exists = block < end
        stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
        b_at = b_row + stored[None, :]
        if even:
            w, bits = tl.load(b + b_at), tl.load(b_scale + b_at).to(tl.int32)
        else:
            w = tl.load(b + b_at, mask=exists[None, :], other=0)
            bits = tl.load(b_scale + b_at, mask=exists[None, :], other=0).to(tl.int32)
        largest = tl.maximum(largest, bits)
        w_scale = (bits << 20).to(tl.float32, bitcast=True)  # times 2^-120
        low, high = w.to(tl.int32), (w >> 32).to(tl.int32)
        w0 = shifted_bytes(low, twice, shifted, assembly)
        w1 = shifted_bytes(low >> 16, twice, shifted, assembly)
        w2 = shifted_bytes(high, twice, shifted, assembly)
        w3 = shifted_bytes(high >> 16, twice, shifted, assembly)
        more = ()
        for i in tl.static_range(BLOCK_M):
            a_at = tl.minimum(m + i, rows - 1).to(tl.int64) * blocks + block
            x0, x1, x2, x3, total, x_scale = row_operand(a, a_scale, a_at, exists, even, assembly)
            total = dot4(w0, x0[None, :], total[None, :], assembly)
            total = dot4(w1, x1[None, :], total, assembly)
            total = dot4(w2, x2[None, :], total, assembly)
            total = dot4(w3, x3[None, :], total, assembly)
            product = (total.to(tl.float32, bitcast=True) - ROUND) * x_scale[None, :]
            more += (sums[i] + product * w_scale,)
        sums = more
    is_nan = tl.max(largest, axis=1)[None, :] >= E4M3_NAN
    here = tl.minimum(n, columns - 1)
    for i in tl.static_range(BLOCK_M):
        total = tl.where(is_nan, float("nan"), tl.sum(sums[i], axis=1)[None, :] * FACTOR)
        mask = (n < columns)[None, :] & (m + i < rows)
        at = (m + i).to(tl.int64) * columns + n[None, :]
        if partial:
            tl.store(y + split.to(tl.int64) * rows * columns + at, total, mask=mask)
        else:
            outer = tl.load(a_outer + (tl.minimum(m + i, rows - 1) if per_row else 0))
            store_product(y + at, total, outer, tl.load(b_outer), bias, m, here, mask, has_bias)
