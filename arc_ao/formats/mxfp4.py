"""MXFP4 in eager PyTorch: the OCP Microscaling format, for comparison with NVFP4 (no kernels).

A tensor [..., K] is cut into blocks of 32 along K:

    x[..., k] ~ q[..., k] * 2^e[..., k // 32]          q in e2m1, e in E8M0 (a byte, e + 127)
    e = floor(log2(amax_block)) - 2                    2 is the exponent of e2m1's largest value, 6
    q = e2m1(x / 2^e)                                  nearest, ties to even code, saturating at 6

so the block's largest value lands in [4, 8), and what exceeds 6 saturates (OCP Microscaling Formats
1.0, section 6.3). There is no outer scale. Codes, their packing and the interface are those of
formats/nvfp4.py. A block of zeros has the least scale 2^-127; one that holds NaN or Inf has the
scale NaN (0xff) and codes 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.formats.nvfp4 import QuantizedBlocks, decode_e2m1, encode_e2m1, pack, unpack

BLOCK_SIZE = 32
E2M1_MAX_EXPONENT = 2
EXPONENT_RANGE = (-127, 127)
E8M0_NAN = 0xFF


def to_blocks(x: Tensor) -> Tensor:
    """View [..., K] as blocks [..., ceil(K/32), 32]; a ragged K is padded with zeros."""
    padding = -x.shape[-1] % BLOCK_SIZE
    if padding:
        x = F.pad(x, (0, padding))
    return x.unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/32, 32]


def block_scale(blocks: Tensor) -> Tensor:
    """Scale 2^e (fp32 [..., K/32]) of fp32 blocks; NaN where a block is not finite."""
    amax = blocks.abs().amax(-1)
    exponent = torch.frexp(amax).exponent - 1 - E2M1_MAX_EXPONENT  # frexp: mantissa in [1/2, 1)
    exponent = torch.where(amax == 0, EXPONENT_RANGE[0], exponent).clamp_(*EXPONENT_RANGE)
    scale = decode_e8m0((exponent + 127).to(torch.uint8))
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def decode_e8m0(bits: Tensor) -> Tensor:
    """fp32 values 2^(bits - 127) of E8M0 bits (uint8); 0xff is NaN."""
    return bits.view(torch.float8_e8m0fnu).float()


def encode_e8m0(scale: Tensor) -> Tensor:
    """E8M0 bits (uint8) of powers of two from 2^-127 to 2^127; NaN gives 0xff."""
    bits = (torch.frexp(scale).exponent + 126).to(torch.uint8)
    return torch.where(torch.isnan(scale), E8M0_NAN, bits).to(torch.uint8)


def encode_blocks(blocks: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., K/32, 32] of `blocks` under block scales `scale` [..., K/32]."""
    return encode_e2m1(blocks / scale.unsqueeze(-1))


def decode_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """q * 2^e [..., K/32, 32] in fp32, exact."""
    return decode_e2m1(codes) * scale.unsqueeze(-1)


def quantize_blocks(blocks: Tensor) -> QuantizedBlocks:
    """Codes and scales of fp32 blocks [..., K/32, 32]."""
    scale = block_scale(blocks)
    return QuantizedBlocks(encode_blocks(blocks, scale), scale)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K], any leading shape; K is padded with zeros to a multiple of 32.

    Returns:
        qdata uint8 [..., K/2], scale uint8 [..., K/32] (E8M0 bits).
    """
    codes, scale = quantize_blocks(to_blocks(x.float()))
    return pack(codes.flatten(-2)), encode_e8m0(scale)


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `quantize`: [..., K/2] bytes and [..., K/32] scales to [..., K] in `dtype`."""
    codes = unpack(qdata).unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/32, 32]
    return decode_blocks(codes, decode_e8m0(scale)).flatten(-2).to(dtype)
