"""arc::search_block_scales, arc::encode_blocks, arc::block_residuals: meaning, and every level."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import block_residuals, encode_blocks, native, search_block_scales
from arc_ao.ops.encode_blocks import block_residuals_eager, encode_blocks_eager
from arc_ao.ops.search_block_scales import search_block_scales_eager

CHANNELS = 80  # 5 blocks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 37, channels: int = CHANNELS) -> Tensor:
    """fp32 under the outer scale: rows from below the smallest block scale to the largest."""
    values = torch.randn(rows, channels, generator=generator())
    return (values * torch.logspace(-5, 3, rows).unsqueeze(1)).clamp(-2688, 2688)


def hard_rows() -> Tensor:
    """[*, 80]: ties, zeros of both signs, subnormals, beyond the largest scale, NaN and Inf."""
    steps = torch.arange(CHANNELS) % 33 * 0.25 * torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2)
    rows = [steps, steps * 300, steps * 2.0**-9, steps * 2.0**-140, torch.zeros(CHANNELS)]
    rows += [torch.full((CHANNELS,), v) for v in (-0.0, 2688.0, -1e5, 3e38, 2.0**-10, 1.1e-3)]
    for special in (math.nan, math.inf, -math.inf):
        row = torch.randn(CHANNELS, generator=generator(1))
        row[37] = special
        rows.append(row)
    return torch.stack(rows)


IMPORTANCES = {
    "equal": None,
    "weighted": torch.rand(CHANNELS, generator=generator(2)) ** 4,
    "zeros": torch.rand(CHANNELS, generator=generator(3)).round(),
    "nothing": torch.zeros(CHANNELS),
    "not finite": torch.ones(CHANNELS).index_fill_(0, torch.tensor([3]), math.inf)
    + torch.zeros(CHANNELS).index_fill_(0, torch.tensor([20]), math.nan),
}


def same(mine: Tensor, meaning: Tensor) -> bool:
    """In every bit, those of NaN excepted."""
    agree = mine.view(torch.uint8) == meaning.view(torch.uint8)
    if mine.dtype == torch.float32:
        agree = agree.unflatten(-1, (-1, 4)).all(-1) | (mine.isnan() & meaning.isnan())
    return mine.shape == meaning.shape and mine.dtype == meaning.dtype and bool(agree.all())


def assert_meaning(values: Tensor, importance: Tensor | None) -> None:
    scale = search_block_scales(values, importance)
    assert same(scale, search_block_scales_eager(values, importance))
    assert same(encode_blocks(values, scale), encode_blocks_eager(values, scale))
    assert same(block_residuals(values, scale), block_residuals_eager(values, scale))


@pytest.mark.parametrize("importance", IMPORTANCES.values(), ids=IMPORTANCES)
@pytest.mark.parametrize("values", [weight(), hard_rows()], ids=["random", "hard"])
def test_bits(level, values, importance):
    assert_meaning(values, importance)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("channels", [16, 256, 272])
def test_ragged_rows(level, rows, channels):
    assert_meaning(weight(rows, channels), torch.rand(channels, generator=generator()))


@pytest.mark.parametrize("scale", [0x00, 0x01, 0x38, 0x7E, 0x7F])
def test_any_scale_may_be_given(level, scale):
    """Also one that the search does not choose: 0, 2^-9, 1, 448 and NaN."""
    values = torch.cat([weight(), hard_rows()])
    scales = torch.full((len(values), CHANNELS // 16), scale, dtype=torch.uint8)
    assert same(encode_blocks(values, scales), encode_blocks_eager(values, scales))
    assert same(block_residuals(values, scales), block_residuals_eager(values, scales))


def test_any_strides_and_threads_give_the_same_bits(level):
    values = weight(rows=600)
    importance = torch.rand(2 * CHANNELS, generator=generator())[::2]
    scale = search_block_scales(values, importance)
    wide = torch.cat([values, values], 1)[:, :CHANNELS]
    assert torch.equal(search_block_scales(wide, importance.contiguous()), scale)
    columns, scales = values.t().contiguous().t(), scale.t().contiguous().t()
    qdata, residual = encode_blocks(columns, scales), block_residuals(wide, scales)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(search_block_scales(values, importance), scale)
        assert torch.equal(encode_blocks(values, scale), qdata)
        assert torch.equal(block_residuals(values, scale), residual)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(qdata, encode_blocks_eager(values, scale))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    exponent=st.integers(-140, 125),
    spread=st.integers(0, 20),
    weighted=st.booleans(),
)
def test_bits_of_anything(seed, rows, exponent, spread, weighted):
    """Random magnitudes over random ranges, at every level."""
    random = generator(seed)
    powers = torch.randint(0, spread + 1, (rows, 32), generator=random) + exponent
    values = torch.ldexp(torch.randn(rows, 32, generator=random), powers)
    importance = torch.rand(32, generator=random) ** 8 if weighted else None
    for name in native.available_levels():
        with native.capped_at(name):
            assert_meaning(values, importance)


def test_codes_and_residual_are_the_formats_own():
    values = weight()
    scale = search_block_scales(values, None)
    decoded = nvfp4.decode(encode_blocks(values, scale), scale)
    residual = block_residuals(values, scale)
    assert torch.equal(residual, values - decoded)
    assert torch.equal(values - residual, decoded)  # exactly


def test_blocks_that_are_not_finite_get_the_scale_nan():
    values = hard_rows()
    scale = search_block_scales(values, None)
    finite = values.isfinite().unflatten(1, (-1, 16)).all(-1)
    assert torch.equal(scale == nvfp4.E4M3_NAN, ~finite) and not finite.all()


@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(rows):
    values, importance = weight(rows), IMPORTANCES["weighted"]
    scale = search_block_scales(values, importance)
    torch.library.opcheck(search_block_scales, (values, importance))
    torch.library.opcheck(search_block_scales, (values, None))
    torch.library.opcheck(encode_blocks, (values, scale))
    torch.library.opcheck(block_residuals, (values, scale))


FLAT = "values must be fp32 \\[N, K\\] with K a multiple of 16, got "


def test_no_columns():
    """A weight without residual blocks, of as many rows as a size can say."""
    values, scale = torch.empty(3, 0), torch.empty(3, 0, dtype=torch.uint8)
    assert search_block_scales(values, None).shape == (3, 0)
    for n in (3, 1 << 62):
        values, scale = torch.empty(n, 0), torch.empty(n, 0, dtype=torch.uint8)
        assert encode_blocks(values, scale).shape == (n, 0)
        assert block_residuals(values, scale).shape == (n, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 24), FLAT + r"fp32 \[2, 24\]"),
        (torch.zeros(32), FLAT + r"fp32 \[32\]"),
        (torch.zeros(2, 2, 16), FLAT + r"fp32 \[2, 2, 16\]"),
        (torch.zeros(2, 32, dtype=torch.bfloat16), FLAT + r"bf16 \[2, 32\]"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_that_do_not_fit_are_refused(values, message, device):
    """The fake refuses what the operators refuse."""
    values, scale = values.to(device), torch.zeros(2, 2, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="search_block_scales: " + message):
        search_block_scales(values, None)
    with pytest.raises(RuntimeError, match="encode_blocks: " + message):
        encode_blocks(values, scale)
    with pytest.raises(RuntimeError, match="block_residuals: " + message):
        block_residuals(values, scale)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_importance_and_scales_that_do_not_fit_are_refused(device):
    values = torch.zeros(2, 32, device=device)
    for importance in (torch.ones(16), torch.ones(1, 32), torch.ones(32, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"importance must be fp32 \[32\], got "):
            search_block_scales(values, importance.to(device))
    for scale in (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.uint8)):
        for operator in (encode_blocks, block_residuals):
            with pytest.raises(RuntimeError, match=r"scale must be uint8 \[2, 2\], got "):
                operator(values, scale.to(device))
