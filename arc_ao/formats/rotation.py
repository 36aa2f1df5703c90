"""Block Hadamard rotation (MR-GPTQ, arXiv 2509.23202): y = (x H) (w H)^T, since H H^T = 1.

H is block-diagonal with orthonormal Hadamard matrices of 16, 32, 64 or 128 channels; weights are
rotated once, inputs at run time. Rotating spreads an outlier over its block. That HURTS plain NVFP4
(blocks of 16 isolate outliers already, and the rotated values are less concentrated) and helps
MXFP4, whose blocks of 32 share a power of two; `benchmarks/layers/methods.py` shows both.

A rotation travels as the signs of its matrix (int8 [h, h]), which any backend can read.
"""

import torch
from torch import Tensor

SIZES = (16, 32, 64, 128)


def hadamard_signs(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, int8 [size, size] of +1 and -1; symmetric.

    Raises:
        ValueError: a size that is not one of SIZES.
    """
    if size not in SIZES:
        raise ValueError(f"rotation: expected one of {SIZES}, got {size!r}")
    signs = torch.ones(1, 1, dtype=torch.int8)
    while signs.shape[0] < size:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """x [..., K] with every `size` channels times the orthonormal matrix, in fp32.

    K must be a multiple of `size`. Since Hadamard matrices are symmetric this is its own inverse.
    """
    size = signs.shape[0]
    blocks = x.float().reshape(-1, size)
    return (blocks @ signs.float() * size**-0.5).reshape(x.shape)
