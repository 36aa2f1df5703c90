"""GPTQ: against its literal definition, against rounding to nearest, and on degenerate inputs."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.methods import gptq
from arc_ao.methods.gptq import prepare_rounding, round_weight
from arc_ao.methods.gram import Gram, effective_input
from arc_ao.methods.scale_search import choose_scales
from arc_ao.methods.weights import LayerPlan, analyse_weight, in_order, quantize_weight
from arc_ao.tensor import ARCTensor, arc_linear


def correlated(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs [tokens, channels] of a few strong directions, with channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, max(2, channels // 4), generator=generator)
    mixing = torch.randn(hidden.shape[1], channels, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(tokens, channels, generator=generator)
    return (hidden @ mixing + 0.5 * noise) * torch.linspace(0.3, 3.0, channels)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def plan_for(weight: Tensor, x: Tensor, **settings) -> LayerPlan:
    """A plan whose blocks and orders are given; scales are found as in the real flow."""
    fields = {"act_blocks": ids(), "weight_blocks": ids(), "channel_order": None}
    fields |= {k: settings.pop(k) for k in list(settings) if k in LayerPlan.__annotations__}
    fixed = {"rounding": "gptq", "damping": 0.02}
    config = ARCConfig(recipe="balanced", **(fixed | settings)).resolve()
    square = in_order(x.square().mean(0), fields["channel_order"])
    amax = weight.abs().amax()
    scale = analyse_weight(weight, amax, config, fields["channel_order"], square).scale
    return LayerPlan(config, amax, scale, **fields, mean_square=square)


def gram_of(x: Tensor, plan: LayerPlan) -> Tensor:
    gram = Gram(plan)
    gram.add(x)
    return gram.take()


def rounded(weight: Tensor, x: Tensor, plan: LayerPlan) -> ARCTensor:
    return round_weight(weight, plan, prepare_rounding(lambda: gram_of(x, plan), plan, ["layer"]))


def same(left: ARCTensor, right: ARCTensor) -> bool:
    return torch.equal(left.qdata, right.qdata) and torch.equal(left.scale, right.scale)


def literal_gptq(weight: Tensor, plan: LayerPlan, gram: Tensor) -> Tensor:
    """Dequantized weight [N, K16] by GPTQ as published: fp64, one column at a time, the Cholesky
    factor of the inverse, every later column updated at once."""
    target = in_order(weight, plan.channel_order) * nvfp4.inverse_outer_scale(plan.amax)
    blocks, method = nvfp4.to_blocks(target), plan.config.weight_scale
    local = torch.stack([b for b in gptq._diagonal_blocks(gram)])
    scale = choose_scales(blocks, method, local)
    left = blocks - nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale)
    fine = choose_scales(left, method, local)
    order = gptq._order(gram.diagonal(), plan).flip(0)
    hessian = gram.double()[order][:, order]
    live = gram.double().diagonal()[gram.diagonal() > 0]
    hessian += plan.config.damping * live.mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w, q = target.double()[:, order].clone(), torch.zeros(target.shape, dtype=torch.float64)
    for i, column in enumerate(order.tolist()):
        block = column // 16
        value = nearest(w[:, i], scale[:, block])
        if block in plan.weight_blocks.tolist():
            value = value + nearest(w[:, i] - value, fine[:, block])
        q[:, column] = value
        w[:, i:] -= torch.outer((w[:, i] - value) / upper[i, i], upper[i, i:])
    return q * nvfp4.outer_scale(plan.amax).double()


def nearest(values: Tensor, scale: Tensor) -> Tensor:
    codes = nvfp4.encode_e2m1((values / scale.double()).float())
    return nvfp4.decode_e2m1(codes).double() * scale.double()


@pytest.mark.parametrize(
    "columns, settings",
    [
        (64, {}),
        (64, {"weight_blocks": ids(1, 2)}),
        (272, {"weight_blocks": ids(0, 16)}),  # more than two groups of columns, the last ragged
        (16, {}),
        (40, {"pad_in_features": True, "weight_blocks": ids(2)}),  # padded to 48
        (64, {"weight_scale": "local_hessian"}),
        (64, {"channel_order": torch.arange(63, -1, -1, dtype=torch.int32), "act_blocks": ids(1)}),
    ],
    ids=["plain", "residual", "groups", "one block", "padded", "local Hessian", "sorted"],
)
def test_equals_the_published_algorithm(columns, settings):
    """Elimination without the inverse in fp32 gives the values of the literal fp64 loop."""
    x, weight = correlated(200, columns), weights(24, columns)
    plan = plan_for(weight, x, **settings)
    mine = rounded(weight, x, plan).dequantize(torch.float32)
    theirs = literal_gptq(weight, plan, gram_of(x, plan))[:, :columns]
    if plan.channel_order is not None:
        theirs = torch.empty_like(theirs).index_copy_(1, plan.channel_order.long(), theirs)
    differing = (mine - theirs).abs() > 1e-5 * plan.amax
    # A tie that fp32 breaks the other way changes the rest of its row; the other rows agree.
    assert differing.any(1).float().mean() <= 1 / 24
    nearest_too = quantize_weight(weight, plan).dequantize(torch.float32)
    assert (mine - nearest_too).abs().gt(1e-5).float().mean() > 0.05


@pytest.mark.parametrize("settings", [{}, {"weight_blocks": ids(0, 3)}, {"weight_scale": "amax"}])
def test_independent_channels_reduce_to_nearest(settings):
    """A diagonal Hessian has nothing to compensate with: the bits of rounding to nearest."""
    weight, x = weights(24, 64), correlated(64, 64)
    plan = plan_for(weight, x, **settings)
    diagonal = torch.diag(plan.mean_square)
    assert same(
        round_weight(weight, plan, prepare_rounding(lambda: diagonal, plan, ["layer"])),
        quantize_weight(weight, plan),
    )


def output_error(weight: Tensor, tensor: ARCTensor, x: Tensor, plan: LayerPlan) -> float:
    """Squared error on quantized inputs; what is compared differs in its weights alone."""
    met = effective_input(x, plan)[:, : weight.shape[1]]
    if plan.channel_order is not None:
        met = torch.empty_like(met).index_copy_(1, plan.channel_order.long(), met)
    return (met @ (weight - tensor.dequantize(torch.float32)).T).square().sum().item()


@pytest.mark.parametrize("weight_scale", ["amax", "mse", "four_over_six", "local_hessian"])
def test_beats_nearest_on_tokens_it_has_not_seen(weight_scale):
    weight, x, unseen = weights(64, 128), correlated(1024, 128), correlated(256, 128, seed=5)
    plan = plan_for(weight, x, weight_scale=weight_scale, damping=0.02)
    better = output_error(weight, rounded(weight, x, plan), unseen, plan)
    assert better < 0.5 * output_error(weight, quantize_weight(weight, plan), unseen, plan)


def test_local_hessian_scales_beat_mse_for_rounding_to_nearest():
    """Errors of a block's channels that cancel in its outputs cost nothing."""
    weight, x = weights(64, 128), correlated(1024, 128)
    plans = [
        plan_for(weight, x, rounding="nearest", weight_scale=m) for m in ("local_hessian", "mse")
    ]
    local, mse = (output_error(weight, rounded(weight, x, p), x, p) for p in plans)
    assert local < 0.95 * mse


def test_knowing_of_residuals_beats_adding_them_afterwards():
    """Residual columns in the loop against residuals of a GPTQ that did not expect them."""
    weight, x = weights(64, 128), correlated(1024, 128)
    plan = plan_for(weight, x, weight_blocks=ids(0, 3, 7), damping=0.02)
    without = plan_for(weight, x, damping=0.02)
    aware = output_error(weight, rounded(weight, x, plan), x, plan)
    base = rounded(weight, x, without).dequantize(torch.float32)
    residual = nvfp4.to_blocks(weight - base)
    afterwards = nvfp4.to_blocks(base.clone())
    codes, scale = nvfp4.quantize_blocks(residual * nvfp4.inverse_outer_scale(plan.amax))
    correction = nvfp4.decode_blocks(codes, scale) * nvfp4.outer_scale(plan.amax)
    chosen = plan.weight_blocks.long()
    afterwards[:, chosen] += correction[:, chosen]
    error = effective_input(x, plan) @ (weight - afterwards.flatten(1)).T
    assert aware < 0.8 * error.square().sum().item()


@pytest.mark.parametrize("settings", [{"act_blocks": ids(1, 3)}, {"act_channels": ids(*range(16))}])
def test_the_hessian_is_of_what_the_stored_columns_meet(settings):
    """The operators' output is `effective_input` times the stored columns, copies included."""
    weight, x = weights(24, 64), correlated(33, 64)
    plan = plan_for(weight, x, **settings)
    tensor = rounded(weight, x, plan)
    stored = nvfp4.decode(tensor.qdata, tensor.scale) * tensor.outer_scale
    expected = effective_input(x, plan) @ stored.T
    torch.testing.assert_close(arc_linear(x, tensor), expected, rtol=1e-4, atol=1e-3)


def test_scales_left_open_are_those_of_the_analysis():
    """A plan without scales, as block by block quantization keeps it, rounds to the same bits."""
    weight, x = weights(24, 64), correlated(64, 64)
    plan = plan_for(weight, x, weight_blocks=ids(1))
    left_open = dataclasses.replace(plan, scale=None)
    assert same(quantize_weight(weight, left_open), quantize_weight(weight, plan))
    assert same(rounded(weight, x, left_open), rounded(weight, x, plan))


def test_chunks_of_rows_change_no_bit(monkeypatch):
    weight, x = weights(10, 64), correlated(100, 64)
    plan = plan_for(weight, x, weight_blocks=ids(2))
    whole = rounded(weight, x, plan)
    monkeypatch.setattr(gptq, "CHUNK_ELEMENTS", 3 * 64)
    parts = rounded(weight, x, plan)
    differing = (whole.qdata != parts.qdata).any(1).sum()
    assert differing <= 1  # BLAS may add in another order for another number of rows


def degenerate(name: str) -> Tensor:
    x = correlated(64, 64)
    return {
        "zero": torch.zeros_like(x),
        "constant": torch.ones_like(x),
        "one token": x[:1],
        "rank two": x[:, :2] @ x[:2],
        "dead channels": x * (torch.arange(64) % 3 > 0),
        "dead block": x * (torch.arange(64) >= 16),
        "huge": x * 1e15,
        "tiny": x * 1e-15,
    }[name]


@pytest.mark.parametrize(
    "name",
    "zero|constant|one token|rank two|dead channels|dead block|huge|tiny".split("|"),
)
def test_degenerate_inputs_give_weights_no_worse_than_nearest(name):
    """Finite, no warning, and on its own inputs an error of at most that of nearest (plus 1 %)."""
    x, weight = degenerate(name), weights(24, 64)
    plan = plan_for(weight, x, weight_blocks=ids(1), damping=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = rounded(weight, x, plan)
    assert torch.isfinite(tensor.dequantize()).all()
    mine = output_error(weight, tensor, x, plan)
    assert mine <= 1.01 * output_error(weight, quantize_weight(weight, plan), x, plan)
    if name == "zero":
        assert same(tensor, quantize_weight(weight, plan))


def test_damping_is_raised_until_the_hessian_factors():
    """A matrix that is not positive definite needs more than was asked for, and says nothing."""
    weight, x = weights(8, 32), correlated(64, 32)
    plan = plan_for(weight, x, damping=0.01)
    gram = gram_of(x, plan)
    shift = torch.linalg.eigvalsh(gram)[0] + 0.5 * gram.diagonal().mean()
    indefinite = gram - shift * torch.eye(32)
    gram.copy_(indefinite).diagonal().clamp_(min=1e-3)
    assert torch.linalg.cholesky_ex(gram).info > 0
    rounding = prepare_rounding(lambda: gram, plan, ["layer"])
    assert rounding.lower is not None and torch.isfinite(rounding.lower).all()


@pytest.mark.parametrize("gram", [None, torch.full((32, 32), torch.nan)], ids=["none", "NaN"])
def test_without_a_hessian_one_warning_names_the_layers(gram):
    weight, x = weights(8, 32), correlated(64, 32)
    plan = plan_for(weight, x)
    with pytest.warns(UserWarning, match="q_proj, k_proj: .*rounding to nearest") as caught:
        assert prepare_rounding(lambda: gram, plan, ["q_proj", "k_proj"]) is None
    assert len(caught) == 1


def test_a_hopeless_hessian_is_rounded_to_nearest():
    weight = weights(8, 32)
    plan = plan_for(weight, torch.ones(64, 32))
    gram = -1e6 * torch.ones(32, 32)
    gram.diagonal().fill_(1.0)
    with pytest.warns(UserWarning, match="layer: .*not positive definite"):
        rounding = prepare_rounding(lambda: gram, plan, ["layer"])
    assert same(round_weight(weight, plan, rounding), quantize_weight(weight, plan))


def test_masked_tokens_do_not_count():
    """Padding that a model computes but nobody reads."""
    x, weight = correlated(24, 32).reshape(2, 12, 32), weights(8, 32)
    plan, keep = plan_for(weight, x.flatten(0, 1)), torch.ones(24, dtype=torch.bool)
    keep[17:] = False
    masked, dropped = Gram(plan), Gram(plan)
    masked.add(x, keep)
    dropped.add(torch.cat([x[0], x[1, :5]]))
    assert masked.count == 17
    torch.testing.assert_close(masked.take(), dropped.take())
