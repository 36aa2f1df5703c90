"""The bytes of MXFP4: scales and codes pinned by literals, then against torchao's own."""

import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from arc_ao.formats import mxfp4

NAN, INF = float("nan"), float("inf")


def block(*values: float) -> torch.Tensor:
    """[32]: the values, then zeros."""
    return torch.tensor([*values, *[0.0] * (32 - len(values))])


@pytest.mark.parametrize(
    "amax, bits",
    [
        (1.0, 125),  # floor(log2 1) - 2 = -2
        (4.0, 127),
        (7.99, 127),  # still exponent 2: 7.99 saturates at 6
        (8.0, 128),
        (0.999, 124),
        (0.0, 0),  # no exponent: the least scale
        (2.0**-126, 0),  # below the range: clamped
        (3.4e38, 252),
        (NAN, 255),
        (INF, 255),
    ],
)
def test_the_scale_is_the_exponent_of_amax_less_two(amax, bits):
    qdata, scale = mxfp4.quantize(block(0.0, -amax))
    assert scale.tolist() == [bits]
    if amax != amax or amax == INF:
        assert mxfp4.dequantize(qdata, scale).isnan().all() and not qdata.any()


def test_bytes_of_a_block_by_hand():
    """amax 7 gives scale 1: 7 saturates to 6, ties go to the even code, the low nibble is first."""
    x = block(7.0, -0.25, 0.75, 1.25, -2.5, 3.5, 5.0, -0.0)
    qdata, scale = mxfp4.quantize(x)
    # codes 7, 8 (-0), 2 (1.0), 2 (1.0), 12 (-2), 6 (4), 6 (4), 8 (-0)
    assert scale.tolist() == [127]
    assert qdata[:5].tolist() == [0x87, 0x22, 0x6C, 0x86, 0x00]
    expected = block(6.0, 0.0, 1.0, 1.0, -2.0, 4.0, 4.0)
    assert torch.equal(mxfp4.dequantize(qdata, scale), expected)


def test_scales_are_powers_of_two_over_the_whole_range():
    """Decoding and encoding are inverse for every byte; a scaled tensor has the same codes."""
    bits = torch.arange(255, dtype=torch.uint8)
    values = mxfp4.decode_e8m0(bits)
    assert values[127] == 1.0 and values[0] == 2.0**-127 and values[254] == 2.0**127
    assert torch.equal(mxfp4.encode_e8m0(values), bits)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    (codes, scale), (scaled_codes, scaled) = mxfp4.quantize(x), mxfp4.quantize(x * 2.0**-20)
    assert torch.equal(codes, scaled_codes) and torch.equal(scale - 20, scaled)


@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 96), (2, 50)])  # one block; leading; ragged
def test_equals_torchaos_floor_mode(shape):
    """torchao's MX quantization with the OCP's scale rule gives the same bits."""
    generator = torch.Generator().manual_seed(1)
    magnitude = torch.exp2(torch.randint(-30, 30, (*shape[:-1], 1), generator=generator))
    x = torch.randn(shape, generator=generator) * magnitude
    qdata, scale = mxfp4.quantize(x)
    padded = mxfp4.to_blocks(x).flatten(-2).contiguous()
    mode = ScaleCalculationMode.FLOOR
    their_scale, theirs = to_mx(padded, torch.float4_e2m1fn_x2, 32, mode)
    assert torch.equal(scale, their_scale.view(torch.uint8))
    assert torch.equal(qdata, theirs.view(torch.uint8))


def test_empty_and_constant_tensors():
    assert mxfp4.quantize(torch.empty(0, 64))[0].shape == (0, 32)
    constant = torch.full((2, 32), 3.0)
    assert torch.equal(mxfp4.dequantize(*mxfp4.quantize(constant)), constant)
