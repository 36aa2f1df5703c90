"""Layouts of a weight: "plain" as in checkpoints, "panels" for CPUs, "swizzled" for Blackwell.

A panel is 16 rows. Inside it the 16-channel blocks follow one another; of each, first the bytes
0..3 of all 16 rows, then the bytes 4..7, so that one 64-byte vector holds four bytes of every row:

    panels[p, b, h, r, i] = plain[16 p + r, 8 b + 4 h + i]        codes
    panels[p, b, r]       = plain[16 p + r, b]                    block scales

The shapes stay [N, K/2] and [N, K/16]. Rows behind the last whole panel stay plain.

Swizzled codes are rows as in "plain", but W_aug whole, the blocks that meet activation residuals
copied into their place, and a block of zeros more where the number of blocks is odd: a row then
starts at a multiple of 16 bytes, as the matrix units' loads want. Their scales lie in tiles of 128
rows by 4 blocks (`nvfp4.swizzle_scales`), zeros behind the last row and block. Activations that
meet such a weight have the same layout (`scale_layout="swizzled"`):

    codes  uint8 [rows, K_pad/2]                   K_pad = K_aug up to a multiple of 32
    scales uint8 [up to 128s of rows, up to 4s of K_pad/16]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.formats import nvfp4

LAYOUTS = ("plain", "panels", "swizzled")
SCALE_LAYOUTS = ("plain", "swizzled")
PANEL_ROWS = 16
HALF_BLOCK_BYTES = 4
TILE_ROWS, TILE_BLOCKS = 128, 4


def scale_layout_for(weight_layout: str) -> str:
    """The `scale_layout` of activations that meet a weight in `weight_layout`."""
    return "swizzled" if weight_layout == "swizzled" else "plain"


def to_panels(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Plain codes uint8 [N, K/2] and block scales uint8 [N, K/16] to panels."""
    codes = _whole_panels(qdata).unflatten(2, (-1, 2, HALF_BLOCK_BYTES)).permute(0, 2, 3, 1, 4)
    scales = _whole_panels(scale).transpose(1, 2)
    return _with_tail(codes, qdata), _with_tail(scales, scale)


def from_panels(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `to_panels`."""
    blocks = scale.shape[1]
    codes = _whole_panels(qdata).reshape(-1, blocks, 2, PANEL_ROWS, HALF_BLOCK_BYTES)
    scales = _whole_panels(scale).reshape(-1, blocks, PANEL_ROWS)
    return (
        _with_tail(codes.permute(0, 3, 1, 2, 4), qdata),
        _with_tail(scales.transpose(1, 2), scale),
    )


def to_swizzled(
    qdata: Tensor, scale: Tensor, act_blocks: Tensor, base_blocks: int
) -> tuple[Tensor, Tensor]:
    """Plain B, codes [N, K_b/2] and scales [N, K_b/16], to W_aug in the swizzled layout.

    act_blocks int32 [Ra] are base blocks of B whose copies go behind its `base_blocks`.
    """
    return swizzle(*repeat_blocks(qdata, scale, act_blocks, base_blocks))


def from_swizzled(
    qdata: Tensor, scale: Tensor, act_blocks: Tensor, base_blocks: int, blocks: int
) -> tuple[Tensor, Tensor]:
    """Inverse of `to_swizzled`, where B has `blocks` blocks in a row."""
    qdata, scale = unswizzle(qdata, scale)
    kept = torch.arange(blocks, device=qdata.device)
    kept[base_blocks:] += act_blocks.shape[0]
    codes = nvfp4.bytes_of_blocks(qdata).index_select(1, kept).flatten(1)
    return codes, scale.index_select(1, kept)


def repeat_blocks(
    qdata: Tensor, scale: Tensor, act_blocks: Tensor, base_blocks: int
) -> tuple[Tensor, Tensor]:
    """Plain B to plain W_aug: copies of `act_blocks` behind the base blocks."""
    stored = torch.arange(scale.shape[1], dtype=act_blocks.dtype, device=qdata.device)
    columns = torch.cat((stored[:base_blocks], act_blocks, stored[base_blocks:]))
    codes = nvfp4.bytes_of_blocks(qdata).index_select(1, columns).flatten(1)
    return codes, scale.index_select(1, columns)


def swizzle(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Plain codes uint8 [rows, K/2] and scales [rows, K/16], padded and swizzled."""
    odd = scale.shape[1] % 2
    padded = F.pad(qdata, (0, odd * nvfp4.BLOCK_SIZE // 2))
    return padded, nvfp4.swizzle_scales(scale).view(swizzled_shape(*scale.shape))


def unswizzle(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Swizzled operand to plain codes [rows, K_pad/2] and scales [rows, K_pad/16]: the block of
    zeros of an odd number of blocks stays."""
    blocks = 2 * qdata.shape[1] // nvfp4.BLOCK_SIZE
    return qdata, nvfp4.unswizzle_scales(scale.reshape(-1), qdata.shape[0], blocks)


def swizzled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """Shape of the swizzled scales of `rows` rows of `blocks` blocks; sizes may be symbolic."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_BLOCKS) * TILE_BLOCKS


def _whole_panels(matrix: Tensor) -> Tensor:
    """[N // 16, 16, columns]"""
    whole = matrix.shape[0] // PANEL_ROWS * PANEL_ROWS
    return matrix[:whole].unflatten(0, (-1, PANEL_ROWS))


def _with_tail(panels: Tensor, matrix: Tensor) -> Tensor:
    whole = panels.reshape(-1, matrix.shape[1])
    if whole.shape == matrix.shape:
        return whole
    return torch.cat((whole, matrix[whole.shape[0] :]))
