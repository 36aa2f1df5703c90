"""Multiple-choice knapsack: exact where it claims to be, within its bounds always."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ao.methods.knapsack import Item, solve

COSTS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0])
ITEMS = st.builds(Item, st.floats(0, 10), st.tuples(COSTS, COSTS))
# "plain" costs nothing, so that there always is an answer.
GROUPS = st.lists(
    st.builds(
        lambda error, rest: [Item(error, (0.0, 0.0)), *rest],
        st.floats(0, 10),
        st.lists(ITEMS, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def brute_force(groups: list[list[Item]], limits: tuple[float, float]) -> float:
    fits = lambda picks: all(sum(p.costs[c] for p in picks) <= limits[c] for c in range(2))
    return min(
        math.fsum(p.error for p in picks) for picks in itertools.product(*groups) if fits(picks)
    )


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.tuples(COSTS, COSTS))
def test_small_problems_are_solved_exactly(groups, limits):
    """Against all combinations; the picks are within the limits and have the error they claim."""
    found = solve(groups, limits)
    picks = [group[i] for group, i in zip(groups, found.picks, strict=True)]
    assert all(sum(p.costs[c] for p in picks) <= limits[c] for c in range(2))
    assert found.error == math.fsum(p.error for p in picks)
    assert found.error == pytest.approx(brute_force(groups, limits), rel=1e-9, abs=1e-9)
    assert found.bound == found.error


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.tuples(COSTS, COSTS))
def test_the_bound_holds_where_the_search_is_cut_short(groups, limits):
    """The first answer and the optimum lie between the relaxation and what was found."""
    found, best = solve(groups, limits, max_nodes=0), brute_force(groups, limits)
    assert found.bound <= best + 1e-9 and best <= found.error + 1e-9


def convex(group: int, size: int = 12) -> list[Item]:
    """Falling errors at rising costs, in each of two ways."""
    scale = 1 + (7 * group) % 11
    return [
        Item(scale / (1 + a) + scale / (1 + 0.5 * b), (0.1 * a * scale, float(b)))
        for a in range(size)
        for b in range(size)
    ]


def test_large_problems_come_close():
    """100 inputs with 144 options: within 1 % of what no solution can beat."""
    groups = [convex(g) for g in range(100)]
    found = solve(groups, (120.0, 200.0), max_nodes=2000)
    assert 0.99 * found.error <= found.bound <= found.error


def test_no_answer_is_an_error():
    with pytest.raises(ValueError, match="limit 1 of cost 0"):
        solve([[Item(0.0, (2.0, 0.0))]], (1.0, 1.0))
