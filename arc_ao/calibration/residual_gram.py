"""Calibration statistics beyond O(K): a sample of inputs, and the Gram matrix of their residuals.

`InputSample` keeps rows of what a layer reads, in their own dtype, once for all linears that share
the input. What is quadratic in K is made of it when the layer is planned, and freed after that.
"""

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ROWS = 1024


class InputSample:
    """The first `tokens` rows of an input [*, K], or of every `stride`-th of its rows.

    Costs tokens * K values per shared input while the model is under calibration.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.stride = tokens, 1
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.chunks: list[Tensor] = []
        self.kept = self.offset = 0

    def spread_over(self, tokens: int) -> None:
        """Before the first row: keep rows of all of so many tokens evenly."""
        self.stride = max(1, tokens // max(1, self.tokens))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Keep what there is room for of the rows of x."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self._keep(rows[self.offset :: self.stride])
        self.offset = (self.offset - rows.shape[0]) % self.stride

    def _keep(self, rows: Tensor) -> None:
        picked = rows[: self.tokens - self.kept].clone()
        if picked.shape[0]:
            self.chunks.append(picked)
            self.kept += picked.shape[0]

    def merge(self, other: "InputSample") -> None:
        """Add what `other` kept, as far as there is room."""
        for rows in other.chunks:
            self._keep(rows)

    def all_gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge over the processes of `group`, an even share of each, the same in all of them."""
        if self.tokens == 0:
            return
        found = [None] * dist.get_world_size(group)
        mine = self.rows()
        dist.all_gather_object(found, None if mine is None else mine.cpu(), group=group)
        share = -(-self.tokens // len(found))
        device = None if mine is None else mine.device
        self.clear()
        for rows in found:
            if rows is not None:
                self._keep(rows[:share].to(device))

    def rows(self) -> Tensor | None:
        """All rows [kept, K], or None if there is none."""
        return torch.cat(self.chunks) if self.chunks else None


def mean_gram(rows: Tensor) -> Tensor:
    """E[e^T e] of rows e [M, K], fp32 [K, K]; zeros without rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    for chunk in rows.split(CHUNK_ROWS):
        total.addmm_(chunk.float().t(), chunk.float())
    return total / max(1, rows.shape[0])


def shrinkage(rows: Tensor, gram: Tensor) -> float:
    """How much of the correlations in gram, the mean of few rows, is noise: 0 to 1.

    With r_ij the correlation of channels i and j over the M rows (Schaefer and Strimmer 2005):

        sum of Var(r_ij) / sum of r_ij^2 over i != j        Var: of a mean, so it falls as 1 / M
    """
    count = rows.shape[0]
    std = gram.diagonal().sqrt()
    inverse = torch.where(std > 0, 1 / std, 0.0)
    squares = (gram * inverse).mul_(inverse.unsqueeze(1)).square_()
    off_diagonal = (squares.sum() - squares.diagonal().sum()).item()
    if count < 2 or off_diagonal <= 0:
        return 1.0
    joint = 0.0  # sum over rows and i != j of z_i^2 z_j^2
    for chunk in rows.split(CHUNK_ROWS):
        z2 = (chunk.float() * inverse).square()
        joint += (z2.sum(1).square() - z2.square().sum(1)).sum(dtype=torch.float64).item()
    variance = (joint / count - off_diagonal) / (count - 1)
    return min(1.0, max(0.0, variance / off_diagonal))


def residual_gram(rows: Tensor) -> Tensor:
    """E[e^T e] of rows e [M, K], shrunk towards its diagonal as far as the rows do not tell more.

    With fewer rows than channels the plain mean is singular, and off its diagonal mostly noise.
    """
    gram = mean_gram(rows)
    diagonal = gram.diagonal().clone()
    gram *= 1 - shrinkage(rows, gram)
    gram.diagonal().copy_(diagonal)
    return gram
