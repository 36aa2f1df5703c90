"""Which token a weight belongs to: calls without gradients, routed tokens, padding, resumption."""

import pytest
import torch
from test_fisher import calibrated
from test_gptq import correlated, plan_for, weights
from test_kronecker import fisher_of
from test_recipe import batches
from tiny_models import tiny_llama
from torch import Tensor, nn

from arc_ao import ARCConfig, calibrate, quantize_
from arc_ao.calibration.fisher import OutputFisher, measure_fisher
from arc_ao.calibration.input_gram import token_weights as energy_weights
from arc_ao.calibration.session import Member, observer_on
from arc_ao.flow import sequential
from arc_ao.methods import kronecker, measured
from arc_ao.methods.gptq import damping_for
from arc_ao.methods.gram import Gram
from arc_ao.methods.held_error import held_rows


class Twice(nn.Module):
    """Calls one linear twice; how often its first output counts is `first`."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.linear(x), self.linear(2 * x)
        one = one * self.first if self.first else one.detach()
        return self.head(torch.relu(one + two))


class LateRerun(nn.Module):
    """A block in which gradients of both calls arrive before the block runs a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.linear = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        nonlinear = torch.relu(self.other(x))
        return nonlinear + self.linear(x) + 3 * self.linear(2 * x)


class Chain(nn.Module):
    """One such block and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers, self.head = nn.ModuleList([LateRerun()]), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[0](x))


def inputs(count: int = 2, tokens: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, 32, generator=generator) for _ in range(count)]


def test_a_call_without_gradient_keeps_its_place():
    model, data = Twice(0.0), inputs()
    fisher = measure_fisher(model, calibrated(model, data), data, kronecker=True)["linear"]
    for first, second in fisher.tokens:
        assert first.shape == second.shape == (24,)
        assert not first.any() and second.all()
    assert fisher.rows == 48  # of 96 that it read
    (first, second), _ = kronecker.token_weights([fisher])
    assert not first.any() and second.mean() > 0.5


@pytest.mark.parametrize("model,name", [(Twice(0.5), "linear"), (Chain(), "layers.0.linear")])
def test_calls_are_in_order(model, name):
    """The second call's output counts 2 or 3 times as much: 4 or 9 times the squares."""
    data = inputs()
    fisher = measure_fisher(model, calibrated(model, data), data, kronecker=True)[name]
    ratio = 4 if name == "linear" else 9
    for first, second in fisher.tokens:
        torch.testing.assert_close(second, ratio * first, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kronecker", [False, True])
def test_a_block_that_keeps_nothing_for_its_backward_pass_is_measured(kronecker):
    """Where the down projections alone are quantized, nothing before the first asks for more."""
    model, data = tiny_llama(num_hidden_layers=2), batches()
    config = ARCConfig(recipe="best").with_step("prepare")
    quantize_(model, config, filter_fn=lambda module, name: "down_proj" in name)
    calibrate(model, data, progress=False)
    session = observer_on(model.model.layers[0].mlp.down_proj).session
    found = measure_fisher(model, session, data, kronecker=kronecker)
    assert len(found) == 2
    for fisher in found.values():
        assert fisher.total > 0 and (fisher.token_square > 0).all()
        assert not kronecker or fisher.rows == fisher.count


def test_weights_of_a_batch_meet_its_calls(monkeypatch):
    """An expert that a batch does not call leaves the weights of the next one alone."""
    seen = []

    class Spy(Gram):
        def add(self, x, keep=None, *, weights=None):
            seen.append(weights)

    monkeypatch.setattr(sequential, "Gram", Spy)
    called, plan = nn.Linear(64, 64), plan_for(weights(64, 64), correlated(64, 64))

    class Routed(nn.Module):
        def forward(self, x):
            return called(x) if x.sum() > 0 else x

    batches = [-torch.ones(3, 64), torch.ones(3, 64)]
    chain = sequential._Chain([Routed()], None, batches, {called: 1}, [{}, {}])
    per_batch = [[torch.full((3,), float(i))] for i in range(2)]
    chain.gather(0, called, plan, per_batch)
    assert len(seen) == 1 and torch.equal(seen[0], per_batch[1][0])


def test_weights_of_routed_tokens_are_let_go():
    batch = torch.zeros(1, 4, dtype=torch.int64)
    steady, routed = (
        fisher_of(torch.ones(4), torch.ones(4)),
        fisher_of(torch.ones(3), torch.ones(1)),
    )
    longer = fisher_of(torch.ones(4), torch.ones(8))
    kronecker.forget_routed_tokens(steady, [batch, batch])
    kronecker.forget_routed_tokens(routed, [batch, {"input_ids": batch}])  # cannot be compared
    kronecker.forget_routed_tokens(longer, [batch, torch.zeros(1, 8, dtype=torch.int64)])
    assert steady.tokens and routed.tokens and longer.tokens
    kronecker.forget_routed_tokens(routed, [batch, batch])
    assert kronecker.token_weights([routed]) is None


def test_padding_changes_neither_weights_nor_damping(monkeypatch):
    cost = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1
    padded = fisher_of(torch.cat((cost, torch.zeros(6400))))
    ((bare,),) = kronecker.token_weights([fisher_of(cost)])
    ((mine,),) = kronecker.token_weights([padded])
    torch.testing.assert_close(mine[:64], bare)
    assert not mine[64:].any()
    dampings = []
    monkeypatch.setattr(kronecker, "output_factor", lambda *args: dampings.append(args[2]))
    padded.products, padded.rows = torch.ones(1, 64, 64), 64
    kronecker.factor_of(padded, nn.Linear(32, 16))
    assert dampings == [damping_for(64, 16)]


def test_tokens_that_weigh_nothing_are_not_counted_for_damping():
    gram = Gram(plan_for(weights(16, 64), correlated(64, 64)))
    gram.add(correlated(256, 64), weights=torch.cat((torch.ones(16), torch.zeros(240))))
    assert gram.tokens + len(gram.held.rows()[:2]) == 16  # two groups of 8: one row each aside
    assert gram.count == 256


def test_rows_kept_aside_that_weigh_nothing_judge_by_their_energies():
    """Without any, GPTQ would not have to show anything."""
    plan, x = plan_for(weights(16, 64), correlated(64, 64)), correlated(64, 64)
    gram = Gram(plan)
    gram.add(x, weights=torch.zeros(64))
    rows, kept = gram.held.rows(), held_rows(gram, plan)
    assert (
        kept.square().sum() > 0.5 * (rows * energy_weights(rows).sqrt().unsqueeze(1)).square().sum()
    )


def test_what_is_taken_over_lies_where_its_linear_does():
    fisher = OutputFisher(
        torch.ones(32), torch.ones(1, 32), torch.ones(16), 4, [[torch.ones(3)], []], None, 3
    )
    fisher.products = torch.ones(1, 64, 64)
    linear = nn.Linear(32, 16, device="meta")
    found = {"output_tokens": {"a": 4}, "rows": {"a": 3}, "calls": {"a": [[3], []]}}
    taken = measured._fisher_of(Member("a", linear), measured._tensors_of("a", fisher), found)
    parts = [
        taken.token_square,
        taken.token_error,
        taken.output,
        taken.products,
        taken.tokens[0][0],
    ]
    assert {part.device.type for part in parts} == {"meta"}
    assert [[len(call) for call in batch] for batch in taken.tokens] == [[3], []]
    assert (taken.count, taken.rows) == (4, 3)


def test_a_warning_says_what_rounding_goes_by():
    class Cut(Twice):
        def forward(self, x):
            return super().forward(x).detach()

    model, data = Cut(1.0), inputs()
    session = calibrated(model, data, ARCConfig(recipe="best"))
    with pytest.warns(UserWarning, match="rounded by their inputs alone.*hessian='inputs'"):
        assert measure_fisher(model, session, data, kronecker=True) is None
