"""InputGram: the running E[w x^T x] of what a linear reads, as it is read.

A token x with many times the energy of others (the first of a sequence may have 400,000 times as
much) would be all that the sum knows. Such tokens say little about the text, and norms take their
size away. So tokens of more than the median energy of their batch are scaled down to it:

    w = min(1, median |x|^2 / |x|^2)

and the mean is over the sum of w. Some rows are kept aside and not summed (held_out.py).

For rounding with Hessians in the three steps and the graph flow, which calibrate before anything is
planned: methods/hessian.py turns it into the Hessian under a plan. Costs 4 K^2 bytes for every
distinct input of the model, from the first calibration batch until its linears are converted (a
K of 4096: 64 MiB; of 14336: 784 MiB); the one call holds one at a time instead.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from arc_ao.calibration.held_out import HeldOut

CHUNK_ELEMENTS = 1 << 19  # rows added at a time: 2 MiB in fp32
COLUMNS = 512  # of a sum that are added to at a time, from the diagonal to the right


class InputGram:
    """Sum of w x^T x, fp32, over rows x of inputs [*, K] that are not held out.

    Attributes:
        count: rows seen.
        tokens: those of them that are summed, with a weight that is not 0.
        held: the others.
    """

    def __init__(self) -> None:
        self.count, self.tokens, self.held = 0, 0, HeldOut()
        self._sum: Tensor | None = None
        self._weight = 0.0  # of all rows in the sum

    @torch.no_grad()
    def add(self, x: Tensor, *, weights: Tensor | None = None) -> None:
        """Add the rows of x [*, K]; `weights` fp32 [rows] instead of those by their energies."""
        rows = x.detach().reshape(-1, x.shape[-1])
        self.count += rows.shape[0]
        rows, weights = self.held.split(rows, weights)
        self.tokens += rows.shape[0] if weights is None else int(weights.count_nonzero())
        weights = token_weights(rows) if weights is None else weights
        for chunk, weight in zip(row_chunks(rows), row_chunks(rows, weights), strict=True):
            self.add_products(self.met(chunk) * weight.sqrt().unsqueeze(1))
        self._weight += weights.sum(dtype=torch.float64).item()

    def met(self, rows: Tensor) -> Tensor:
        """What is summed of rows [M, K]: fp32 [M, A]."""
        return rows.float()

    def add_products(self, rows: Tensor) -> None:
        """Add rows^T rows of fp32 [M, A] without counting them; below the diagonal nothing."""
        if self._sum is None:
            self._sum = rows.new_zeros((rows.shape[1], rows.shape[1]))
        for start in range(0, rows.shape[1], COLUMNS):
            part = rows[:, start : start + COLUMNS]
            self._sum[start : start + COLUMNS, start:].addmm_(part.T, rows[:, start:])

    def merge(self, other: "InputGram") -> None:
        """Add what `other` saw."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)
        self.count += other.count
        self.tokens += other.tokens
        self._weight += other._weight
        self.held.merge(other.held)

    def all_reduce(self, per_channel: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Merge over the processes of `group`; one that saw nothing adds zeros, for which some
        tensor [K] tells size and device."""
        total = self._sum
        if total is None:
            channels, device = per_channel.shape[0], per_channel.device
            total = torch.zeros(channels, channels, device=device)
        seen = [self.count, self.tokens, self._weight]
        seen = torch.tensor(seen, dtype=torch.float64, device=total.device)
        for part in (total, seen):
            dist.all_reduce(part, op=dist.ReduceOp.SUM, group=group)
        self.held.all_gather(group)
        self.count, self.tokens, self._weight = int(seen[0]), int(seen[1]), seen[2].item()
        self._sum = total if self.count else None

    def take(self) -> Tensor | None:
        """The mean, fp32 [A, A], handed over; None where no row was seen."""
        total, self._sum = self._sum, None
        if total is None or not self._weight:
            return None
        for start in range(COLUMNS, total.shape[1], COLUMNS):
            part = slice(start - COLUMNS, start)
            total[start:, part] = total[part, start:].T
        return total.div_(self._weight)


def token_weights(rows: Tensor) -> Tensor:
    """fp32 [M]: 1 for rows [M, K] of at most the median energy of those that are not zero."""
    energies = [chunk.float().square().sum(1) for chunk in row_chunks(rows)]
    energy = torch.cat(energies) if energies else rows.new_zeros(0, dtype=torch.float32)
    some = energy[energy > 0]
    middle = some.median() if some.numel() else energy.new_ones(())
    return (middle / energy).clamp_(max=1.0)


def row_chunks(rows: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
    """rows [M, K], or values [M] of theirs, in parts that bound the temporaries."""
    size = max(1, CHUNK_ELEMENTS // max(1, rows.shape[1]))
    return (rows if values is None else values).split(size)
