"""Products of NVFP4 operands in tensor cores, on GPUs without FP4 matrix units.

Operands are read as int64 [rows, blocks], one element per 16-channel block, beside their scales
[rows, blocks]. The code of channel j is nibble j of every element. Both operands are decoded in
the same order of channels, the one that needs no exchange between threads.

A q*s product has at most 6 significant bits. Decoding leaves it times 2^-7, which the epilogue
makes up for: a multiple of 2^-17 up to 21, exact in bf16 and in fp16. Tiles are multiplied in fp16,
of which Triton's interpreter has a matrix product, too (that of bf16 multiplies the bits as
integers, in 3.6 as in 3.9). The weight's tile is the left factor: sm_90's tensor cores take no
fewer than 64 rows on the left, and 16 tokens are fewer.
"""

import triton
import triton.language as tl

from arc_ao.ops.cuda.triton_halves import decode_tile, word_scale
from arc_ao.ops.cuda.triton_nvfp4 import narrow, round_to, small_e2m1

TILES_FACTOR = tl.constexpr(2.0**14)  # both operands times 2^-7


@triton.jit
def stored_block(block, act_blocks, base_blocks, act_count, repeats: tl.constexpr):
    """Block of b that meets `block` of a: base, base blocks that are repeated, the rest."""
    if repeats:
        behind = block - base_blocks
        again = (behind >= 0) & (behind < act_count)
        repeated = tl.load(act_blocks + behind, mask=again, other=0)
        block = tl.where(again, repeated, tl.where(behind < 0, block, block - act_count))
    return block


@triton.jit
def store_product(y, product, a_outer, b_outer, bias, m, n, mask, has_bias: tl.constexpr):
    """product [m, n] * a_outer * b_outer + bias, rounded once. a_outer: fp32, shaped for it."""
    product = product * a_outer * b_outer
    if has_bias:
        product += tl.load(bias + n).to(tl.float32)[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    if dtype != tl.float32:
        product = narrow(round_to(product, dtype), dtype)
    tl.store(y, product, mask=mask)


@triton.jit
def load_scales(
    a_scale, a_row, b_scale, b_row, block, end, act_blocks, base_blocks, act_count,
    repeats: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """`word_scale`s of a step of both operands. They are loaded a step ahead of their codes: bytes
    cannot be copied to shared memory in the background, as Triton does with the codes."""
    stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
    a_at, b_at = a_row[:, None] + block[None, :], b_row[:, None] + stored[None, :]
    if even:
        x, w = tl.load(a_scale + a_at), tl.load(b_scale + b_at)
    else:
        exists = (block < end)[None, :]
        x = tl.load(a_scale + a_at, mask=exists, other=0)
        w = tl.load(b_scale + b_at, mask=exists, other=0)
    return word_scale(x, tl.float16), word_scale(w, tl.float16)


@triton.jit
def multiply_tiles(
    a, a_scale, a_outer, b, b_scale, b_outer, bias, act_blocks, y,
    rows, columns, blocks, base_blocks, act_count, split_blocks,
    repeats: tl.constexpr, even: tl.constexpr, partial: tl.constexpr, has_bias: tl.constexpr,
    per_row: tl.constexpr, assembly: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of the sum over `split_blocks` blocks of K (`partial`), by tensor cores.

    Args:
        a, b: int64 [rows, blocks] and [columns, blocks - act_count]; scales uint8, alike.
        y: [rows, columns], or fp32 [splits, rows, columns] without scales and bias.
        even: blocks is a multiple of BLOCK_K. split_blocks always is.
        assembly: decode by PTX; not where kernels are interpreted.
    """
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0)
    m = (tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // row_tiles % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tile // row_tiles // column_tiles
    # Rows behind the last read it again; what they give is not stored.
    a_row = tl.minimum(m, rows - 1).to(tl.int64) * blocks
    b_row = tl.minimum(n, columns - 1).to(tl.int64) * (blocks - act_count)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * split_blocks
    end = tl.minimum(first + split_blocks, blocks)
    step = tl.arange(0, BLOCK_K)
    x_scale, w_scale = load_scales(
        a_scale, a_row, b_scale, b_row, first + step, end,
        act_blocks, base_blocks, act_count, repeats, even,
    )  # fmt: skip
    for start in range(first, end, BLOCK_K):
        block = start + step
        stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
        a_at = a_row[:, None] + block[None, :]
        b_at = b_row[:, None] + stored[None, :]
        if even:
            x, w = tl.load(a + a_at), tl.load(b + b_at)
        else:
            exists = (block < end)[None, :]
            x = tl.load(a + a_at, mask=exists, other=0)
            w = tl.load(b + b_at, mask=exists, other=0)
        following = tl.where(start + BLOCK_K < end, block + BLOCK_K, block)
        x_next, w_next = load_scales(
            a_scale, a_row, b_scale, b_row, following, end,
            act_blocks, base_blocks, act_count, repeats, even,
        )  # fmt: skip
        x = decode_tile(x, x_scale, BLOCK_M, BLOCK_K, tl.float16, assembly)
        w = decode_tile(w, w_scale, BLOCK_N, BLOCK_K, tl.float16, assembly)
        total = tl.dot(w, tl.trans(x), total)
        x_scale, w_scale = x_next, w_next
    total = tl.trans(total)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    at = m.to(tl.int64)[:, None] * columns + n[None, :]
    if partial:
        tl.store(y + split.to(tl.int64) * rows * columns + at, total * TILES_FACTOR, mask=mask)
    else:
        outer = tl.load(a_outer + (tl.minimum(m, rows - 1) if per_row else m * 0))[:, None]
        n = tl.minimum(n, columns - 1)
        store_product(
            y + at, total * TILES_FACTOR, outer, tl.load(b_outer), bias, m, n, mask, has_bias
        )


@triton.jit
def combine(
    partials, a_outer, b_outer, bias, y, rows, columns, splits, y_row_stride,
    factor: tl.constexpr, has_bias: tl.constexpr, per_row: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] from fp32 partials [splits, rows, columns], added in their order."""
    column_tiles = tl.cdiv(columns, BLOCK)
    m = (tl.program_id(0) // column_tiles).to(tl.int64)
    n = (tl.program_id(0) % column_tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = n < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partials + (split * rows + m) * columns + n, mask=mask, other=0.0)
    total *= factor
    outer = tl.load(a_outer + (m if per_row else 0))
    at = (m * y_row_stride + n)[None, :]
    n = tl.minimum(n, columns - 1)
    store_product(
        y + at, total[None, :], outer, tl.load(b_outer), bias, m, n, mask[None, :], has_bias
    )


@triton.jit
def decode_operand(
    qdata, scale, act_blocks, out, blocks, base_blocks, act_count,
    repeats: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bf16 q * s * 2^-7 [rows, 16 * blocks] of qdata uint8 [rows, 8 * (blocks - act_count)]."""
    tiles = tl.cdiv(blocks, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = block < blocks
    stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
    stored += row * (blocks - act_count)
    steps = word_scale(tl.load(scale + stored, mask=exists, other=0), tl.bfloat16)[:, None]
    at = stored[:, None] * 8 + tl.arange(0, 8)[None, :]
    word = tl.load(qdata + at, mask=exists[:, None], other=0).to(tl.int32)
    pairs = tl.join(small_e2m1(word, 0) * steps, small_e2m1(word, 1) * steps)  # [BLOCK, 8, 2]
    values = narrow(tl.reshape(pairs, (BLOCK, 16)), out.dtype.element_ty)
    at = (row * blocks + block)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, values, mask=exists[:, None])
