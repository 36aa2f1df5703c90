"""Block Hadamard rotations: orthonormal, exact products, and what they do to two formats."""

import pytest
import scipy.linalg
import torch

from arc_ao.formats import mxfp4, nvfp4
from arc_ao.formats.rotation import SIZES, hadamard_signs, rotate


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_signs_are_sylvesters_hadamard_matrix(size):
    signs = hadamard_signs(size)
    assert signs.dtype == torch.int8
    assert torch.equal(signs, torch.from_numpy(scipy.linalg.hadamard(size)).to(torch.int8))
    product = signs.double() @ signs.double().t()
    assert torch.equal(product, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 8, 24, 256])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="rotation: expected one of"):
        hadamard_signs(size)


@pytest.mark.parametrize("size", SIZES)
def test_rotating_both_operands_keeps_the_product(size):
    """(x H)(w H)^T = x w^T; twice is the identity; blocks do not mix."""
    x, w, signs = randn(3, 5, 256), randn(7, 256, seed=1), hadamard_signs(size)
    product = rotate(x, signs) @ rotate(w, signs).t()
    torch.testing.assert_close(product, x @ w.t(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(rotate(x, signs), signs), x, atol=1e-5, rtol=1e-5)
    alone = torch.zeros(256)
    alone[size] = 1.0
    rotated = rotate(alone, signs)
    assert rotated[:size].count_nonzero() == rotated[2 * size :].count_nonzero() == 0
    torch.testing.assert_close(rotated[size : 2 * size].abs(), torch.full((size,), size**-0.5))


def relative_error(rounded: torch.Tensor, x: torch.Tensor) -> float:
    return ((rounded - x).square().sum() / x.square().sum()).item()


def test_rotation_hurts_nvfp4_and_helps_mxfp4_on_heavy_tails():
    """Rounding errors of Student's t channels with a few large ones, as activations have them."""
    generator = torch.Generator().manual_seed(3)
    x = randn(512, 256) / (torch.rand(512, 256, generator=generator) + 0.1)
    x[:, ::37] *= 8
    rotated = rotate(x, hadamard_signs(32))
    nv = [relative_error(nvfp4.dequantize(*nvfp4.quantize(t)), t) for t in (x, rotated)]
    mx = [relative_error(mxfp4.dequantize(*mxfp4.quantize(t)), t) for t in (x, rotated)]
    assert nv[1] > 1.1 * nv[0] and mx[1] < 0.9 * mx[0]
