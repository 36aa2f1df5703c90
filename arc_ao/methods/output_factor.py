"""The side of the outputs in GPTQ: how errors of one row of a weight make up for those of another.

What an error E = W - Q(W) [N, K] costs the model's output is, with Kronecker factors of the Fisher
information (K-FAC, arXiv 1503.05671; for rounding: YAQA, arXiv 2505.22988),

    trace(H_out E H_in E^T)        H_out = E[g^T g] [N, N], H_in = E[w x^T x] [K, K]

g the gradients of a score at the layer's outputs (calibration/fisher.py). With H_out = S S^T, S
upper triangular in the order of processing, and H_in likewise (gptq.py), this is |S^T E R|^2, whose
components hold the entries of E that come before them in both orders.

Of H_out the diagonal blocks of TILE_ROWS outputs are kept: N * TILE_ROWS numbers a layer while it
waits for its turn instead of N^2, about the size of heads; tiles of rows are independent.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arc_ao.methods.cholesky import damped_cholesky
from arc_ao.ops.round_columns import TILE_ROWS, tiled


@dataclass(frozen=True)
class OutputFactor:
    """Of one weight [N, K]; tiles are its rows [64 t, 64 t + 64)."""

    order: Tensor  # int64 [N], rows in the order in which they are rounded, tile by tile
    upper: Tensor  # fp32 [ceil(N/64), 64, 64], in that order

    def of_rows(self, rows: slice) -> "OutputFactor":
        """The same for rows of whole tiles."""
        tiles = slice(rows.start // TILE_ROWS, -(-rows.stop // TILE_ROWS))
        return OutputFactor(self.order[rows] - rows.start, self.upper[tiles])

    def through(self, errors: Tensor) -> Tensor:
        """errors [*, N] of the outputs times S: [*, ceil(N/64) * 64]."""
        ordered = tiled(errors.index_select(-1, self.order))
        return torch.einsum("...ti,tij->...tj", ordered, self.upper).flatten(-2)


def tile_chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Rows of a matrix by whole tiles, of at most `elements` elements or one tile."""
    step = max(1, elements // (TILE_ROWS * max(1, columns))) * TILE_ROWS
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def output_factor(products: Tensor, rows: int, damping: float) -> OutputFactor | None:
    """Factorize H_out of a weight of so many rows; None where no output matters or it fails.

    Args:
        products: fp32 [ceil(N/64), 64, 64], diagonal blocks of the sum of g^T g.
        damping: added to the diagonal, over its mean.
    """
    diagonal = products.diagonal(dim1=1, dim2=2)
    mean = diagonal.flatten()[:rows].mean()
    if not torch.isfinite(products).all() or not mean > 0:
        return None
    exists = tiled(torch.ones(rows, device=products.device)) > 0
    first = torch.where(exists, diagonal, -1.0).argsort(dim=1, descending=True, stable=True)
    index = first.unsqueeze(2).expand_as(products)
    reversed_ = (products.gather(1, index).gather(2, index.mT) / mean).flip(1, 2)
    diagonal = reversed_.diagonal(dim1=1, dim2=2).clone()
    lower = damped_cholesky(reversed_, diagonal, torch.full_like(mean, damping))
    if lower is None:
        return None
    starts = torch.arange(len(products), device=products.device) * TILE_ROWS
    order = (first + starts.unsqueeze(1)).flatten()[:rows]
    return OutputFactor(order, lower.flip(1, 2).contiguous())  # S: the factor of both reversed
