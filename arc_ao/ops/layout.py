"""Layouts of a stored weight: "plain", as in checkpoints, and "panels", as CPU kernels read it.

A panel is 16 rows. Inside it the 16-channel blocks follow one another; of each, first the bytes
0..3 of all 16 rows, then the bytes 4..7, so that one 64-byte vector holds four bytes of every row:

    panels[p, b, h, r, i] = plain[16 p + r, 8 b + 4 h + i]        codes
    panels[p, b, r]       = plain[16 p + r, b]                    block scales

The shapes stay [N, K/2] and [N, K/16]. Rows behind the last whole panel stay plain.
"""

import torch
from torch import Tensor

LAYOUTS = ("plain", "panels")
PANEL_ROWS = 16
HALF_BLOCK_BYTES = 4


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


def _whole_panels(matrix: Tensor) -> Tensor:
    """[N // 16, 16, columns]"""
    whole = matrix.shape[0] // PANEL_ROWS * PANEL_ROWS
    return matrix[:whole].unflatten(0, (-1, PANEL_ROWS))


def _with_tail(panels: Tensor, matrix: Tensor) -> Tensor:
    whole = panels.reshape(-1, matrix.shape[1])
    return torch.cat((whole, matrix[whole.shape[0] :]))
