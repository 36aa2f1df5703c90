"""Decoding e2m1 codes to fp16 or bf16 two at a time, for tensor cores of GPUs from sm_80 on.

Codes c and c + 4 of a 32-bit word lie 16 bits apart, so that one shift and one mask bring both into
the exponent and mantissa of a pair of numbers, and one product gives both their scale. Triton has
no such pairs; the pair is PTX (`pairs_of`), and Triton gets its halves, which it stores as they
were. Its interpreter, which runs no assembly, takes the codes one by one (`assembly` False).
"""

import triton
import triton.language as tl

from arc_ao.ops.cuda.triton_nvfp4 import decode_e4m3, small_e2m1

SIGN_BIT = 15  # of fp16 and bf16
F16_BIT = 9  # lowest bit of an e2m1 code in fp16: its two exponent bits and one of the mantissa
BF16_BIT = 6
TWO_POW_7 = tl.constexpr(2.0**7)
TWO_POW_112 = tl.constexpr(2.0**112)
TWO_POW_119 = tl.constexpr(2.0**119)


def pairs_of(kind: str, bit: int) -> str:
    """PTX from a word ($8) and an fp32 scale ($9) to the word's eight values times it ($0 to $7).

    Exponent and mantissa at `bit` leave the value times 2^-14 in fp16 and 2^-126 in bf16, with 0.5
    as a subnormal. sm_80 multiplies bf16 only where it also adds: -0, which changes nothing.
    """
    lines = [f"{{ .reg .b32 s, x, y, z; cvt.rn.{kind}x2.f32 s, $9, $9; mov.b32 z, 0x80008000;"]
    for code in range(4):
        lines += [
            f"{_shift('x', bit - 4 * code)} and.b32 x, x, {0x00070007 << bit:#x};",
            f"{_shift('y', SIGN_BIT - 3 - 4 * code)} and.b32 y, y, 0x80008000;",
            f"or.b32 x, x, y; fma.rn.{kind}x2 x, x, s, z; mov.b32 {{${code}, ${code + 4}}}, x;",
        ]
    return " ".join([*lines, "}"])


def _shift(register: str, left: int) -> str:
    return f"shl.b32 {register}, $8, {left};" if left >= 0 else f"shr.u32 {register}, $8, {-left};"


F16_PAIRS = tl.constexpr(pairs_of("f16", F16_BIT))
BF16_PAIRS = tl.constexpr(pairs_of("bf16", BF16_BIT))
PAIRS_REGISTERS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,f")


@triton.jit
def word_scale(bits, dtype: tl.constexpr):
    """fp32 of e4m3 bits (uint8), times what makes `decode_word` give q * s * 2^-7."""
    scale = decode_e4m3(bits.to(tl.int32))
    return scale * (TWO_POW_7 if dtype == tl.float16 else TWO_POW_119)


@triton.jit
def decode_word(word, scale, dtype: tl.constexpr, assembly: tl.constexpr):
    """`dtype` q * s * 2^-7 of the codes 0..7 of int32 words: eight tensors, all exact."""
    if assembly and dtype == tl.float16:
        values = tl.inline_asm_elementwise(
            F16_PAIRS, PAIRS_REGISTERS, [word, scale],
            (tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=1,
        )  # fmt: skip
    elif assembly:
        values = tl.inline_asm_elementwise(
            BF16_PAIRS, PAIRS_REGISTERS, [word, scale],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        if dtype == tl.float16:
            scale *= TWO_POW_112
        values = ()
        for position in tl.static_range(8):
            values += ((small_e2m1(word, position) * scale).to(dtype),)
    return values


@triton.jit
def decode_tile(
    block, scale, m: tl.constexpr, n: tl.constexpr, dtype: tl.constexpr, assembly: tl.constexpr
):
    """`dtype` [m, 16 n] of int64 blocks [m, n] and what `word_scale` gives for them.

    Channel c of a block lies at its place c & 8, c & 2, c & 1, c & 4, from the highest bit to the
    lowest: pairs stay pairs, and the values of a block stay with the thread that holds it.
    """
    x = decode_word(block.to(tl.int32), scale, dtype, assembly)
    y = decode_word((block >> 32).to(tl.int32), scale, dtype, assembly)
    first = tl.join(
        tl.join(tl.join(x[0], y[0]), tl.join(x[2], y[2])),
        tl.join(tl.join(x[1], y[1]), tl.join(x[3], y[3])),
    )
    second = tl.join(
        tl.join(tl.join(x[4], y[4]), tl.join(x[6], y[6])),
        tl.join(tl.join(x[5], y[5]), tl.join(x[7], y[7])),
    )
    return tl.reshape(tl.join(first, second), (m, 16 * n))


@triton.jit
def channel_at(place):
    """The channel of a block that `decode_tile` puts at `place` (0..15)."""
    return (place & 8) | ((place & 6) >> 1) | ((place & 1) << 2)
