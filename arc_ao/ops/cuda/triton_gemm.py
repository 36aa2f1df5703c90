"""Kernels behind arc::nvfp4_gemm: products of NVFP4 operands on GPUs without FP4 matrix units.

Operands are read as int64 [rows, blocks], one element per 16-channel block, beside their scales
[rows, blocks]. The code of channel j is nibble j of every element. Both operands are decoded in
the same order of channels, the one that needs no exchange between threads.

A q*s product has at most 6 significant bits. Decoding leaves it times 2^-7 (`small_e2m1` gives
q * 2^-126, the scale is taken times 2^119), which the epilogue makes up for: a multiple of 2^-17 up
to 21, exact in bf16 and in fp16. Tiles are multiplied in fp16, of which Triton's interpreter has a
matrix product, too (that of bf16 multiplies the bits as integers, in 3.6 as in 3.9).
"""

import triton
import triton.language as tl

from arc_ao.ops.cuda.triton_nvfp4 import decode_e4m3, narrow, round_to, small_e2m1

TWO_POW_119 = tl.constexpr(2.0**119)
TWO_POW_100 = tl.constexpr(2.0**100)
TILES_FACTOR = tl.constexpr(2.0**14)  # both operands times 2^-7
ROW_FACTOR = tl.constexpr(2.0**33)  # 2^-126 of the weight times 2^(100 - 7) of the row


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
def operand_scale(scale):
    """fp32 scale * 2^119 of e4m3 bits (uint8)."""
    return decode_e4m3(scale.to(tl.int32)) * TWO_POW_119


@triton.jit
def operand(word, position: tl.constexpr, scale):
    """fp32 q * s * 2^-7 of the code at `position` in int32 words; exact in bf16 and fp16, too."""
    return small_e2m1(word, position) * scale


@triton.jit
def low_word(block):
    """Codes 0..7 of int64 blocks."""
    return block.to(tl.int32)


@triton.jit
def high_word(block):
    """Codes 8..15 of int64 blocks."""
    return (block >> 32).to(tl.int32)


@triton.jit
def decode_word(word, scale):
    """fp32 [m, n, 2, 2, 2] of the codes in int32 words [m, n].

    Channel c lies at [c & 1, c & 2, c & 4], as 0 or 1 each. The values of a word stay with the
    thread that holds it.
    """
    low_pairs = tl.join(
        tl.join(operand(word, 0, scale), operand(word, 1, scale)),
        tl.join(operand(word, 2, scale), operand(word, 3, scale)),
    )
    high_pairs = tl.join(
        tl.join(operand(word, 4, scale), operand(word, 5, scale)),
        tl.join(operand(word, 6, scale), operand(word, 7, scale)),
    )
    return tl.join(low_pairs, high_pairs)


@triton.jit
def decode_tile(block, scale, m: tl.constexpr, n: tl.constexpr, dtype: tl.constexpr):
    """`dtype` [m, 16 n] of int64 blocks [m, n]; c & 8, behind `decode_word`'s order, comes last."""
    low, high = decode_word(low_word(block), scale), decode_word(high_word(block), scale)
    # Narrowed last: Triton 3.6 fails for sm_90 where a reshape feeds a product.
    return tl.reshape(tl.join(low, high), (m, 16 * n)).to(dtype)


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
def multiply_tiles(
    a, a_scale, a_outer, b, b_scale, b_outer, bias, act_blocks, y,
    rows, columns, blocks, base_blocks, act_count, split_blocks,
    repeats: tl.constexpr, even: tl.constexpr, partial: tl.constexpr, has_bias: tl.constexpr,
    per_row: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of the sum over `split_blocks` blocks of K (`partial`), by tensor cores.

    Args:
        a, b: int64 [rows, blocks] and [columns, blocks - act_count]; scales uint8, alike.
        y: [rows, columns], or fp32 [splits, rows, columns] without scales and bias.
        even: blocks is a multiple of BLOCK_K. split_blocks always is.
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
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end = tl.minimum((split + 1) * split_blocks, blocks)
    for start in range(split * split_blocks, end, BLOCK_K):
        block = start + tl.arange(0, BLOCK_K)
        stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
        a_at = a_row[:, None] + block[None, :]
        b_at = b_row[:, None] + stored[None, :]
        if even:
            x, x_scale = tl.load(a + a_at), tl.load(a_scale + a_at)
            w, w_scale = tl.load(b + b_at), tl.load(b_scale + b_at)
        else:
            exists = (block < end)[None, :]
            x = tl.load(a + a_at, mask=exists, other=0)
            x_scale = tl.load(a_scale + a_at, mask=exists, other=0)
            w = tl.load(b + b_at, mask=exists, other=0)
            w_scale = tl.load(b_scale + b_at, mask=exists, other=0)
        left, right = operand_scale(x_scale), operand_scale(w_scale)
        x = decode_tile(x, left, BLOCK_M, BLOCK_K, tl.float16)
        w = decode_tile(w, right, BLOCK_N, BLOCK_K, tl.float16)
        total = tl.dot(x, tl.trans(w), total)
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
def multiply_row(
    a, a_scale, a_outer, b, b_scale, b_outer, bias, act_blocks, y,
    rows, columns, blocks, base_blocks, act_count, split_blocks,
    repeats: tl.constexpr, even: tl.constexpr, partial: tl.constexpr, has_bias: tl.constexpr,
    per_row: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N elements of one row of y by fp32 multiply-adds; arguments as in `multiply_tiles`.

    The codes of a block are multiplied as they are, and its sum by the weight's scale: one
    product with a scale in 16.
    """
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0)
    m = tile % rows
    n = (tile // rows % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tile // rows // column_tiles
    a_row = m.to(tl.int64) * blocks
    b_row = tl.minimum(n, columns - 1).to(tl.int64) * (blocks - act_count)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    end = tl.minimum((split + 1) * split_blocks, blocks)
    for start in range(split * split_blocks, end, BLOCK_K):
        block = start + tl.arange(0, BLOCK_K)
        stored = stored_block(block, act_blocks, base_blocks, act_count, repeats)
        b_at = b_row[:, None] + stored[None, :]
        if even:
            x, x_scale = tl.load(a + a_row + block), tl.load(a_scale + a_row + block)
            w, w_scale = tl.load(b + b_at), tl.load(b_scale + b_at)
        else:
            exists = block < end
            x = tl.load(a + a_row + block, mask=exists, other=0)
            x_scale = tl.load(a_scale + a_row + block, mask=exists, other=0)
            w = tl.load(b + b_at, mask=exists[None, :], other=0)
            w_scale = tl.load(b_scale + b_at, mask=exists[None, :], other=0)
        left = operand_scale(x_scale)
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for j in tl.static_range(8):
            x_j = small_e2m1(low_word(x), j) * left * TWO_POW_100
            products += small_e2m1(low_word(w), j) * x_j[None, :]
        for j in tl.static_range(8):
            x_j = small_e2m1(high_word(x), j) * left * TWO_POW_100
            products += small_e2m1(high_word(w), j) * x_j[None, :]
        sums += products * decode_e4m3(w_scale.to(tl.int32))
    total = tl.sum(sums, axis=1)[None, :] * ROW_FACTOR
    mask = (n < columns)[None, :]
    at = m.to(tl.int64) * columns + n[None, :]
    if partial:
        tl.store(y + split.to(tl.int64) * rows * columns + at, total, mask=mask)
    else:
        outer = tl.load(a_outer + (m if per_row else 0))
        n = tl.minimum(n, columns - 1)
        store_product(y + at, total, outer, tl.load(b_outer), bias, m, n, mask, has_bias)


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
    steps = operand_scale(tl.load(scale + stored, mask=exists, other=0))[:, None]
    at = stored[:, None] * 8 + tl.arange(0, 8)[None, :]
    word = tl.load(qdata + at, mask=exists[:, None], other=0).to(tl.int32)
    pairs = tl.join(operand(word, 0, steps), operand(word, 1, steps))  # [BLOCK, 8, 2]
    values = narrow(tl.reshape(pairs, (BLOCK, 16)), out.dtype.element_ty)
    at = (row * blocks + block)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, values, mask=exists[:, None])
