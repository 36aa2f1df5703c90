"""HeldOut: rows of an input that are kept out of its sums, to judge what is fitted to them.

Of `stride` rows in a row one is kept, at a place that moves by the golden ratio from one such group
to the next. So the rows are spread evenly, the same ones in every run, and no position of a
sequence is always among them or never. Their neighbours are summed, so that they flatter what is
fitted, more than other text does; who compares by them has to allow for it (methods/gptq.py).
"""

import torch
from torch import Tensor

from arc_ao.calibration.input_sample import InputSample

ROWS = 1024  # kept at most: 2 * ROWS * in_features bytes in bf16
STRIDE = 8  # tokens for each that is kept, where there are few
GOLDEN = 2654435769  # 2^32 over the golden ratio


class HeldOut(InputSample):
    """Takes its share out of the rows that pass, until it has `tokens` of them."""

    def __init__(self, tokens: int = ROWS) -> None:
        super().__init__(tokens)
        self.stride = STRIDE

    def clear(self) -> None:
        """Forget all rows."""
        super().clear()
        self.passed = 0
        self.weights: list[Tensor] = []

    def spread_over(self, tokens: int) -> None:
        """Before the first row: take the share out of all of so many tokens."""
        self.stride = max(STRIDE, -(-tokens // self.tokens))

    @torch.no_grad()
    def split(self, rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Keep the share of rows [M, K], with their weights [M], and return the others."""
        first, self.passed = self.passed, self.passed + rows.shape[0]
        groups = range(first // self.stride, -(-self.passed // self.stride))
        places = (self._place(group) - first for group in groups)
        inside = [place for place in places if 0 <= place < rows.shape[0]]
        chosen = inside[: self.tokens - self.kept]
        if not chosen:
            return rows, weights
        self._keep(rows[chosen])
        others = torch.ones(rows.shape[0], dtype=torch.bool)
        others[chosen] = False
        others = others.to(rows.device)
        if weights is None:
            return rows[others], None
        self.weights.append(weights[chosen])
        return rows[others], weights[others]

    def row_weights(self) -> Tensor | None:
        """Weights [kept] of the rows; None unless all came with theirs."""
        found = torch.cat(self.weights) if self.weights else None
        return found if found is not None and found.shape[0] == self.kept else None

    def _place(self, group: int) -> int:
        return group * self.stride + ((group + 1) * GOLDEN % 2**32 * self.stride >> 32)
