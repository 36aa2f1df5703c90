"""Products of e2m1 codes in integers, four at a time, on GPUs from sm_80 on.

Twice an e2m1 value is an integer up to 12, so the sum of a block's 16 products is an exact int32
(in quarters). One instruction looks up four codes in a table of 8 bytes (`permute`), one multiplies
four pairs of bytes and adds them up (`dot4`). Both are written twice: as PTX, and spelled out for
Triton's interpreter, which runs no assembly (`assembly` False); the second is also what a GPU
checks the first against.
"""

import triton
import triton.language as tl

# Bytes of |2q| for the codes 0..7: 0 1 2 3 4 6 8 12. Low word: codes 0..3, high word: 4..7.
TWICE_LOW = tl.constexpr(0x06040200)  # 2 |2q|
TWICE_HIGH = tl.constexpr(0x18100C08)
SHIFTED_LOW = tl.constexpr(0x090A0B0C)  # 12 - |2q|
SHIFTED_HIGH = tl.constexpr(0x00040608)
CENTRED_LOW = tl.constexpr(0x7D7E7F80)  # 128 - |2q|
CENTRED_HIGH = tl.constexpr(0x74787A7C)
SHIFT = tl.constexpr(12)
SIGN_BITS = tl.constexpr(-0x7F7F7F80)  # 0x80 in every byte
PERMUTE = tl.constexpr("prmt.b32 $0, $1, $2, $3;")
DOT4 = tl.constexpr("dp4a.u32.s32 $0, $1, $2, $3;")
# No lane has a 31st one below it, but the compiler does not go by that.
HOLD = tl.constexpr("{ .reg .b32 x; mov.u32 x, %lanemask_lt; shr.s32 x, x, 31; or.b32 $0, $1, x; }")
ONES = tl.constexpr(0x01010101)
MAGNITUDES = tl.constexpr(0x77777777)  # of eight codes


@triton.jit
def permute(low, high, selector, assembly: tl.constexpr):
    """int32 of four of the eight bytes in int32 `low` and `high` (PTX `prmt`).

    Nibble i of `selector` makes byte i: bits 0..2 say which byte it is, bit 3 puts that byte's own
    sign into all of its bits. Nibbles 4..7 are not read.
    """
    if assembly:
        result = tl.inline_asm_elementwise(
            PERMUTE, "=r,r,r,r", [low, high, selector], tl.int32, True, 1
        )
    else:
        result = selector & 0
        for i in tl.static_range(4):
            place = selector >> 4 * i
            word = tl.where((place & 4) != 0, high, low)
            byte = word >> 8 * (place & 3)
            sign = -((byte >> 7) & 1)
            result |= (tl.where((place & 8) != 0, sign, byte) & 0xFF) << 8 * i
    return result


@triton.jit
def hold(constant: tl.constexpr, assembly: tl.constexpr):
    """The constant in a register: one that the compiler knows it would move there again and again,
    before each `permute` (which takes one constant as it is, not two)."""
    if assembly:
        result = tl.inline_asm_elementwise(HOLD, "=r,r", [constant], tl.int32, True, 1)
    else:
        result = constant
    return result


@triton.jit
def dot4(unsigned, signed, total, assembly: tl.constexpr):
    """int32 total + the sum of four products of a byte 0..255 and one -128..127 (PTX `dp4a`)."""
    if assembly:
        result = tl.inline_asm_elementwise(
            DOT4, "=r,r,r,r", [unsigned, signed, total], tl.int32, True, 1
        )
    else:
        result = total
        for i in tl.static_range(4):
            result += ((unsigned >> 8 * i) & 0xFF) * (signed << (24 - 8 * i) >> 24)
    return result


@triton.jit
def shifted_bytes(word, twice, shifted, assembly: tl.constexpr):
    """2q + 12 of the codes 0..3 of int32 words, as bytes 0..24: what a weight becomes.

    The first table gives 0 for a negative code, whose sign bit asks for the sign of a byte below
    128; so their sum is 12 + |2q| or 12 - |2q|. No byte carries into the next.
    """
    twice = permute(twice, TWICE_HIGH, word, assembly)
    return twice + permute(shifted, SHIFTED_HIGH, word & MAGNITUDES, assembly)


@triton.jit
def signed_bytes(word, assembly: tl.constexpr):
    """2q of the codes 0..3 of int32 words, as bytes -12..12: what an activation becomes."""
    twice = permute(TWICE_LOW, TWICE_HIGH, word, assembly)
    centred = permute(CENTRED_LOW, CENTRED_HIGH, word & MAGNITUDES, assembly)
    return (twice + centred) ^ SIGN_BITS


@triton.jit
def unshift(first, second, third, fourth, total, assembly: tl.constexpr):
    """int32 total less what the shift of the weight's bytes adds to a product with a block."""
    sum_of_codes = dot4(ONES, first, first & 0, assembly)
    sum_of_codes = dot4(ONES, second, sum_of_codes, assembly)
    sum_of_codes = dot4(ONES, third, sum_of_codes, assembly)
    sum_of_codes = dot4(ONES, fourth, sum_of_codes, assembly)
    return total - SHIFT * sum_of_codes
