"""InputSample: rows of what a layer reads, for what means over single channels do not tell."""

import torch
import torch.distributed as dist
from torch import Tensor


class InputSample:
    """The first `tokens` rows of an input [*, K], or of every `stride`-th of its rows.

    Rows keep their dtype. Costs tokens * K values per shared input while the model is under
    calibration.
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
