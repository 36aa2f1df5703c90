"""InputGram: the running E[x^T x] of what a linear reads, as it is read.

For rounding with Hessians in the three steps and the graph flow, which calibrate before anything is
planned: methods/hessian.py turns it into the Hessian under a plan. Costs 4 K^2 bytes for every
distinct input of the model, from the first calibration batch until its linears are converted (a
K of 4096: 64 MiB; of 14336: 784 MiB); the one call holds one at a time instead.
"""

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 19  # rows added at a time: 2 MiB in fp32


class InputGram:
    """Sum of x^T x, fp32, over rows of inputs [*, K].

    Attributes:
        count: rows seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the rows of x [*, K]."""
        rows = x.detach().reshape(-1, x.shape[-1])
        for chunk in row_chunks(rows):
            self.add_products(chunk.float())
        self.count += rows.shape[0]

    def add_products(self, rows: Tensor) -> None:
        """Add rows^T rows of fp32 [M, A] without counting them."""
        if self._sum is None:
            self._sum = rows.new_zeros((rows.shape[1], rows.shape[1]))
        self._sum.addmm_(rows.T, rows)

    def merge(self, other: "InputGram") -> None:
        """Add what `other` saw."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)
        self.count += other.count

    def all_reduce(self, per_channel: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Merge over the processes of `group`; one that saw nothing adds zeros, for which some
        tensor [K] tells size and device."""
        total = self._sum
        if total is None:
            channels, device = per_channel.shape[0], per_channel.device
            total = torch.zeros(channels, channels, device=device)
        count = torch.tensor(self.count, device=total.device)
        for part in (total, count):
            dist.all_reduce(part, op=dist.ReduceOp.SUM, group=group)
        self._sum, self.count = (total if count > 0 else None), int(count)

    def take(self) -> Tensor | None:
        """The mean, fp32 [A, A], handed over; None where no row was seen."""
        total, self._sum = self._sum, None
        return total.div_(self.count) if self.count and total is not None else None


def row_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """rows [M, K] in parts that bound the temporaries."""
    return rows.split(max(1, CHUNK_ELEMENTS // max(1, rows.shape[1])))
