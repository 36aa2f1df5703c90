"""Bytes that are no block scales, NaN's and those with a sign, mean NaN everywhere."""

import pytest
import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import block_residuals, encode_blocks, native, nvfp4_gemm, nvfp4_weight_only_gemm
from arc_ao.ops.encode_blocks import block_residuals_eager, encode_blocks_eager
from arc_ao.ops.layout import swizzle, to_panels
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager

BYTES = torch.arange(256).to(torch.uint8)
VALID = BYTES < 0x7F
EMPTY = torch.zeros(0, dtype=torch.int32)
ONE = torch.ones(1)


def test_bytes_decode_to_e4m3_or_to_nan():
    """Against PyTorch's float8_e4m3fn for 0x00 to 0x7e."""
    value = nvfp4.decode_e4m3(BYTES)
    assert torch.equal(value[VALID], BYTES[VALID].view(torch.float8_e4m3fn).float())
    assert value[~VALID].isnan().all() and VALID.sum() == 127


def weight() -> tuple[Tensor, Tensor]:
    """256 rows of three blocks of ones; the middle one's scale is the row's number."""
    codes = torch.full((256, 24), 0x22, dtype=torch.uint8)
    scale = torch.full((256, 3), 0x38, dtype=torch.uint8)
    scale[:, 1] = BYTES
    return codes, scale


def activations(rows: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 24), 0x22, dtype=torch.uint8), torch.full((rows, 3), 0x38).byte()


def expected() -> Tensor:
    """[256]: 16 ones under scale 1, twice, and 16 under the byte's."""
    return 32 + 16 * torch.where(VALID, nvfp4.decode_e4m3(BYTES), torch.nan)


def assert_same(found: Tensor, meant: Tensor) -> None:
    assert torch.equal(found.isnan(), meant.isnan())
    torch.testing.assert_close(found.nan_to_num(0), meant.nan_to_num(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 8, 40, 130])
@pytest.mark.parametrize("layout", ["plain", "panels", "swizzled"])
def test_a_weights_byte_means_the_same_at_every_level(level, layout, rows):
    a, b = activations(rows), weight()
    a = swizzle(*a) if layout == "swizzled" else a
    b = {"plain": lambda *b: b, "panels": to_panels, "swizzled": swizzle}[layout](*b)
    arguments = (*a, ONE, *b, ONE, None, torch.float32, None, 0, layout)
    for operator in (nvfp4_gemm, nvfp4_gemm_eager):
        assert_same(operator(*arguments), expected().expand(rows, 256))


@pytest.mark.parametrize("columns", [1, 16, 50])
def test_an_activations_byte_means_the_same_at_every_level(level, columns):
    """Their scales are decoded one by one, or sixteen at a time."""
    a, b = weight(), activations(columns)
    for operator in (nvfp4_gemm, nvfp4_gemm_eager):
        y = operator(*a, ONE, *b, ONE, None, torch.float32)
        assert_same(y, expected().unsqueeze(1).expand(256, columns))


def test_a_long_rows_byte_means_the_same_at_every_level(level):
    a_scale = BYTES.repeat_interleave(20).view(256, 20).contiguous()
    a, b = torch.full((256, 160), 0x22).byte(), torch.full((16, 160), 0x22).byte()
    y = nvfp4_gemm(a, a_scale, ONE, b, torch.full((16, 20), 0x38).byte(), ONE, None, torch.float32)
    assert_same(y, 320 * nvfp4.decode_e4m3(BYTES).unsqueeze(1).expand(256, 16))


def test_a_byte_means_the_same_for_16_bit_activations():
    y = nvfp4_weight_only_gemm(torch.ones(2, 48), *weight(), ONE, None, EMPTY)
    assert_same(y, expected().expand(2, 256))


@pytest.mark.skipif(native.load() is None, reason="no native library")
def test_encoding_under_any_byte_is_the_same_at_every_level(level):
    values = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
    scale = weight()[1]
    assert torch.equal(encode_blocks(values, scale), encode_blocks_eager(values, scale))
    left, meant = block_residuals(values, scale), block_residuals_eager(values, scale)
    assert torch.equal(left.isnan(), meant.isnan())
    assert torch.equal(left.nan_to_num(0), meant.nan_to_num(0))
    assert left[~VALID][:, 16:32].isnan().all() and left[:, :16].isfinite().all()
