"""Measured layer weights: what they are made of, and that blocks move to where they matter."""

import dataclasses

import torch
from test_recipe import session_on
from tiny_models import tiny_llama
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.data import calibrate
from arc_ao.calibration.session import observer_on
from arc_ao.methods import sensitivity
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.sensitivity import measure_layer_weights

CONFIG = ARCConfig(recipe="balanced", budget=0.1, layer_weights="measured")


class Branches(nn.Module):
    """Two linears of equal weights; the output of the second is scaled by `gain`."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.gain = nn.Linear(64, 64), nn.Linear(64, 64), gain
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.gain * self.second(x.flip(0))], dim=-1)


def branch_weights(gain: float) -> dict[str, float]:
    model = Branches(gain)
    data = [torch.randn(16, 64, generator=torch.Generator().manual_seed(1))]
    quantize_(model, CONFIG.with_step("prepare"))
    calibrate(model, data, progress=False)
    session = observer_on(model.first).session
    session.observing = False
    return measure_layer_weights(model, session, data, progress=False)


def test_a_layer_that_is_heard_louder_weighs_more():
    """Equal layers weigh the same; four times the gain is sixteen times the error energy in
    1 - cosine, and four times the weight. Weights have mean 1."""
    equal, louder = branch_weights(1.0), branch_weights(4.0)
    assert abs(equal["first"] / equal["second"] - 1) < 0.2
    assert 3 < louder["second"] / louder["first"] < 5
    assert abs(sum(louder.values()) - 2) < 1e-6


def test_layers_without_error_or_finite_divergence_get_the_mean():
    model = tiny_llama(num_hidden_layers=1)
    session = session_on(model, CONFIG)
    analyses = analyse_session(session, CONFIG.resolve())
    zero = dataclasses.replace(
        analyses[0].scores,
        act_score=analyses[0].scores.act_score * 0,
        weight_score=analyses[0].scores.weight_score * 0,
    )
    analyses[0] = dataclasses.replace(analyses[0], scores=zero)
    weights = list(sensitivity._weights(analyses, [1.0, float("inf"), 1.0, 4.0]).values())
    assert weights[0] == weights[1] == 1.0 and weights[2] > 0 and weights[3] > 0


def test_blocks_follow_the_weights():
    """A layer of a thousand times the weight gets its residuals first; the budget stays."""
    model = tiny_llama(num_hidden_layers=1)
    session, resolved = session_on(model, CONFIG), CONFIG.resolve()
    analyses = analyse_session(session, resolved)
    favourite = "model.layers.0.self_attn.o_proj"
    even, uneven = (make_plans(analyses, resolved, w) for w in (None, {favourite: 1000.0}))
    extra = lambda plan: plan.act_blocks.numel() + plan.weight_blocks.numel()
    assert extra(uneven[favourite]) > extra(even[favourite])
    rows = {member.name: member.module.out_features for member in session.members}
    for plans in (even, uneven):
        spent = sum(16 * extra(plan) * rows[name] for name, plan in plans.items())
        total = sum(member.module.weight.numel() for member in session.members)
        assert 0 < spent <= 0.1 * total
