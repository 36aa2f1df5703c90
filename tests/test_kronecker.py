"""Rounding by Kronecker factors: the factors, the objective, and the whole call."""

import copy
import warnings

import pytest
import torch
from test_fisher import calibrated
from test_gptq import correlated, gram_of, plan_for, weights
from test_recipe import batches
from tiny_models import tiny_llama
from torch import Tensor

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.fisher import OutputFisher, measure_fisher
from arc_ao.methods import kronecker
from arc_ao.methods.gptq import prepare_rounding, round_weight
from arc_ao.methods.gram import Gram, effective_input
from arc_ao.methods.held_error import held_error
from arc_ao.methods.output_factor import output_factor, tiled
from arc_ao.methods.weights import quantize_weight
from arc_ao.ops.round_columns import TILE_ROWS
from arc_ao.outputs.score import score_gradient


def products_of(gradients: Tensor) -> Tensor:
    """Diagonal blocks of g^T g of gradients [M, N]."""
    tiles = tiled(gradients).movedim(1, 0)
    return tiles.mT @ tiles


@pytest.mark.parametrize("rows", [64, 100, 192])
def test_the_factor_reproduces_the_products(rows):
    gradients = correlated(512, rows, seed=3)
    factor = output_factor(products_of(gradients), rows, 0.1)
    assert torch.equal(factor.order.sort().values, torch.arange(rows))
    assert torch.equal(factor.order // TILE_ROWS, torch.arange(rows) // TILE_ROWS)
    damped = products_of(gradients) / gradients.square().sum(0).mean()
    damped.diagonal(dim1=1, dim2=2).add_(0.1)
    for tile, upper in enumerate(factor.upper):
        mine = factor.order[tile * TILE_ROWS : (tile + 1) * TILE_ROWS] - tile * TILE_ROWS
        found = (upper @ upper.T)[: len(mine), : len(mine)]
        torch.testing.assert_close(found, damped[tile][mine][:, mine], rtol=1e-3, atol=1e-4)
        assert not upper.tril(-1).any()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_factor_of_outputs_that_do_not_matter(value):
    assert output_factor(torch.full((1, 64, 64), value), 64, 0.1) is None


@pytest.mark.parametrize("settings", [{}, {"weight_blocks": torch.tensor([0, 3]).int()}])
@pytest.mark.parametrize("rows", [64, 100])
def test_the_error_that_counts_is_less(rows, settings):
    """On the inputs it was fitted to, against GPTQ of the inputs alone and against nearest."""
    weight, x = weights(rows, 64), correlated(2048, 64)
    factor = output_factor(products_of(correlated(2048, rows, seed=5)), rows, 0.02)
    plan = plan_for(weight, x, **settings)
    rounding = prepare_rounding(lambda: gram_of(x, plan), plan, ["layer"])
    seen = effective_input(x, plan)
    both, inputs = (round_weight(weight, plan, rounding, f) for f in (factor, None))
    errors = [
        held_error(weight, t, plan, seen, factor)
        for t in (both, inputs, quantize_weight(weight, plan))
    ]
    assert errors[0] < 0.9 * errors[1] < 0.9 * errors[2]
    assert held_error(weight, inputs, plan, seen) < held_error(weight, both, plan, seen)


def test_rows_in_parts_of_tiles_are_the_same(monkeypatch):
    from arc_ao.methods import gptq

    weight, x = weights(200, 64), correlated(2048, 64)
    factor = output_factor(products_of(correlated(2048, 200, seed=5)), 200, 0.02)
    plan = plan_for(weight, x)
    rounding = prepare_rounding(lambda: gram_of(x, plan), plan, ["layer"])
    whole = round_weight(weight, plan, rounding, factor)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 64)
    parts = round_weight(weight, plan, rounding, factor)
    assert torch.equal(whole.qdata, parts.qdata) and torch.equal(whole.scale, parts.scale)


def test_factors_are_those_of_plain_autograd():
    model, data = tiny_llama(num_hidden_layers=2).float(), batches()
    session = calibrated(model, data)
    fisher = measure_fisher(model, session, data, kronecker=True)
    outputs = {}

    def see(module, args, output):
        outputs[module] = output
        output.retain_grad()

    handles = [m.module.register_forward_hook(see) for m in session.members]
    generator, found = torch.Generator().manual_seed(0), {m.name: [] for m in session.members}
    for batch in data:
        value, gradient, _ = score_gradient(model(batch), None, generator)
        value.backward(gradient)
        for m in session.members:
            found[m.name].append(outputs[m.module].grad.flatten(0, 1))
    for handle in handles:
        handle.remove()
    for name, calls in found.items():
        mine = fisher[name]
        for call, (tokens,) in zip(calls, mine.tokens, strict=True):
            torch.testing.assert_close(tokens, call.square().sum(1), rtol=1e-3, atol=1e-12)
        expected = products_of(torch.cat(calls))
        torch.testing.assert_close(mine.products, expected, rtol=1e-3, atol=1e-9)
    assert all(f.products is None for f in measure_fisher(model, session, data).values())


def test_inputs_are_weighed_on_some_batches_and_gradients_kept_of_all():
    model, data = tiny_llama(num_hidden_layers=2).float(), batches()
    session = calibrated(model, data)
    whole = measure_fisher(model, session, data, kronecker=True)
    first = measure_fisher(model, session, data[:1])
    part = measure_fisher(model, session, data, [0], kronecker=True)
    for name, mine in part.items():
        assert mine.count == first[name].count < whole[name].count
        torch.testing.assert_close(mine.token_square, first[name].token_square)
        torch.testing.assert_close(mine.token_error, first[name].token_error)
        torch.testing.assert_close(mine.products, whole[name].products)
        assert len(mine.tokens) == len(data) and not first[name].tokens


def fisher_of(*tokens: Tensor) -> OutputFisher:
    """Of one call a batch."""
    calls = [[call] for call in tokens]
    return OutputFisher(torch.ones(4), torch.ones(1, 4), torch.ones(4), tokens=calls)


def test_weights_of_tokens_are_means_over_the_linears_of_an_input():
    one = fisher_of(torch.tensor([1.0, 3.0]), torch.tensor([2.0]))
    two = fisher_of(torch.tensor([10.0, 10.0]), torch.tensor([40.0]))
    (first,), (second,) = kronecker.token_weights([one, two])
    torch.testing.assert_close(first, torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(second, torch.tensor([1.5]))
    assert kronecker.token_weights([one, None]) is None
    assert kronecker.token_weights([one, fisher_of(torch.zeros(2), torch.zeros(1))]) is None
    spike = torch.cat((torch.tensor([1e6]), torch.ones(999)))
    assert kronecker.token_weights([fisher_of(spike)])[0][0].max() == kronecker.MOST_WEIGHT


def test_sums_take_the_weights_of_tokens():
    x = correlated(512, 64)
    plan = plan_for(weights(16, 64), x)
    some, all_of_them = Gram(plan), Gram(plan)
    share = torch.rand(512, generator=torch.Generator().manual_seed(0))
    some.add(x, weights=share)
    all_of_them.add(x)
    kept, of_rows = some.held.rows(), some.held.row_weights()
    assert len(kept) == len(of_rows) > 0
    others = ~torch.isin(share, of_rows)
    met = effective_input(x[others], plan)
    expected = (met * share[others].unsqueeze(1)).T @ met / share[others].sum()
    torch.testing.assert_close(some.take(), expected, rtol=1e-4, atol=1e-4)
    assert all_of_them.held.row_weights() is None


def quantized(**settings) -> tuple[torch.nn.Module, object]:
    model = tiny_llama(num_hidden_layers=2)
    config = ARCConfig(recipe="balanced", budget=0.1, rounding="gptq", **settings)
    summary = quantize_(model, config, calibration_data=batches(), progress=False)
    return model, summary


def test_one_call_rounds_by_them():
    (mine, summary), (other, _) = quantized(hessian="kronecker"), quantized(hessian="inputs")
    assert any(layer["rounding"] == "gptq" for layer in summary.layers.values())
    differs = [
        not torch.equal(a.weight.qdata, b.weight.qdata)
        for a, b in zip(mine.modules(), other.modules(), strict=True)
        if hasattr(getattr(a, "weight", None), "qdata")
    ]
    assert any(differs)


def test_a_model_that_cannot_be_differentiated_goes_by_its_inputs(monkeypatch):
    from arc_ao.flow import planning

    monkeypatch.setattr(planning, "measure_fisher", lambda *args, **kwargs: None)
    (mine, _), (other, _) = quantized(hessian="kronecker"), quantized(hessian="inputs")
    for a, b in zip(mine.modules(), other.modules(), strict=True):
        if hasattr(getattr(a, "weight", None), "qdata"):
            assert torch.equal(a.weight.qdata, b.weight.qdata)


def test_the_three_steps_say_that_they_go_by_the_inputs():
    config = ARCConfig(recipe="balanced", budget=0.1, rounding="gptq", hessian="kronecker")
    model = tiny_llama(num_hidden_layers=1)
    session_model = copy.deepcopy(model)
    quantize_(session_model, config.with_step("prepare"))
    for batch in batches():
        session_model(batch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quantize_(session_model, config.with_step("convert"))
    assert any("cannot measure hessian" in str(w.message) for w in seen)


def test_layers_that_weigh_the_same_are_not_weighed_by_the_way():
    """The backward pass of the factors must not change which residuals are chosen."""
    (mine, _), (other, _) = (
        quantized(hessian=hessian, layer_weights="equal") for hessian in ("kronecker", "inputs")
    )
    for a, b in zip(mine.modules(), other.modules(), strict=True):
        if hasattr(getattr(a, "weight", None), "qdata"):
            assert torch.equal(a.weight.act_blocks, b.weight.act_blocks)
            assert torch.equal(a.weight.weight_blocks, b.weight.weight_blocks)
