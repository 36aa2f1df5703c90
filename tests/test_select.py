"""Which blocks get a residual: hand-computed choices, budgets, the paper's rule, refusals."""

import pytest
import torch

from arc_ao.config import ARCConfig
from arc_ao.methods.select import GroupScores, Selected, select


def per_block(*values: float) -> torch.Tensor:
    """Channel scores whose block sums are `values`."""
    return torch.tensor(values).repeat_interleave(16) / 16


def group(act, weight, out_features: int, name: str = "layer", amax=None) -> GroupScores:
    act, weight = (v if isinstance(v, torch.Tensor) else per_block(*v) for v in (act, weight))
    return GroupScores([name], out_features, len(act), act, weight, act if amax is None else amax)


def chosen(groups: list[GroupScores], **settings) -> list[Selected]:
    return select(groups, ARCConfig(**{"recipe": "balanced", **settings}).resolve())


# Removed error per cost, block by block (a block costs 16 N):
#   q     N = 8:   act 8/128 4/128 1/128 0         weight 2/128 0 6/128 0
#   down  N = 32:  act 40/512 4/512                weight 12/512 36/512
# so in order: down act 0 (.078), down weight 1 (.070), q act 0 (.063), q weight 2 (.047),
#   q act 1 (.031), down weight 0 (.023), q weight 0 (.016), q act 2 and down act 1 (.0078)
Q = group((8, 4, 1, 0), (2, 0, 6, 0), 8, "q")
DOWN = group((40, 4), (12, 36), 32, "down")
COST = 8 * 64 + 32 * 32  # multiply-adds of the plain products: 1536; a block costs 128 and 512


@pytest.mark.parametrize(
    "spent, q, down",
    [
        (0, Selected(), Selected()),
        (511, Selected([0, 1], [2]), Selected()),  # down does not fit, cheaper blocks do: 384
        (512, Selected(), Selected([0])),
        (1152, Selected([0]), Selected([0], [1])),
        (1407, Selected([0], [2]), Selected([0], [1])),
        (1408, Selected([0, 1], [2]), Selected([0], [1])),
        # The sixth does not fit any more, the seventh does.
        (1536, Selected([0, 1], [0, 2]), Selected([0], [1])),
        (1920, Selected([0, 1], [2]), Selected([0], [0, 1])),
        # Everything that removes error; blocks that remove none are never taken.
        (3072, Selected([0, 1, 2], [0, 2]), Selected([0, 1], [0, 1])),
    ],
)
def test_blocks_of_all_layers_and_kinds_compete(spent, q, down):
    """Hand-computed greedy choice by removed error per cost."""
    assert chosen([Q, DOWN], budget=spent / COST) == [q, down]


def random_groups(seed: int) -> list[GroupScores]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(64, 96), (160, 64), (48, 256)]  # (K, N)
    return [
        group(torch.rand(k, generator=g) ** 8, torch.rand(k, generator=g) ** 8, n)
        for k, n in shapes
    ]


@pytest.mark.parametrize("budget", [0.01, 0.06, 0.25, 1.0])
@pytest.mark.parametrize("granularity", ["block", "channel"])
@pytest.mark.parametrize("selection", ["energy", "threshold"])
def test_the_budget_is_never_exceeded_and_nearly_used(budget, granularity, selection):
    """What is left over is less than the cheapest block."""
    for seed in range(5):
        groups = random_groups(seed)
        picked = chosen(groups, budget=budget, granularity=granularity, selection=selection)
        spent = sum(
            g.out_features * (16 * len(s.act_blocks + s.weight_blocks) + len(s.act_channels))
            for g, s in zip(groups, picked, strict=True)
        )
        allowed = budget * sum(g.out_features * g.in_features for g in groups)
        full = selection == "threshold" and budget == 1.0  # then every activation block is taken
        assert allowed - min(g.cost for g in groups) < spent <= allowed or (
            full and spent == allowed
        )


@pytest.mark.parametrize("rate, kind", [(0.0, "act"), ("inf", "weight")])
def test_extreme_exchange_rates_give_one_kind(rate, kind):
    picked = chosen(random_groups(0), budget=0.5, exchange_rate=rate)
    numbers = {
        "act": sum(len(p.act_blocks) for p in picked),
        "weight": sum(len(p.weight_blocks) for p in picked),
    }
    assert numbers.pop(kind) > 0
    assert list(numbers.values()) == [0]


def test_the_exchange_rate_weighs_the_kinds():
    """At rate 2 a weight block of 3 beats an activation block of 5, at rate 1 it does not."""
    layer = group((5, 0), (3, 0), 8)
    assert chosen([layer], budget=0.5, exchange_rate=1.0) == [Selected([0])]
    assert chosen([layer], budget=0.5, exchange_rate=2.0) == [Selected([], [0])]


def test_single_channels_are_gathered_from_the_worst_on():
    """Granularity "channel": the worst 16 of 48 channels, wherever they lie."""
    scores = torch.arange(48.0)
    scores[::3] += 100
    layer = group(scores, torch.zeros(48), 8)
    (picked,) = chosen([layer], budget=1 / 3, granularity="channel")
    assert picked == Selected([], [], list(range(45, -1, -3)))
    (picked,) = chosen([layer], num_act_channels=32, granularity="channel")
    assert len(set(picked.act_channels)) == 32
    assert set(range(0, 48, 3)) < set(picked.act_channels)


def test_explicit_numbers_hold_for_every_layer():
    """The best blocks of each kind, also those that remove nothing."""
    assert chosen([Q, DOWN], num_act_channels=32, num_weight_channels=16) == [
        Selected([0, 1], [2]),
        Selected([0, 1], [1]),
    ]
    assert chosen([Q], num_weight_channels=64) == [Selected([], [0, 1, 2, 3])]


@pytest.mark.parametrize("kind", ["act", "weight"])
def test_more_residual_channels_than_exist_are_refused_by_name(kind):
    message = f"^down: asked for 48 {kind} residual channels, the layer has 32 in_features; lower "
    with pytest.raises(ValueError, match=message + f"num_{kind}_channels to at most 32"):
        chosen([Q, DOWN], **{f"num_{kind}_channels": 48})


def paper(*amax: float) -> list[int]:
    values = torch.tensor(amax)
    zeros = torch.zeros_like(values)
    layer = group(zeros, zeros, 8, amax=values)
    (picked,) = chosen([layer], budget=None, recipe="paper")
    assert not picked.weight_blocks and not picked.act_channels
    return picked.act_blocks


def test_the_papers_rule():
    """Channels above 2^-3 of the largest, rounded up to 64, capped at K."""
    ones = [1.0] * 200
    # The largest alone: 64 channels. Exactly 1/8 is not above.
    assert paper(8.0, *ones[:127]) == [0, 1, 2, 3]
    # 64 above: 64 channels; 65 above: 128.
    assert len(paper(*[8.0] * 64, *ones[:128])) == 4
    assert len(paper(*[8.0] * 65, *ones[:127])) == 8
    # Capped at K: all 80 channels; none where nothing was seen.
    assert paper(*[8.0] * 65, *ones[:15]) == [0, 1, 2, 3, 4]
    assert paper(*[0.0] * 64) == []


def test_threshold_with_a_budget_takes_the_largest_blocks_of_all_layers():
    """Ranked by amax relative to the layer's, so each layer's worst block comes first."""
    zeros = torch.zeros(64)
    small = group(zeros, zeros, 16, amax=per_block(1, 16, 2, 4))
    large = group(zeros, zeros, 16, amax=100 * per_block(9, 1, 16, 1))
    picked = chosen([small, large], budget=3 / 8, selection="threshold")
    assert picked == [Selected([1]), Selected([0, 2])]
