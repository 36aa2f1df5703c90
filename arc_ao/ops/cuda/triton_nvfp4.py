"""NVFP4 numerics in Triton: arc_ao/formats/nvfp4.py, bit for bit, in integers and fp32.

Every conversion that rounds is spelled out in integers or in single fp32 additions, so that the
result depends neither on the architecture (sm_80 has no fp8 type) nor on whether the kernel is
compiled or interpreted on a CPU. Kernels that use these functions are launched with
`enable_fp_fusion=False`, since a contracted multiply-add rounds once where the meaning says twice.
"""

import triton
import triton.language as tl

from arc_ao.formats import nvfp4

E4M3_NAN = tl.constexpr(0x7F)
E4M3_SMALLEST_CODE = tl.constexpr(nvfp4.E4M3_SMALLEST_CODE)
E4M3_LARGEST_CODE = tl.constexpr(nvfp4.E4M3_LARGEST_CODE)
NUM_LATER = tl.constexpr(len(nvfp4.CODE_OFFSETS) - 1)
E4M3_MIN = tl.constexpr(2.0**-9)
E4M3_MIN_NORMAL = tl.constexpr(2.0**-6)
E4M3_MAX = tl.constexpr(448.0)
INF_BITS = tl.constexpr(0x7F800000)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
ROUND_BITS = tl.constexpr(0x4B400000)
E2M1_MAX = tl.constexpr(6.0)
MAGIC_STEP = tl.constexpr((1 << 23) + 2)  # a power of two more: twice as much, and two codes
MAGIC_ORIGIN = tl.constexpr(0x4AC00000 - 127 * ((1 << 23) + 2))  # 1.5 * 2^22 where the power is 1
TWO_POW_120 = tl.constexpr(2.0**120)
TWO_POW_126 = tl.constexpr(2.0**126)
ONE_SIXTH = tl.constexpr(1.0 / 6.0)
ONE_FOURTH = tl.constexpr(1.0 / 4.0)


@triton.jit
def bits_of(x):
    """int32 bits of fp32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """int32 bits of |x|: they order like the values, with Inf and then NaN above all numbers."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def widen(x):
    """fp32 of bf16, fp16 or fp32, exact."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x rounded to the nearest value of `dtype`, ties to even, still as fp32."""
    if dtype == tl.bfloat16:
        u = bits_of(x)
        rounded = ((u + 0x7FFF + ((u >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(x != x, x, rounded)
    elif dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`dtype` of an fp32 x that `dtype` can hold, such as `round_to` gives."""
    if dtype == tl.bfloat16:
        return (bits_of(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def encode_e4m3(x):
    """e4m3 bits (int32) nearest to fp32 x >= 0, clamped to [2^-9, 448]; NaN and Inf give 0x7f."""
    clamped = tl.minimum(tl.maximum(x, E4M3_MIN), E4M3_MAX)
    u = bits_of(clamped)
    normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # The last place of 2^14 in fp32 is 2^-9, the step of e4m3's subnormals.
    subnormal = bits_of(clamped + 16384.0) - 0x46800000
    code = tl.where(clamped < E4M3_MIN_NORMAL, subnormal, normal)
    return tl.where(magnitude_bits(x) >= INF_BITS, E4M3_NAN, code)


@triton.jit
def decode_e4m3(code):
    """fp32 of a scale's byte (int32), NaN from 0x7f on."""
    return tl.where(code >= E4M3_NAN, float("nan"), _scale_of(code))


@triton.jit
def decode_encoded(code):
    """The same of what `encode_e4m3` made: 0x7f at most, and fewer registers to tell it by."""
    return tl.where(code == E4M3_NAN, float("nan"), _scale_of(code))


@triton.jit
def _scale_of(code):
    """fp32 of e4m3 bits 0..0x7e: exponent and mantissa in place, the bias by a product."""
    return (code << 20).to(tl.float32, bitcast=True) * TWO_POW_120


@triton.jit
def nearest_e2m1(v):
    """4-bit codes (int32) of fp32 v that is no NaN.

    Steps are 0.5 below 2, 1 below 4 and 2 above: half the power of two below v, at least 0.5.
    `magic` is 1.5 * 2^23 steps, so that adding it rounds to steps, ties to even, plus the number of
    codes below that power's own (0, 2 or 4); the lowest bits of the sum are the code.
    """
    a = tl.minimum(tl.abs(v), E2M1_MAX)
    power = bits_of(tl.maximum(a, 1.0)) >> 23
    magic = power * MAGIC_STEP + MAGIC_ORIGIN
    sum_bits = bits_of(a + magic.to(tl.float32, bitcast=True))
    return (sum_bits & 7) | ((bits_of(v) >> 28) & 8)


@triton.jit
def encode_e2m1(v):
    """4-bit codes (int32) of fp32 v; NaN gives 0. See `e2m1_index` in formats/nvfp4.py."""
    return tl.where(v != v, 0, nearest_e2m1(v))


@triton.jit
def small_e2m1(word, position: tl.constexpr):
    """fp32 value times 2^-126 of the code at `position` (0..7) in int32 words: four integer steps.

    Exponent and mantissa of e2m1 are moved to where fp32 has their lowest bits, so that 0.5 is a
    subnormal and everything else follows.
    """
    if position < 6:
        placed = word << (22 - 4 * position)
    else:
        placed = word >> (4 * position - 22)
    sign = word << (28 - 4 * position)
    return ((placed & 0x01C00000) | (sign & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def decode_e2m1(code):
    """fp32 of 4-bit codes (int32)."""
    return small_e2m1(code, 0) * TWO_POW_126


@triton.jit
def block_amax(blocks):
    """[n] of fp32 blocks [n, 16]; NaN is above Inf."""
    return tl.max(magnitude_bits(blocks), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def encode_blocks(blocks, scale):
    """Codes [n, 16] of fp32 blocks under decoded scales [n]; any code where the scale is NaN."""
    return nearest_e2m1(blocks * tl.math.div_rn(1.0, scale)[:, None])


@triton.jit
def _add_halves(x, n: tl.constexpr, width: tl.constexpr):
    """[n, width] to [n, width/2]: first half plus second half."""
    pairs = tl.permute(tl.reshape(x, (n, 2, width // 2)), (0, 2, 1))
    first, second = tl.split(pairs)
    return first + second


@triton.jit
def _squared_error(blocks, codes, scale, n: tl.constexpr):
    """[n]: summed as a tree of halves, as in formats/nvfp4.py."""
    error = blocks - decode_e2m1(codes) * scale[:, None]
    total = _add_halves(error * error, n, 16)
    total = _add_halves(total, n, 8)
    total = _add_halves(total, n, 4)
    return tl.reshape(_add_halves(total, n, 2), (n,))


@triton.jit
def _error_under(blocks, bits, n: tl.constexpr):
    """Squared error [n] of blocks under scale bits [n]; NaN where those are."""
    scale = decode_encoded(bits)
    return _squared_error(blocks, encode_blocks(blocks, scale), scale, n)


@triton.jit
def _better(blocks, bits, least, other, n: tl.constexpr):
    """(bits, error) [n]: of the scale bits `other` where their error is less than `least`."""
    error = _error_under(blocks, other, n)
    better = error < least
    return tl.where(better, other, bits), tl.where(better, error, least)


@triton.jit
def _neighbour(bits, offset):
    """The e4m3 code `offset` from `bits`, within those of 2^-9 and 448."""
    return tl.minimum(tl.maximum(bits + offset, E4M3_SMALLEST_CODE), E4M3_LARGEST_CODE)


@triton.jit
def _search(blocks, first, n: tl.constexpr):
    """Scale bits [n] of the least squared error: nvfp4.CODE_OFFSETS from `first`.

    A loop at run time: unrolled, candidates overlap and take more registers than there are.
    """
    bits, least = first, _error_under(blocks, first, n)
    for i in range(NUM_LATER):
        offset = tl.where(i < 2, 2 * i - 1, i + 2)  # -1, 1, 4, 5, 6
        bits, least = _better(blocks, bits, least, _neighbour(first, offset), n)
    return bits


@triton.jit
def quantize_blocks(blocks, amax, n: tl.constexpr, block_scale: tl.constexpr):
    """Codes (int32 [n, 16]) and scale bits (int32 [n]) of fp32 blocks [n, 16] with `amax` [n].

    Codes count for nothing where the scale is NaN, and a block with a value that is no number has
    such a scale: `pack` makes them 0.
    """
    first = encode_e4m3(amax * ONE_SIXTH)
    bits = first
    if block_scale == "four_over_six":
        wide = encode_e4m3(amax * ONE_FOURTH)
        bits, _ = _better(blocks, first, _error_under(blocks, first, n), wide, n)
    if block_scale == "mse":
        bits = _search(blocks, first, n)
    return encode_blocks(blocks, decode_encoded(bits)), bits


@triton.jit
def pack(codes, bits, n: tl.constexpr):
    """Codes [n, 16] to bytes uint8 [n, 8], even elements in the low nibbles; 0 under scale bits [n]
    of NaN."""
    low, high = tl.split(tl.reshape(codes, (n, 8, 2)))
    return tl.where((bits == E4M3_NAN)[:, None], 0, low | (high << 4)).to(tl.uint8)
