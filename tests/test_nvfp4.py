"""The bytes of NVFP4: every rounding rule pinned by a literal, then against independent code."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
from torchao.prototype.mx_formats.utils import to_blocked

from arc_ao.formats import nvfp4

TIES, EVEN = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0, 2, 2, 4, 4, 6, 6]
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
FULL, FULL32 = 2688.0, np.float32(2688)  # as amax it makes the outer scale 1


def with_full_scale(block: list[float]) -> torch.Tensor:
    """[32]: a block that sets amax to 2688, then `block` padded with zeros."""
    return torch.tensor([FULL] + [0.0] * 15 + block + [0.0] * (16 - len(block)))


def nearest_even(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the nearest grid value in float64, ties to the even index, by brute force."""
    distance = np.abs(values[..., None].astype(np.float64) - grid)
    nearest = distance.min(-1, keepdims=True) == distance
    return np.where(nearest, np.arange(len(grid)) % 2, 2).argmin(-1)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(bytes, scale bits, outer) of fp32 x [M, K] by the rules of the format, in numpy."""
    amax = np.abs(x).max()
    tiny = amax < 2.0**-116
    inverse, outer = (np.float32(0), np.float32(0)) if tiny else (FULL32 / amax, amax / FULL32)
    blocks = (x * inverse).reshape(x.shape[0], -1, 16)
    wanted = np.abs(blocks).max(-1) * np.float32(1 / 6)
    bits = np.maximum(nearest_even(np.minimum(wanted, np.float32(448)), E4M3), 1)
    v = blocks * (np.float32(1) / E4M3[bits].astype(np.float32))[..., None]
    codes = nearest_even(np.minimum(np.abs(v), 6), E2M1) + 8 * np.signbit(v)
    codes = codes.reshape(x.shape[0], -1)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8), bits.astype(np.uint8), outer


def assert_same_as_reference(x: np.ndarray) -> None:
    for got, expected in zip(nvfp4.quantize(torch.from_numpy(x)), reference(x), strict=True):
        np.testing.assert_array_equal(got.numpy(), expected)


def test_ties_go_to_the_even_code_and_their_neighbours_do_not():
    """Every tie, the next float on either side, with both signs; then saturation, zeros, NaN."""
    ties = torch.tensor(TIES)
    for sign, bit in ((1, 0), (-1, 8)):
        assert nvfp4.encode_e2m1(sign * ties).tolist() == [c + bit for c in EVEN]
        for towards, shift in ((0.0, 0), (9.0, 1)):
            beside = torch.nextafter(ties, torch.tensor(towards)) * sign
            assert nvfp4.encode_e2m1(beside).tolist() == [c + shift + bit for c in range(7)]
    others = torch.tensor([6.0, 6.1, 1e30, float("inf"), -1e30, 0.0, -0.0, float("nan")])
    assert nvfp4.encode_e2m1(others).tolist() == [7, 7, 7, 7, 15, 0, 8, 0]


def test_hand_computed_block():
    """Scale 1 (0x38), all ties of both signs, the even element in the low nibble."""
    x = with_full_scale([6.0, *TIES, *[-t for t in TIES], -0.0])
    qdata, scale, outer = nvfp4.quantize(x)
    assert qdata[8:].tolist() == [0x07, 0x22, 0x44, 0x66, 0xA8, 0xCA, 0xEC, 0x8E]
    assert (qdata[0], scale.tolist(), outer) == (0x07, [0x7E, 0x38], 1.0)
    expected = [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 0]
    assert nvfp4.dequantize(qdata, scale, outer)[16:].tolist() == expected


LITERAL_BLOCKS = [
    ([], 0x01, 0x00),  # zero block: smallest scale, codes 0
    ([2.0**-9], 0x01, 0x02),  # amax / 6 below the smallest subnormal is raised to it
    ([2.0**-12], 0x01, 0x00),  # and what is too small for that vanishes
    ([6 * 2.0**-8, -3 * 2.0**-8], 0x02, 0xD7),  # subnormal scale 2^-8
    ([6 * 2.0**-6], 0x08, 0x07),  # the smallest normal
    ([6 * 1.875, 2.5 * 1.875], 0x3F, 0x57),  # times the reciprocal, where division gives 0x47
]


def test_literal_blocks():
    for block, bits, first_byte in LITERAL_BLOCKS:
        qdata, scale, _ = nvfp4.quantize(with_full_scale(block))
        assert (scale[1], qdata[8], qdata[9:].any()) == (bits, first_byte, False), block


def test_all_zero_and_vanishing_tensors_quantize_to_zero():
    """amax below 2^-116 counts as zero; 2^-116 itself does not."""
    threshold = torch.tensor(2.0**-116)
    for amax in (torch.zeros(()), torch.nextafter(threshold, torch.zeros(()))):
        qdata, scale, outer = nvfp4.quantize(amax.expand(16))
        assert (qdata.tolist(), scale.tolist(), outer) == ([0] * 8, [0x01], 0.0)
        assert not nvfp4.dequantize(qdata, scale, outer).any()
    qdata, scale, outer = nvfp4.quantize(threshold.expand(16))
    assert (qdata.tolist(), scale.tolist(), outer > 0) == ([0x77] * 8, [0x7E], True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_block_is_nan_and_alone(bad):
    """Scale 0x7f and codes 0; under a given amax the other blocks keep their bytes."""
    x = with_full_scale([1.0, bad, -3.0])
    qdata, scale, outer = nvfp4.quantize(x, amax=torch.tensor(FULL))
    assert (scale.tolist(), qdata[8:].tolist()) == ([0x7E, 0x7F], [0] * 8)
    back = nvfp4.dequantize(qdata, scale, outer)
    assert back[16:].isnan().all() and back[0] == FULL and not back[1:16].any()
    wide = nvfp4.quantize_blocks(nvfp4.to_blocks(x), method="four_over_six")
    assert wide.scale[1].isnan() and not wide.codes[1].any()
    assert nvfp4.dequantize(*nvfp4.quantize(x)).isnan().all()  # amax itself is not finite


def test_outer_scales_are_single_ieee_divisions():
    """`amax.reciprocal() * 2688` and `amax * (1/2688)` round twice and give other bits."""
    amax = torch.tensor(0.007267773151397705)
    assert nvfp4.inverse_outer_scale(amax) == 369851.9375
    assert amax.reciprocal() * FULL == 369851.96875
    amax = torch.tensor(33.0)
    assert nvfp4.outer_scale(amax).view(torch.int32) == 0x3C492492
    assert (amax * torch.tensor(1 / FULL)).view(torch.int32) == 0x3C492493
    every = torch.arange(256, dtype=torch.uint8)
    assert nvfp4.unpack(every)[2 * 0xE3 :][:2].tolist() == [0x3, 0xE]
    assert torch.equal(nvfp4.pack(nvfp4.unpack(every)), every)


def test_representable_values_quantize_to_themselves_and_fit_bf16():
    """All 126 block scales times all 16 codes, exact in bf16."""
    bits = torch.arange(1, 127, dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).expand(126, 16)
    values = nvfp4.decode_blocks(codes, nvfp4.decode_e4m3(bits))
    qdata, scale, outer = nvfp4.quantize(values)
    assert torch.equal(qdata, nvfp4.pack(codes)) and torch.equal(scale.flatten(), bits)
    assert outer == 1 and torch.equal(nvfp4.decode(qdata, scale), values)
    assert torch.equal(values.bfloat16().float(), values)


def test_row_chunks_cover_every_row_once():
    for elements, expected in ((1 << 20, [5]), (128, [2, 2, 1]), (1, [1] * 5)):
        rows = [range(5)[chunk] for chunk in nvfp4.row_chunks(torch.zeros(5, 64), elements)]
        assert [len(r) for r in rows] == expected and sum(map(list, rows), []) == list(range(5))
    assert list(nvfp4.row_chunks(torch.zeros(0, 64), 128)) == []


def test_four_over_six_literal_blocks():
    """amax/4 wins where 3/4 of amax occurs, amax/6 keeps ties."""
    blocks = torch.zeros(3, 16)
    blocks[0, :2] = torch.tensor([6.0, 4.5])  # 4 * 1.5 and 3 * 1.5
    blocks[1, 0] = 6.0  # 6 * 1 and 4 * 1.5 tie; so do all scales of blocks[2]
    codes, scale = nvfp4.quantize_blocks(blocks, method="four_over_six")
    assert scale.tolist() == [1.5, 1.0, 2.0**-9]
    assert codes[:, :2].tolist() == [[6, 5], [7, 0], [0, 0]]


def test_four_over_six_never_has_more_error_than_plain():
    x = torch.randn(64, 16, 16, generator=torch.Generator().manual_seed(0)) * 200
    plain, wide = (nvfp4.quantize_blocks(x, method=m) for m in ("amax", "four_over_six"))
    plain_error, wide_error = (nvfp4.squared_error(x, *q) for q in (plain, wide))
    assert (wide_error <= plain_error).all() and (wide_error < plain_error).float().mean() > 0.3
    _, _, outer = nvfp4.quantize(x, method="four_over_six")
    assert outer == x.abs().amax() / torch.tensor(2688.0)  # the outer scale is the same


def test_searched_scales_literal_blocks():
    """Around code c of amax/6, values that are exact under another code, and ties."""
    c = 0x38 + 2  # 1.25
    blocks = torch.zeros(len(nvfp4.CODE_OFFSETS), 16)
    for row, offset in enumerate(nvfp4.CODE_OFFSETS):
        s = nvfp4.decode_e4m3(torch.tensor(c + offset, dtype=torch.uint8))
        blocks[row, :15] = s * torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0]).repeat(3)
        blocks[row, 15] = 7.5  # amax / 6 = 1.25
    codes, scale = nvfp4.quantize_blocks(blocks, method="mse")
    by_hand = [best_by_hand(block) for block in blocks]
    assert nvfp4.encode_e4m3(scale).tolist() == by_hand and len(set(by_hand)) > 4
    assert torch.equal(codes, nvfp4.encode_blocks(blocks, scale))


def best_by_hand(block: torch.Tensor) -> int:
    """The code of least squared error in float64, the first of equals."""
    first = int(nvfp4.encode_e4m3(nvfp4.block_scale(block)))
    errors = {}
    for offset in (0, -1, 1, 4, 5, 6):
        code = min(max(first + offset, 1), 126)
        scale = float(torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
        nearest = [min(abs(abs(float(x)) - q * scale) for q in nvfp4.E2M1_VALUES) for x in block]
        errors.setdefault(code, sum(e * e for e in nearest))
    return min(errors, key=errors.get)


def test_searched_scales_of_extreme_blocks():
    """Ties keep amax/6; codes stay within 2^-9 and 448; NaN and Inf give the scale NaN."""
    blocks = torch.zeros(5, 16)
    blocks[1, 0], blocks[2, :] = 2.0**-140, 1e6  # far below, and saturated under every scale
    blocks[3, 3], blocks[4, 5] = torch.nan, -torch.inf
    codes, scale = nvfp4.quantize_blocks(blocks, method="mse")
    assert scale[:3].tolist() == [2.0**-9, 2.0**-9, 448.0] and scale[3:].isnan().all()
    assert codes[2].tolist() == [7] * 16 and not codes[[0, 1, 3, 4]].any()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 12), spread=st.integers(0, 8))
def test_a_search_never_has_more_error(seed, exponent, spread):
    """Than the scale of amax/6, which is among its candidates: block by block."""
    random = torch.Generator().manual_seed(seed)
    powers = torch.randint(0, spread + 1, (32, 16), generator=random) + exponent
    x = torch.ldexp(torch.randn(32, 16, generator=random), powers)
    plain, searched = (nvfp4.quantize_blocks(x, method=m) for m in ("amax", "mse"))
    assert (nvfp4.squared_error(x, *searched) <= nvfp4.squared_error(x, *plain)).all()


def test_a_search_gains_more_than_four_over_six():
    """On a normal distribution, summed over blocks."""
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)) * 200
    errors = [nvfp4.quantize_blocks(x, method=m) for m in nvfp4.BLOCK_SCALES]
    amax, wide, searched = (nvfp4.squared_error(x, *q).sum() for q in errors)
    assert searched < wide < amax and amax - searched > 1.5 * (amax - wide)


def test_swizzled_offsets():
    """[200, 5] makes 2 x 2 tiles of 512 bytes."""
    offsets = {(0, 3): 3, (1, 0): 16, (32, 0): 4, (33, 1): 21, (127, 3): 511, (0, 4): 512}
    for (m, b), offset in {**offsets, (128, 0): 1024, (199, 4): 1656}.items():
        scale = torch.zeros(200, 5, dtype=torch.uint8)
        scale[m, b] = 1
        assert nvfp4.swizzle_scales(scale).nonzero().tolist() == [[offset]]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 200])  # ragged, exact, one over
@pytest.mark.parametrize("cols", [1, 4, 7])
def test_swizzle_round_trip_and_torchao(rows, cols):
    scale = torch.arange(rows * cols).view(rows, cols).to(torch.uint8)
    swizzled = nvfp4.swizzle_scales(scale)
    assert torch.equal(nvfp4.unswizzle_scales(swizzled, rows, cols), scale)
    assert torch.equal(swizzled, to_blocked(scale).flatten())


def test_same_bytes_as_torchao():
    """Away from subnormal scales, which torchao does not use, and under our outer scale."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    qdata, scale, _ = nvfp4.quantize(x)
    theirs, codes = nvfp4_quantize(x * nvfp4.inverse_outer_scale(x.abs().amax()))
    assert torch.equal(qdata, codes)
    assert torch.equal(scale, theirs.view(torch.uint8).view_as(scale))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_grid = st.sampled_from([t * s for t in [*TIES, 6.0] for s in (1, -1, 0.5, 1 / 3, 448, 2**-9)])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(floats, near_grid), min_size=32, max_size=32), st.booleans())
def test_same_bytes_as_numpy_on_any_floats(values, full):
    """Bit equality with a brute-force reference, subnormal inputs and huge ranges included."""
    x = np.array(values, dtype=np.float32).reshape(2, 16)
    if full:  # an outer scale of 1 keeps the ties of `near_grid` ties
        x = np.append(np.full((1, 16), FULL, np.float32), np.clip(x, -FULL, FULL), axis=0)
    assert_same_as_reference(x)


def test_same_bytes_as_numpy_on_random_tensors():
    rng = np.random.default_rng(0)
    for spread in (0.0, 2.0, 8.0):  # normal, realistic, huge range
        x = rng.standard_normal((32, 256)) * np.exp(spread * rng.standard_normal((32, 256)))
        assert_same_as_reference(x.astype(np.float32))
