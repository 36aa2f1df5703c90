"""Fisher information at the linears: against exact second derivatives, and what follows from it."""

import dataclasses

import pytest
import torch
from test_recipe import batches, session_on
from tiny_models import tiny_llama
from torch import nn
from torch.nn import functional as F

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.data import calibrate
from arc_ao.calibration.fisher import measure_fisher
from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.scores import group_worths, worth_of_errors
from arc_ao.outputs.divergence import output_divergence
from arc_ao.outputs.score import score_gradient

CONFIG = ARCConfig(recipe="balanced", budget=0.1, layer_weights="fisher")


class Branches(nn.Module):
    """Two linears of equal weights; the output of the second is scaled by `gain`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.gain = nn.Linear(64, 64), nn.Linear(64, 64), gain
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.gain * self.second(x.flip(1))], dim=-1)


def rows(count: int = 16) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def calibrated(model: nn.Module, data: list[torch.Tensor], config=CONFIG) -> CalibrationSession:
    quantize_(model, config.with_step("prepare"))
    calibrate(model, data, progress=False)
    session = next(o.session for m in model.modules() if (o := observer_on(m)) is not None)
    session.observing = False
    return session


class Logits(dict):
    """An output with a `.logits` key."""


@pytest.mark.parametrize("width", [1, 7])
def test_a_scores_gradient_has_the_hessian_of_kl_as_covariance(width):
    """Mean of g g^T over many sampled labels = second derivative of KL (a single logit: binary)."""
    torch.manual_seed(0)
    logits = torch.randn(width, dtype=torch.float64)
    many = logits.float().expand(1, 60_000, width)
    _, g, count = score_gradient(Logits(logits=many), None, torch.Generator().manual_seed(0))
    covariance = g[0].T.double() @ g[0].double() / count

    def kl(other: torch.Tensor) -> torch.Tensor:
        p, q = (F.pad(v, (1, 0)) if width == 1 else v for v in (logits, other))
        return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")

    exact = torch.autograd.functional.hessian(kl, logits)
    torch.testing.assert_close(covariance, exact, atol=0.01, rtol=0.02)


def test_a_scores_gradient_has_the_hessian_of_cosine_distance_as_covariance():
    torch.manual_seed(0)
    hidden = torch.randn(5, dtype=torch.float64)
    many = hidden.float().expand(1, 60_000, 5)
    _, g, count = score_gradient(many, None, torch.Generator().manual_seed(0))
    covariance = g[0].T.double() @ g[0].double() / count
    distance = lambda other: 1 - F.cosine_similarity(hidden, other, dim=0)
    exact = torch.autograd.functional.hessian(distance, hidden)
    torch.testing.assert_close(covariance, exact, atol=0.01, rtol=0.02)


def test_padding_and_zero_vectors_have_no_gradient():
    hidden = torch.randn(2, 3, 8)
    hidden[0, 0] = 0.0
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    _, g, count = score_gradient(hidden, mask, torch.Generator())
    assert count == 5 and not g[0, 0].any() and not g[0, 2].any() and g[1].all()


def test_predicted_divergence_is_that_of_a_small_error():
    """1/2 sum g^2 e^2 against the divergence that independent errors of that size really cause."""
    model, x = Branches(gain=3.0), rows(512)
    fisher = measure_fisher(model, calibrated(model, [x]), [x])
    reference = model(x)
    noise = 1e-2 * torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    for name in ("first", "second"):
        handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: y + noise)
        measured = output_divergence(reference, model(x))
        handle.remove()
        predicted = 0.5 * 1e-4 * fisher[name].total.item() / fisher[name].count
        assert abs(predicted / measured - 1) < 0.15


def test_sums_are_those_of_gradients_and_errors():
    """Checkpointed blocks, shared inputs and hooks: the same sums as by plain autograd."""
    model, data = tiny_llama(num_hidden_layers=2).float(), batches()
    config = dataclasses.replace(CONFIG, channel_order=None, recipe="auto")
    session = calibrated(model, data, config)
    fisher = measure_fisher(model, session, data)
    inputs, outputs = {}, {}

    def see(module, args, output):
        inputs[module], outputs[module] = args[0], output
        output.retain_grad()

    handles = [m.module.register_forward_hook(see) for m in session.members]
    sums = {m.name: [0.0, 0.0, 0.0] for m in session.members}
    generator = torch.Generator().manual_seed(0)
    for batch in data:
        value, gradient, _ = score_gradient(model(batch), None, generator)
        value.backward(gradient)
        for m in session.members:
            g2 = outputs[m.module].grad.flatten(0, 1).square()
            x = inputs[m.module].detach().flatten(0, 1)
            error = (x - quantized_rows(x, observer_on(m.module).orders()[1])).square()
            for i, part in enumerate((g2.sum(1) @ x.square(), g2.sum(1) @ error, g2.sum(0))):
                sums[m.name][i] = sums[m.name][i] + part
    for handle in handles:
        handle.remove()
    for name, (square, error, output) in sums.items():
        torch.testing.assert_close(fisher[name].token_square.float(), square, rtol=1e-3, atol=0)
        torch.testing.assert_close(fisher[name].token_error[1].float(), error, rtol=1e-2, atol=1e-9)
        torch.testing.assert_close(fisher[name].output.float(), output, rtol=1e-3, atol=1e-12)
        assert fisher[name].count == 2 * 2 * 16


def quantized_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Q(x) of rows with one outer scale each and blocks formed in `order`, by the format's own
    functions."""
    from arc_ao.formats import nvfp4

    inverse = torch.argsort(order)
    parts = [nvfp4.dequantize(*nvfp4.quantize(row[order])) for row in x]
    return torch.stack(parts)[:, inverse]


def test_a_model_is_left_as_it_was():
    """Requires-grad flags, mode, hooks, forward methods; and no gradients remain."""
    model, data = tiny_llama(num_hidden_layers=2).train(), batches()
    session = calibrated(model, data)
    model.model.norm.weight.requires_grad_(False)
    asking = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    measure_fisher(model, session, data)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asking
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all("forward" not in vars(m) for m in model.modules()) and model.training
    assert all(p.grad is None for p in model.parameters()) and model.config.use_cache


def test_a_layer_that_is_heard_louder_weighs_more():
    """Equal layers weigh the same; four times the gain is sixteen times the divergence."""

    def worths(gain: float) -> list[float]:
        model, data = Branches(gain), [rows(256)]
        session = calibrated(model, data)
        fisher = [one.of_order(0) for one in measure_fisher(model, session, data).values()]
        return [worth.item() for worth in worth_of_errors([model.first, model.second], fisher)]

    equal, louder = worths(1.0), worths(4.0)
    assert abs(equal[0] / equal[1] - 1) < 0.3
    assert 12 < louder[1] / louder[0] < 20


def test_worths_of_groups_have_mean_1():
    model = tiny_llama(num_hidden_layers=1)
    session = session_on(model, CONFIG)
    groups = session.groups()
    assert group_worths(session, groups) == [1.0] * 4
    session.fisher = measure_fisher(model, session, batches())
    worths = group_worths(session, groups)
    assert abs(sum(worths) - 4) < 1e-6 and len(set(worths)) == 4


def test_blocks_follow_the_weights():
    """A layer of a thousand times the worth gets its residuals first; the budget stays."""
    model = tiny_llama(num_hidden_layers=1)
    session, resolved = session_on(model, CONFIG), CONFIG.resolve()
    session.fisher = measure_fisher(model, session, batches())
    favourite = "model.layers.0.mlp.down_proj"
    even = make_plans(analyse_session(session, resolved), resolved)
    one = session.fisher[favourite]
    louder = dataclasses.replace(
        one, token_square=one.token_square * 1000, token_error=one.token_error * 1000
    )
    session.fisher, session.analyses = session.fisher | {favourite: louder}, None
    uneven = make_plans(analyse_session(session, resolved), resolved)
    extra = lambda plan: plan.act_blocks.numel() + plan.weight_blocks.numel()
    assert extra(uneven[favourite]) > extra(even[favourite])
    sizes = {member.name: member.module.out_features for member in session.members}
    for plans in (even, uneven):
        spent = sum(16 * extra(plan) * sizes[name] for name, plan in plans.items())
        total = sum(member.module.weight.numel() for member in session.members)
        assert 0 < spent <= 0.1 * total


class Detached(Branches):
    """A model that cannot be differentiated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class Broken(Branches):
    """A model whose gradients overflow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g * float("inf"))
        return y


@pytest.mark.parametrize(
    "kind, reason", [(Detached, "does not depend on the linears"), (Broken, "NaN or Inf")]
)
def test_layers_weigh_the_same_where_there_is_no_gradient(kind, reason):
    """With a warning that says why; quantizing goes on."""
    model, data = kind(), [rows()]
    with pytest.warns(UserWarning, match=f"layers weigh the same.*{reason}"):
        summary = quantize_(model, CONFIG, calibration_data=data, progress=False)
    assert len(summary.layers) == 2


def test_a_block_that_runs_twice_counts_twice():
    """Shared blocks (ALBERT): each call's gradient meets that call's own input."""

    class Twice(nn.Module):
        def __init__(self, blocks: nn.ModuleList) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.blocks, *self.blocks):
                x = x + block(x)
            return x

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).tanh()

    torch.manual_seed(0)
    model, x = Twice(nn.ModuleList([Block(), Block()])), rows()
    session = calibrated(model, [x])
    fisher = measure_fisher(model, session, [x])
    expected = {m.name: 0.0 for m in session.members}

    def see(name):
        def hook(module, args, output):
            x = args[0].detach()
            add = lambda g: expected.update({name: expected[name] + g.square().sum(1) @ x.square()})
            output.register_hook(add)

        return hook

    for member in session.members:
        member.module.register_forward_hook(see(member.name))
    value, gradient, _ = score_gradient(model(x), None, torch.Generator().manual_seed(0))
    value.backward(gradient)
    for name, square in expected.items():
        torch.testing.assert_close(fisher[name].token_square.float(), square, rtol=1e-3, atol=0)
