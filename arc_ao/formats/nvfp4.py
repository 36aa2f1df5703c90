"""NVFP4 in eager PyTorch: the bit-level meaning that every kernel of arc_ao reproduces.

A tensor [..., K] is cut into blocks of 16 along K. Element, block and outer level:

    x[..., k] ~ q[..., k] * s[..., k // 16] * outer          q in e2m1, s in e4m3, outer in fp32

    inv = 2688 / amax                 one IEEE division per token or tensor; 2688 = 6 * 448
    xs  = x * inv                     amax below 2^-116 counts as zero (inv = outer = 0)
    s   = e4m3(amax_block(xs) * (1/6))          clamped to [2^-9, 448]: never 0, subnormals used;
                                      or one of its neighbours, see `quantize_blocks`
    q   = e2m1(xs * (1/s))                      nearest, ties to even code, saturating at 6
    r   = xs - q * s                            q * s is exact, so FMA contraction changes no bit
    outer = amax / 2688                         multiplies on dequantize

All steps are fp32. Element 2i lies in the low nibble of byte i, 2i+1 in the high one; the sign is
bit 3, kept on zeros. A block that holds NaN or Inf gets the scale NaN (0x7f) and codes 0, so that
its token dequantizes to NaN and never to a finite number.

Scales travel as uint8, the bits of float8_e4m3fn from 0x00 to 0x7e. Every other byte, NaN's or one
with a sign, is no scale: it decodes to NaN, here and in every kernel that decodes scales itself (in
Blackwell's matrix units the type has no sign). `swizzle_scales` is the 128x4 tiling that Blackwell
reads (PTX ISA, tcgen05 block scaling; CUTLASS Sm1xxBlockScaledConfig).
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 16
F4_E2M1_MAX = 6.0
F8_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
F8_E4M3_MIN = 2.0**-9  # smallest subnormal
NVFP4_MAX = F4_E2M1_MAX * F8_E4M3_MAX  # 2688
TINY_AMAX = 2.0**-116  # 2688 / TINY_AMAX is still finite in fp32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_NAN = 0x7F
E4M3_SMALLEST_CODE, E4M3_LARGEST_CODE = 0x01, 0x7E  # 2^-9 and 448
BlockScale = Literal["amax", "four_over_six", "mse"]
BLOCK_SCALES: tuple[str, ...] = get_args(BlockScale)
# What "mse" tries for activations, in this order: e4m3 codes from that of amax/6. 4 to 6 map a
# block's amax to about 4, where e2m1's steps are half as wide. Chosen by what each try gains: at
# the linears of a 135M-parameter Llama these six remove 13.8 % of amax/6's squared error, all from
# -4 to 8 remove 14.1 %, -2 to 5 13.9 %, these without 6 13.6 %, and four-over-six 7.7 %.
CODE_OFFSETS = (0, -1, 1, 4, 5, 6)


class QuantizedBlocks(NamedTuple):
    """Codes and decoded block scales of a blocked tensor, before packing."""

    codes: Tensor  # uint8 [..., K/16, 16], values 0..15
    scale: Tensor  # fp32 [..., K/16], every value representable in e4m3


def divide(numerator: float, x: Tensor) -> Tensor:
    """numerator / x as one IEEE division (`2688 / x` in PyTorch rounds twice)."""
    return torch.full_like(x, numerator) / x


def inverse_outer_scale(amax: Tensor) -> Tensor:
    """Quantize-side multiplier `2688 / amax`, fp32, 0 where amax counts as zero."""
    return torch.where(amax < TINY_AMAX, torch.zeros_like(amax), divide(NVFP4_MAX, amax))


def outer_scale(amax: Tensor) -> Tensor:
    """Dequantize-side multiplier `amax / 2688`, fp32, 0 where amax counts as zero."""
    scale = amax / torch.full_like(amax, NVFP4_MAX)
    return torch.where(amax < TINY_AMAX, torch.zeros_like(amax), scale)


def to_blocks(x: Tensor) -> Tensor:
    """View [..., K] as blocks [..., ceil(K/16), 16]; a ragged K is padded with zeros."""
    padding = -x.shape[-1] % BLOCK_SIZE
    if padding:
        x = F.pad(x, (0, padding))
    return x.unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/16, 16]


def round_to_e4m3(x: Tensor) -> Tensor:
    """Nearest e4m3 value in [2^-9, 448] of a non-negative fp32 tensor; NaN and Inf give NaN."""
    rounded = x.clamp(F8_E4M3_MIN, F8_E4M3_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(torch.isfinite(x), rounded, torch.nan)


def block_scale(blocks: Tensor, block_max: float = F4_E2M1_MAX) -> Tensor:
    """Scale [..., K/16] that maps each block's amax to `block_max` (6, or 4 in four-over-six)."""
    factor = torch.tensor(1.0 / block_max, dtype=torch.float32, device=blocks.device)
    return round_to_e4m3(blocks.abs().amax(-1) * factor)


def e2m1_index(magnitude: Tensor) -> Tensor:
    """Index 0..7 (fp32) of the e2m1 magnitude nearest to `magnitude` >= 0, ties to even.

    The map from value to index is concave and piecewise linear with slopes 2, 1 and 1/2: the least
    of its three pieces. Each is rounded on its own, since 2a and a/2 are exact and an even offset
    leaves ties where they are. (6 times faster than torch.bucketize on one Xeon core.)
    """
    index = torch.minimum((magnitude * 2).round_(), magnitude.round().add_(2))
    return torch.minimum(index, (magnitude * 0.5).round_().add_(4)).clamp_(max=7)


def encode_e2m1(v: Tensor) -> Tensor:
    """4-bit codes (uint8, 0..15) of fp32 `v`: sign in bit 3, magnitude index below; NaN gives 0."""
    codes = e2m1_index(v.abs()).nan_to_num_(0).to(torch.uint8)
    codes |= torch.signbit(v).to(torch.uint8) << 3
    return codes.masked_fill_(torch.isnan(v), 0)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of 4-bit codes (uint8, 0..15)."""
    return _code_values(codes.device)[codes.int()]


def decode_e4m3(bits: Tensor) -> Tensor:
    """fp32 values of e4m3 bits (uint8); NaN for those from 0x7f on."""
    value = bits.view(torch.float8_e4m3fn).float()
    return value.masked_fill_(bits >= E4M3_NAN, torch.nan)


def encode_e4m3(scale: Tensor) -> Tensor:
    """e4m3 bits (uint8) of values that are representable; NaN gives 0x7f."""
    return scale.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] (K even) to bytes [..., K/2]: element 2i in the low nibble of byte i."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(qdata: Tensor) -> Tensor:
    """Bytes [..., K/2] to codes [..., K]."""
    return torch.stack((qdata & 0xF, qdata >> 4), dim=-1).flatten(-2)


def encode_blocks(blocks: Tensor, scale: Tensor) -> Tensor:
    """Codes [..., K/16, 16] of `blocks` under block scales `scale` [..., K/16]."""
    return encode_e2m1(blocks * scale.reciprocal().unsqueeze(-1))


def decode_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """q * s [..., K/16, 16] in fp32, exact."""
    return decode_e2m1(codes) * scale.unsqueeze(-1)


def quantize_blocks(blocks: Tensor, *, method: BlockScale = "amax") -> QuantizedBlocks:
    """Quantize outer-scaled blocks [..., K/16, 16] under scales chosen by `method`.

    amax            the scale that maps the block's amax to 6
    four_over_six   that, or the one that maps it to 4 (arXiv 2512.02010)
    mse             that, or one of the neighbours CODE_OFFSETS, clamped to 2^-9 .. 448

    The first candidate of the least squared error wins: a later one only where its error is
    strictly less, so that a block of NaN keeps the first.
    """
    scale = block_scale(blocks)
    codes = encode_blocks(blocks, scale)
    if method == "amax":
        return QuantizedBlocks(codes, scale)
    least = squared_error(blocks, codes, scale)
    for candidate in _later_candidates(blocks, scale, method):
        tried = encode_blocks(blocks, candidate)
        error = squared_error(blocks, tried, candidate)
        better = error < least
        codes = torch.where(better.unsqueeze(-1), tried, codes)
        scale = torch.where(better, candidate, scale)
        least = torch.where(better, error, least)
    return QuantizedBlocks(codes, scale)


def neighbour_scale(scale: Tensor, offset: int) -> Tensor:
    """The e4m3 value `offset` codes from each of `scale` [..., K/16], within 2^-9 and 448."""
    code = encode_e4m3(scale).short() + offset
    return decode_e4m3(code.clamp_(E4M3_SMALLEST_CODE, E4M3_LARGEST_CODE).to(torch.uint8))


def _later_candidates(blocks: Tensor, scale: Tensor, method: BlockScale) -> Iterator[Tensor]:
    """Scales [..., K/16] that `method` tries after `scale`, that of amax/6."""
    if method == "four_over_six":
        yield block_scale(blocks, block_max=4.0)
        return
    for offset in CODE_OFFSETS[1:]:
        yield neighbour_scale(scale, offset)


def squared_error(blocks: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Squared error per block [..., K/16], summed as a tree of halves: the same everywhere."""
    error = blocks - decode_blocks(codes, scale)
    return sum_of_halves(error * error)


def sum_of_halves(values: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two, as a tree of halves: [..., 16] to [...]."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values.squeeze(-1)


def quantize(
    x: Tensor, *, amax: Tensor | None = None, method: BlockScale = "amax"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [..., K] with one outer scale per tensor.

    Args:
        x: floating point, any leading shape; K is padded with zeros to a multiple of 16.
        amax: fp32 [] that sets the outer scale, default the largest magnitude of `x`.
        method: of choosing each block's scale, see `quantize_blocks`.

    Returns:
        qdata uint8 [..., K/2], scale uint8 [..., K/16] (e4m3 bits), outer scale fp32 [].
    """
    x = x.float()
    if amax is None:
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
    blocks = to_blocks(x * inverse_outer_scale(amax))
    codes, scale = quantize_blocks(blocks, method=method)
    return pack(codes.flatten(-2)), encode_e4m3(scale), outer_scale(amax)


def dequantize(
    qdata: Tensor, scale: Tensor, outer: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Inverse of `quantize`: [..., K/2] bytes and [..., K/16] scales to [..., K] in `dtype`."""
    return (decode(qdata, scale) * outer).to(dtype)


def decode(qdata: Tensor, scale: Tensor) -> Tensor:
    """q * s [..., K] in fp32, without the outer scale; every value is exact in bf16 too."""
    pairs = _byte_values(qdata.device).view(torch.int64)[:, 0]  # gathered as one, not as two floats
    values = pairs.index_select(0, qdata.flatten().int()).view(qdata.shape).view(torch.float32)
    blocks = values.unflatten(-1, (-1, BLOCK_SIZE))  # [..., K/16, 16]
    return blocks.mul_(decode_e4m3(scale).unsqueeze(-1)).flatten(-2)


def bytes_of_blocks(qdata: Tensor) -> Tensor:
    """View [..., K/2] packed codes as blocks [..., K/16, 8]."""
    return qdata.unflatten(-1, (-1, BLOCK_SIZE // 2))


def row_chunks(matrix: Tensor, elements: int) -> Iterator[slice]:
    """Row ranges of matrix [N, K] of at most `elements` elements (at least one row)."""
    step = max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def swizzle_scales(scale: Tensor) -> Tensor:
    """Row-major scales [M, K/16] to the 128x4 tiled layout, flat, padded with zeros.

    Scale (m, b) lies in tile (m // 128, b // 4) of 512 bytes at offset
    (m % 32) * 16 + (m % 128 // 32) * 4 + b % 4; tiles are row-major.
    """
    rows, cols = scale.shape
    padded = F.pad(scale, (0, -cols % 4, 0, -rows % 128))
    tiles = padded.view(math.ceil(rows / 128), 4, 32, math.ceil(cols / 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def unswizzle_scales(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `swizzle_scales`: [rows, cols], padding dropped."""
    row_tiles, col_tiles = math.ceil(rows / 128), math.ceil(cols / 4)
    tiles = swizzled.view(row_tiles, col_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(row_tiles * 128, col_tiles * 4)[:rows, :cols].contiguous()


def _code_values(device: torch.device) -> Tensor:
    """fp32 [16]: value of each 4-bit code."""
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32)
    return torch.cat((magnitudes, -magnitudes)).to(device)


def _byte_values(device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two values in each packed byte, low nibble first."""
    return decode_e2m1(unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(-1))).to(device)
