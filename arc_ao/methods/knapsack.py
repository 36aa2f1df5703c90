"""Pick one item of every group: least total error under bounds on several costs.

Multiple-choice knapsack by Lagrange multipliers. With a price for each cost every group picks alone
the item of least error + prices * costs; for any prices the sum of these minima, less prices *
limits, bounds the optimum from below. The prices that make this bound largest are found by nested
searches. What an item costs beyond its group's minimum then tells how much worse any solution with
it must be, and a branch-and-bound search over these differences closes the gap: small problems are
solved exactly, large ones to within `error - bound`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 40  # of a golden-section search over the logarithms of PRICES
GOLDEN = (math.sqrt(5) - 1) / 2
PRICES = (1e-9, 1e6)  # of a whole limit, over the sum of the groups' largest errors
MAX_NODES = 50_000
ROUNDING = 1e-12  # of sums of costs over limits


@dataclass(frozen=True)
class Item:
    """One way to treat a group."""

    error: float
    costs: tuple[float, ...]  # >= 0


@dataclass(frozen=True)
class Solution:
    """Picks and how good they are: no picks within the limits have an error below `bound`."""

    picks: list[int]
    error: float
    bound: float


def solve(
    groups: Sequence[Sequence[Item]], limits: Sequence[float], max_nodes: int = MAX_NODES
) -> Solution:
    """Least total error with one item of every group and total costs within `limits`.

    Args:
        groups: items of each group, errors and costs >= 0.
        limits: of each cost, >= 0.
        max_nodes: partial solutions that may be looked at after the relaxation.

    Raises:
        ValueError: even the cheapest items exceed a limit, naming it and what they cost.
    """
    if not groups:
        return Solution([], 0.0, 0.0)
    table = _Table(groups, limits)
    bound, prices = table.best_prices()
    search = _Search(table, prices, bound, max_nodes)
    picks = search.run()
    error = math.fsum(group[i].error for group, i in zip(groups, picks, strict=True))
    return Solution(picks, error, error if search.complete else min(bound, error))


class _Table:
    """Errors [G, I] and costs over limits [C, G, I], padded by inf; a limit of 0 forbids."""

    def __init__(self, groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> None:
        width = max(len(group) for group in groups)
        self.errors = torch.full((len(groups), width), math.inf, dtype=torch.float64)
        self.costs = torch.zeros(len(limits), *self.errors.shape, dtype=torch.float64)
        for g, group in enumerate(groups):
            for i, item in enumerate(group):
                over = any(cost > limit for cost, limit in zip(item.costs, limits, strict=True))
                self.errors[g, i] = math.inf if over else item.error
                for c, (cost, limit) in enumerate(zip(item.costs, limits, strict=True)):
                    self.costs[c, g, i] = 0.0 if over or limit == 0 else cost / limit
        self.usable = self.errors.isfinite()
        self._refuse_impossible(groups, limits)
        self.scale = max(self.errors.where(self.usable, 0.0).amax(1).sum().item(), 1e-200)

    def _refuse_impossible(self, groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> None:
        for c, limit in enumerate(limits):
            least = math.fsum(min(item.costs[c] for item in group) for group in groups)
            if least > limit * (1 + 1e-12):
                raise ValueError(
                    f"expected items within the limit {limit:g} of cost {c}, found that the "
                    f"cheapest of every group cost {least:g} together; raise the limit"
                )

    def priced(self, prices: Sequence[float]) -> Tensor:
        """error + prices * costs [G, I]."""
        weights = torch.tensor(prices, dtype=torch.float64)
        return self.errors + (weights.view(-1, 1, 1) * self.costs).sum(0)

    def bound(self, prices: Sequence[float]) -> float:
        """Lower bound of the optimum."""
        return self.priced(prices).amin(1).sum().item() - sum(prices)

    def best_prices(self, fixed: tuple[float, ...] = ()) -> tuple[float, tuple[float, ...]]:
        """The largest bound and its prices, of which `fixed` come first.

        The bound is concave in each price, also where those after it are the best ones.
        """
        if len(fixed) == self.costs.shape[0]:
            return self.bound(fixed), fixed
        value = lambda log: self.best_prices((*fixed, math.exp(log)))
        low, high = (math.log(self.scale * price) for price in PRICES)
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        at_left, at_right = value(left), value(right)
        best = max(self.best_prices((*fixed, 0.0)), at_left, at_right)
        for _ in range(STEPS):
            if at_left[0] < at_right[0]:
                low, left, at_left = left, right, at_right
                right = low + GOLDEN * (high - low)
                at_right = value(right)
            else:
                high, right, at_right = right, left, at_left
                left = high - GOLDEN * (high - low)
                at_left = value(left)
            best = max(best, at_left, at_right)
        return best


class _Search:
    """Branch and bound over what each item costs beyond the least of its group."""

    def __init__(self, table: _Table, prices: Sequence[float], bound: float, nodes: int) -> None:
        priced = table.priced(prices)
        extra = priced - priced.amin(1, keepdim=True)
        hardest = _gaps(extra).argsort(descending=True, stable=True).tolist()
        self.order = hardest  # groups, those whose second best is worst first
        self.items = [_ranked(table, extra, g) for g in hardest]
        self.cheapest = _remaining(self.items, len(prices))
        self.bound, self.nodes = bound, nodes
        self.least, self.best = math.inf, []
        self.complete = True

    def run(self) -> list[int]:
        """Picks by group. Depth first, without recursion: models have thousands of groups."""
        picks = [0] * len(self.items)
        stack = [(iter(self.items[0]), [1 + ROUNDING] * len(self.cheapest[0]), 0.0, 0.0)]
        while stack:
            item = next(stack[-1][0], None)
            _, left, beyond, error = stack[-1]
            if item is None or self.bound + beyond + item[0] >= self.least:
                stack.pop()  # what follows in this group is worse still
                continue
            extra, item_error, costs, picks[len(stack) - 1] = item
            after = [have - cost for have, cost in zip(left, costs, strict=True)]
            if any(a < c for a, c in zip(after, self.cheapest[len(stack)], strict=True)):
                continue
            if self.nodes <= 0 and self.best:
                self.complete = False
                break
            self.nodes -= 1
            if len(stack) < len(self.items):
                following = iter(self.items[len(stack)])
                stack.append((following, after, beyond + extra, error + item_error))
            elif error + item_error < self.least:
                self.least, self.best = error + item_error, list(picks)
        return [i for _, i in sorted(zip(self.order, self.best, strict=True))]


def _gaps(extra: Tensor) -> Tensor:
    """How much the second best item of each group [G] is behind; inf without one."""
    if extra.shape[1] == 1:
        return extra.new_full((len(extra),), math.inf)
    return extra.topk(2, dim=1, largest=False).values[:, 1]


def _ranked(
    table: _Table, extra: Tensor, group: int
) -> list[tuple[float, float, list[float], int]]:
    """(cost beyond the least, error, costs, index) of a group's usable items, best first."""
    usable = table.usable[group].nonzero()[:, 0].tolist()
    found = [
        (
            extra[group, i].item(),
            table.errors[group, i].item(),
            table.costs[:, group, i].tolist(),
            i,
        )
        for i in usable
    ]
    return sorted(found)


def _remaining(items: list[list[tuple]], costs: int) -> list[list[float]]:
    """The least that groups from each depth on must spend, [G + 1][C]."""
    sums = [[0.0] * costs]
    for group in reversed(items):
        least = [min(item[2][c] for item in group) for c in range(costs)]
        sums.append([a + b for a, b in zip(sums[-1], least, strict=True)])
    return sums[::-1]
