"""The kernels' own PTX computes what it is written for: every code, every scale, on a CPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels for NVIDIA GPUs are written in triton")

from ptx_model import WORD, halves, run  # noqa: E402

from arc_ao.formats import nvfp4  # noqa: E402
from arc_ao.ops.cuda import triton_bytes as bytes_  # noqa: E402
from arc_ao.ops.cuda import triton_halves  # noqa: E402


def words() -> Tensor:
    """Words that hold every code at every place, beside every other code."""
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(16) * 0x11111111
    return torch.cat([same, torch.randint(1 << 32, (1 << 12,), generator=generator)])


def codes(word: Tensor, count: int) -> Tensor:
    """The lowest codes [..., count] of words."""
    return torch.stack([word >> 4 * i & 15 for i in range(count)], -1)


def values(word: Tensor, count: int) -> Tensor:
    """What the lowest codes stand for."""
    return nvfp4.decode_e2m1(codes(word, count).to(torch.uint8)).double()


def permute(low: int, high: int, selector: Tensor) -> Tensor:
    return run(bytes_.PERMUTE.value, torch.tensor(low), torch.tensor(high), selector, outputs=1)[0]


def lookup(word: Tensor, low: int, high: int) -> Tensor:
    """The sum of tables that shifted_bytes and signed_bytes are made of."""
    twice = permute(bytes_.TWICE_LOW.value, bytes_.TWICE_HIGH.value, word)
    return twice + permute(low, high, word & bytes_.MAGNITUDES.value)


def test_tables_give_shifted_and_signed_bytes_without_carries():
    """Twice the value of each of four codes, plus 12 for a weight, as it is for an activation."""
    word = words()
    twice = (2 * values(word, 4)).long()
    shifted = lookup(word, bytes_.SHIFTED_LOW.value, bytes_.SHIFTED_HIGH.value)
    assert torch.equal(shifted, pack(twice + bytes_.SHIFT.value))
    centred = lookup(word, bytes_.CENTRED_LOW.value, bytes_.CENTRED_HIGH.value)
    assert torch.equal(centred ^ (bytes_.SIGN_BITS.value & WORD), pack(twice))


def pack(four: Tensor) -> Tensor:
    """Words of four bytes [..., 4]."""
    return sum((four[..., i] & 0xFF) << 8 * i for i in range(4))


def test_a_block_is_one_exact_sum():
    """Products by dp4a, less what the shift adds, are four times the product of the values."""
    word, other = words().repeat(2), torch.cat([words(), words().flip(0)])
    shifted = lookup(word, bytes_.SHIFTED_LOW.value, bytes_.SHIFTED_HIGH.value)
    other_bytes = pack((2 * values(other, 4)).long())
    (ones,) = run(
        bytes_.DOT4.value, torch.tensor(bytes_.ONES.value), other_bytes, word * 0, outputs=1
    )
    start = (0x4B400000 - bytes_.SHIFT.value * ((ones ^ 1 << 31) - (1 << 31))) & WORD
    (total,) = run(bytes_.DOT4.value, shifted, other_bytes, start, outputs=1)
    exact = 4 * (values(word, 4) * values(other, 4)).sum(-1)
    as_float = total.to(torch.int32).view(torch.float32) - 1.5 * 2**23
    assert torch.equal(as_float.double(), exact) and exact.abs().max() == 576


def test_a_held_constant_is_the_constant():
    constant = torch.tensor(bytes_.TWICE_LOW.value)
    assert run(bytes_.HOLD.value, constant, outputs=1) == [constant]


@pytest.mark.parametrize(
    "assembly, dtype, factor",
    [
        (triton_halves.F16_PAIRS, torch.float16, triton_halves.TWO_POW_7),
        (triton_halves.BF16_PAIRS, torch.bfloat16, triton_halves.TWO_POW_119),
    ],
)
def test_pairs_are_exact_products_with_every_scale(assembly, dtype, factor):
    """q * s * 2^-7 of all codes and all e4m3 scales; NaN where the scale is NaN."""
    bits = torch.arange(nvfp4.E4M3_NAN + 1, dtype=torch.uint8)
    scale = nvfp4.decode_e4m3(bits)
    register = (scale * factor.value).view(torch.int32).long() & WORD
    word = words()[:272, None]
    out = run(assembly.value, word, register, outputs=8)
    got = torch.stack([halves(dtype, r)[..., 0] for r in out], -1).double()
    exact = values(word, 8) * scale.double()[:, None] * 2.0**-7
    torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)
    assert got[:, -1].isnan().all() and got[:, :-1].isfinite().all()
