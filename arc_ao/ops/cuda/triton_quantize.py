"""The kernel behind arc::quant_augment and its fused producers: one program quantizes one row.

    sum of squares (norms)  ->  amax (outer scale per row)  ->  codes

Each arrow is a pass over the row. A row of one tile (`whole`) stays in registers between them; a
longer one is read again, from cache. A block's amax is taken before the outer scale's inverse is
multiplied in, and is multiplied with it: rounding keeps the order of numbers. Residual and repeated
blocks, a few percent of the row, are computed anew from the input, so that no pass waits for what
another one wrote.

`source` is what a row is made of: (first, second, weight, order, channels, first_stride,
second_stride, weight_stride), with first and second pointing at the row, and `target` where it
goes: (qdata, scale, total), pointing at the row, too.
"""

import triton
import triton.language as tl

from arc_ao.ops.cuda.triton_inputs import (
    ADD_RMS_NORM,
    RMS_NORM,
    finish,
    inverse_rms_of,
    load_channels,
    load_raw,
    source_channels,
)
from arc_ao.ops.cuda.triton_nvfp4 import (
    bits_of,
    block_amax,
    decode_e2m1,
    decode_encoded,
    encode_e2m1,
    magnitude_bits,
    narrow,
    pack,
    quantize_blocks,
)

# Where the outer scale comes from.
ROW_AMAX = tl.constexpr(0)  # this row: scale_mode "token"
GIVEN_AMAX = tl.constexpr(1)  # scale_in holds the amax of all rows: "tensor"
GIVEN_SCALE = tl.constexpr(2)  # scale_in holds the outer scale: "static"
ONLY_AMAX = tl.constexpr(3)  # write each row's amax to outer and nothing else

NVFP4_MAX = tl.constexpr(2688.0)
TINY_AMAX = tl.constexpr(2.0**-116)


@triton.jit
def outer_of_amax(amax):
    """(quantize-side multiplier, outer scale) of fp32 amax; 0 and 0 where it counts as zero."""
    tiny = amax < TINY_AMAX
    inverse = tl.where(tiny, 0.0, tl.math.div_rn(NVFP4_MAX, amax))
    return inverse, tl.where(tiny, 0.0, tl.math.div_rn(amax, NVFP4_MAX))


@triton.jit
def outer_of_scale(scale):
    """The same of a given outer scale."""
    return tl.where(scale == 0.0, 0.0, tl.math.div_rn(1.0, scale)), scale


@triton.jit
def channels_of(blocks):
    """Channel ids [n, 16] of block ids [n]."""
    return blocks[:, None] * 16 + tl.arange(0, 16)[None, :]


@triton.jit
def store_blocks(target, position, valid, codes, bits, n: tl.constexpr):
    """Write codes [n, 16] and scale bits [n] to the row's output blocks `position` [n]."""
    qdata, scale, _ = target
    byte = position[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(qdata + byte, pack(codes, bits, n), mask=valid[:, None])
    tl.store(scale + position, bits.to(tl.uint8), mask=valid)


@triton.jit
def store_base(
    target, ids, blocks, scaled, amax, raw, channel, mask,
    kind: tl.constexpr, block_scale: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantize and write the base blocks `ids` [TILE], and the sum that the norm was taken of."""
    codes, bits = quantize_blocks(scaled, amax, TILE, block_scale)
    store_blocks(target, ids, ids < blocks, codes, bits, TILE)
    if kind == ADD_RMS_NORM:
        total = target[2]
        tl.store(total + channel, narrow(raw, total.dtype.element_ty), mask=mask)


@triton.jit
def square_sum_of(
    source, blocks, kind: tl.constexpr, ordered: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """float64 sum of squares of a row longer than a tile."""
    sums = tl.zeros((TILE, 16), tl.float64)
    for start in range(0, blocks, TILE):
        ids = channels_of(start + tl.arange(0, TILE))
        channel, mask = source_channels(source, ids, ordered)
        wide = load_raw(source, channel, mask, kind).to(tl.float64)
        sums += wide * wide
    return tl.sum(tl.sum(sums, axis=1), axis=0)


@triton.jit
def amax_bits_of(
    source, blocks, inverse_rms, kind: tl.constexpr, ordered: tl.constexpr, TILE: tl.constexpr
):
    """`magnitude_bits` of the amax of a row longer than a tile."""
    most = tl.zeros((TILE, 16), tl.int32)
    for start in range(0, blocks, TILE):
        ids = channels_of(start + tl.arange(0, TILE))
        value, _, _, _ = load_channels(source, ids, inverse_rms, kind, ordered)
        most = tl.maximum(most, magnitude_bits(value))
    return tl.max(tl.max(most, axis=1), axis=0)


@triton.jit
def quantize_extra_blocks(
    source, target, act_blocks, weight_blocks, blocks, act_count, gathered_count, weight_count,
    inverse_rms, inverse,
    kind: tl.constexpr, ordered: tl.constexpr, block_scale: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The residuals of act_blocks, and weight_blocks a second time; FEW of them at a time."""
    count = act_count + weight_count
    for start in range(0, count, FEW):
        here = start + tl.arange(0, FEW)
        is_act = here < act_count
        repeats = (here >= act_count) & (here < count)
        block = tl.load(act_blocks + here, mask=is_act, other=0)
        block += tl.load(weight_blocks + (here - act_count), mask=repeats, other=0)
        value, _, _, _ = load_channels(source, channels_of(block), inverse_rms, kind, ordered)
        scaled = value * inverse
        codes, bits = quantize_blocks(scaled, block_amax(scaled), FEW, block_scale)
        residual = scaled - decode_e2m1(codes) * decode_encoded(bits)[:, None]
        fixed, fixed_bits = quantize_blocks(residual, block_amax(residual), FEW, block_scale)
        codes = tl.where(is_act[:, None], fixed, codes)
        bits = tl.where(is_act, fixed_bits, bits)
        position = blocks + here + tl.where(is_act, 0, gathered_count)
        store_blocks(target, position, here < count, codes, bits, FEW)


@triton.jit
def quantize_gathered(
    source, target, act_channels, first_position, gathered_count, inverse_rms, inverse,
    kind: tl.constexpr, ordered: tl.constexpr, block_scale: tl.constexpr,
):  # fmt: skip
    """The residuals of act_channels, gathered 16 to a block.

    A channel's residual is taken under the scale of the base block around it.
    """
    for gathered in range(0, gathered_count):
        chosen = tl.load(act_channels + gathered * 16 + tl.arange(0, 16))
        around = channels_of(chosen // 16)
        value, _, _, _ = load_channels(source, around, inverse_rms, kind, ordered)
        scaled = value * inverse
        _, bits = quantize_blocks(scaled, block_amax(scaled), 16, block_scale)
        value, _, _, _ = load_channels(source, chosen, inverse_rms, kind, ordered)
        scaled = value * inverse
        scale = decode_encoded(bits)
        code = encode_e2m1(scaled * tl.math.div_rn(1.0, scale))
        residual = tl.reshape(scaled - decode_e2m1(code) * scale, (1, 16))
        codes, bits = quantize_blocks(residual, block_amax(residual), 1, block_scale)
        position = first_position + gathered + tl.arange(0, 1)
        store_blocks(target, position, position >= 0, codes, bits, 1)


@triton.jit
def outer_scales(
    scale_in, outer, row, amax_bits, origin: tl.constexpr
):  # fmt: skip
    """The quantize-side multiplier of this row; writes the outer scale."""
    if origin == GIVEN_SCALE:
        inverse, outer_scale = outer_of_scale(tl.load(scale_in))
    elif origin == GIVEN_AMAX:
        inverse, outer_scale = outer_of_amax(tl.load(scale_in))
    else:
        inverse, outer_scale = outer_of_amax(amax_bits.to(tl.float32, bitcast=True))
    if origin == ROW_AMAX:
        tl.store(outer + row, outer_scale)
    else:
        tl.store(outer, outer_scale, mask=row == 0)
    return inverse


@triton.jit
def quantize_row(
    first, second, weight, total, order, scale_in,
    act_blocks, act_channels, weight_blocks, qdata, scale, outer,
    channels, blocks, act_count, gathered_count, weight_count, eps,
    first_row_stride, first_stride, second_row_stride, second_stride, weight_stride,
    kind: tl.constexpr, origin: tl.constexpr, ordered: tl.constexpr, block_scale: tl.constexpr,
    whole: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Quantize row `program_id(0)`.

    Args:
        first, second: x, or x and residual, or gate and up; [M, channels] by strides.
        weight: of the norm. total: the sum that ADD_RMS_NORM returns, contiguous.
        scale_in: fp32 [1], see `origin`.
        blocks: ceil(channels / 16). act_count, weight_count: lengths of act_blocks, weight_blocks;
            gathered_count: blocks that act_channels fills.
        qdata, scale: contiguous, blocks in the order base, act_blocks, act_channels, weight_blocks.
        TILE: blocks in a tile; FEW: extra blocks in a tile. whole: blocks <= TILE.
    """
    row = tl.program_id(0).to(tl.int64)
    all_blocks = blocks + act_count + gathered_count + weight_count
    source = (
        first + row * first_row_stride, second + row * second_row_stride, weight, order, channels,
        first_stride, second_stride, weight_stride,
    )  # fmt: skip
    target = (qdata + row * all_blocks * 8, scale + row * all_blocks, total + row * channels)
    ids = tl.arange(0, TILE)
    inverse_rms = 1.0
    amax_bits = 0
    if whole:
        channel, mask = source_channels(source, channels_of(ids), ordered)
        raw = load_raw(source, channel, mask, kind)
    if kind == RMS_NORM or kind == ADD_RMS_NORM:
        if whole:
            wide = raw.to(tl.float64)
            square_sum = tl.sum(tl.sum(wide * wide, axis=1), axis=0)
        else:
            square_sum = square_sum_of(source, blocks, kind, ordered, TILE)
        inverse_rms = inverse_rms_of(square_sum, channels, eps)
    if whole:
        value = finish(source, raw, channel, mask, inverse_rms, kind)
        amax = block_amax(value)
    if origin == ROW_AMAX or origin == ONLY_AMAX:
        if whole:
            amax_bits = tl.max(bits_of(amax), axis=0)
        else:
            amax_bits = amax_bits_of(source, blocks, inverse_rms, kind, ordered, TILE)
    if origin == ONLY_AMAX:
        tl.store(outer + row, amax_bits.to(tl.float32, bitcast=True))
    else:
        inverse = outer_scales(scale_in, outer, row, amax_bits, origin)
        if whole:
            store_base(
                target, ids, blocks, value * inverse, amax * inverse, raw, channel, mask,
                kind, block_scale, TILE,
            )  # fmt: skip
        else:
            for start in range(0, blocks, TILE):
                here = start + ids
                value, raw, channel, mask = load_channels(
                    source, channels_of(here), inverse_rms, kind, ordered
                )
                store_base(
                    target, here, blocks, value * inverse, block_amax(value) * inverse,
                    raw, channel, mask, kind, block_scale, TILE,
                )  # fmt: skip
        quantize_extra_blocks(
            source, target, act_blocks, weight_blocks, blocks, act_count, gathered_count,
            weight_count, inverse_rms, inverse, kind, ordered, block_scale, FEW,
        )  # fmt: skip
        quantize_gathered(
            source, target, act_channels, blocks + act_count, gathered_count, inverse_rms, inverse,
            kind, ordered, block_scale,
        )  # fmt: skip
