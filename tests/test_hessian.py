"""GPTQ and local Hessians in the three steps and the graph flow: from sums of input products."""

import dataclasses
import warnings

import pytest
import torch
from test_gptq import correlated
from test_quantize import assert_same_tensors, batches, same_logits, small_llama, three_steps
from tiny_models import NormedPair
from torch import nn

import arc_ao
from arc_ao import ARCConfig, ARHQConfig, SERQConfig, SVDQuantConfig, quantize_
from arc_ao.calibration.input_gram import InputGram
from arc_ao.calibration.session import observer_on
from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import hadamard_signs
from arc_ao.methods.gram import Gram
from arc_ao.methods.hessian import planned_hessian
from arc_ao.methods.prepare import Preparation
from arc_ao.methods.weights import LayerPlan
from arc_ao.summary import arc_tensors

GPTQ = {"recipe": "balanced", "rounding": "gptq"}
FAMILY = {
    "plain": ARCConfig(**GPTQ, budget=0.0),
    "ARC": ARCConfig(**GPTQ, budget=0.2),
    "sorted channels": ARCConfig(
        **GPTQ, budget=0.2, granularity="channel", channel_order="amax", exchange_rate=0.1
    ),
    "local Hessian": ARCConfig(recipe="balanced", weight_scale="local_hessian", budget=0.2),
    "smoothed, rotated": ARCConfig(**GPTQ, smooth="search", rotation=16),
    "SERQ": SERQConfig(budget=0.1, rounding="gptq"),
    "SVDQuant": SVDQuantConfig(rank=4, branch_iterations=2, rounding="gptq"),
    "ARHQ": ARHQConfig(rank=4, rounding="gptq", budget=0.1),
    "W4A16": ARCConfig(**GPTQ, budget=0.2, activation="bf16"),
}
methods = pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
CHANNELS, OUTPUTS = 128, 64
X = correlated(1024, CHANNELS)
UNSEEN = correlated(512, CHANNELS, seed=1)


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(CHANNELS, OUTPUTS, bias=False)).requires_grad_(False)
    model[0].weight.copy_(
        torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(2))
    )
    return model


def in_steps(model: nn.Module, config: ARCConfig, data: list[torch.Tensor]) -> nn.Module:
    quantize_(model, config.with_step("prepare"))
    for batch in data:
        model(batch)
    quantize_(model, config.with_step("convert"), progress=False)
    return model


def output_error(model: nn.Module) -> float:
    expected = linear()(UNSEEN)
    return ((model(UNSEEN) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "settings", [{}, {"budget": 0.2}, {"weight_scale": "local_hessian"}, {"smooth": "awq"}]
)
def test_one_linear_is_that_of_the_one_call(settings):
    """Unquantized inputs (W4A16) and no layer before it: the two Hessians are one, bit for bit."""
    config = ARCConfig(**GPTQ | {"budget": 0.0} | settings, activation="bf16")
    one, data = linear(), list(X.split(256))
    quantize_(one, config, calibration_data=data, progress=False)
    assert_same_tensors(one, in_steps(linear(), config, data))


@methods
def test_one_linear_is_as_good_as_that_of_the_one_call(config):
    """Quantized inputs: only their rounding is missing in the Hessian. Far better than nearest."""
    one, data = linear(), list(X.split(256))
    quantize_(one, config, calibration_data=data, progress=False)
    steps = output_error(in_steps(linear(), config, data))
    nearest = dataclasses.replace(config, rounding="nearest", weight_scale="mse")
    assert steps < 1.02 * output_error(one)
    gain = 0.99 if config.weight_scale == "local_hessian" else 0.97
    assert steps < gain * output_error(in_steps(linear(), nearest, data))


@methods
def test_the_graph_flow_gives_the_bits_of_the_three_steps(config):
    """Two linears behind one input, one after them, biases; sums over two batches."""
    data = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).bfloat16().unbind()
    pair = lambda: NormedPair().bfloat16().requires_grad_(False)
    steps = in_steps(pair(), config, data)
    prepared = arc_ao.prepare_arc(torch.export.export(pair(), (data[0],)), config)
    for batch in data:
        prepared(batch)
    assert torch.equal(arc_ao.convert_arc(prepared)(data[1]), steps(data[1]))


def test_torchaos_own_steps_on_a_language_model():
    """Through its quantize_, module by module: the same tensors, nothing left behind; q, k and v
    are measured once."""
    mine, theirs = small_llama(), small_llama()
    config = FAMILY["ARC"]
    three_steps(theirs, config)
    quantize_(mine, config.with_step("prepare"))
    with torch.no_grad():
        for batch in batches():
            mine(batch)
    attention = mine.model.layers[0].self_attn
    counts = [observer_on(m).gram.count for m in (attention.q_proj, attention.k_proj)]
    assert counts == [sum(b.numel() for b in batches()), 0]
    quantize_(mine, config.with_step("convert"), progress=False)
    assert_same_tensors(mine, theirs)
    assert same_logits(mine, theirs)
    assert not [n for n, _ in mine.named_modules() if "observer" in n]


def test_best_takes_what_the_steps_can_have():
    """GPTQ yes; nothing is searched or weighed, with one warning; the balanced recipe's bits."""
    best, balanced = small_llama(), small_llama()
    with pytest.warns(UserWarning, match="the three steps cannot measure .*layer_weights"):
        three_steps(best, ARCConfig(recipe="best"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*expected at least 10 calibration tokens")
        three_steps(balanced, ARCConfig(**GPTQ))
    for name, tensor in arc_tensors(best).items():
        assert torch.equal(tensor.qdata, arc_tensors(balanced)[name].qdata)


def test_conversion_without_products_is_refused():
    """Prepared for rounding to nearest, or filled from a state_dict; the model stays prepared."""
    gptq, nearest = ARCConfig(**GPTQ), ARCConfig(recipe="balanced")
    model, filled = linear(), linear()
    for some, config in ((model, nearest), (filled, gptq)):
        quantize_(some, config.with_step("prepare"))
        some(X)
    empty = linear()
    quantize_(empty, gptq.with_step("prepare"))
    empty.load_state_dict(filled.state_dict())
    for some in (model, empty):
        with pytest.raises(ValueError, match="^0: expected the sums of input products"):
            quantize_(some, gptq.with_step("convert"))
        assert observer_on(some[0]) is not None
    with pytest.raises(ValueError, match="0: expected calibration tokens, found none"):
        in_steps(linear(), gptq, [])


@pytest.mark.parametrize("order", [None, torch.arange(63, -1, -1, dtype=torch.int32)])
@pytest.mark.parametrize("size", [0, 16])
def test_the_planned_hessian_is_that_of_transformed_inputs(order, size):
    """Scaled, rotated and sorted sums against sums of scaled, rotated and sorted inputs."""
    x, none = correlated(200, 64), torch.zeros(0, dtype=torch.int32)
    scale = torch.exp2(torch.randint(-2, 3, (64,), generator=torch.Generator().manual_seed(0)))
    prepared = Preparation(scale, hadamard_signs(size) if size else None)
    config = ARCConfig(**GPTQ, activation="bf16").resolve()
    plan = LayerPlan(
        config, x.new_ones(()), None, none, none, channel_order=order, prepared=prepared
    )
    met, read = Gram(plan), InputGram()
    for part in x.split(70):
        met.add(part)
        read.add(part)
    torch.testing.assert_close(planned_hessian(read.take(), plan), met.take(), rtol=1e-4, atol=1e-4)


def test_copied_channels_weigh_as_much_as_the_residuals_they_meet():
    """A diagonal block against the products of real residuals: its diagonal within a few percent,
    what it leaves out small."""
    x, none = correlated(4000, 64), torch.zeros(0, dtype=torch.int32)
    config = ARCConfig(**GPTQ).resolve()
    channels = torch.arange(48, 64, dtype=torch.int32)
    error = (x - nvfp4_rounded(x)).square().mean(0)
    plan = LayerPlan(
        config,
        x.new_ones(()),
        None,
        none,
        none,
        act_channels=channels,
        mean_square=x.square().mean(0),
        mean_error=error,
    )
    met, read = Gram(plan), InputGram()
    met.add(x)
    read.add(x)
    real, planned = met.take(), planned_hessian(read.take(), plan)
    diagonal = planned.diagonal()[64:]
    torch.testing.assert_close(diagonal, real.diagonal()[64:], rtol=0.1, atol=0.0)
    inverse = diagonal.rsqrt()
    correlation = real[64:, 64:] * inverse * inverse.unsqueeze(1)
    assert (correlation - torch.eye(16)).abs().mean() < 0.1


def nvfp4_rounded(x: torch.Tensor) -> torch.Tensor:
    amax = x.abs().amax(1, keepdim=True)
    blocks = nvfp4.to_blocks(x * nvfp4.inverse_outer_scale(amax))
    codes, scale = nvfp4.quantize_blocks(blocks)
    return nvfp4.decode_blocks(codes, scale).flatten(1) * nvfp4.outer_scale(amax)


def test_sums_merge():
    """Of two observers that see every other batch: the sum of both, and what both kept aside."""
    x = correlated(160, 32)
    parts = [InputGram(), InputGram()]
    for part, rows in zip(parts, x.split(80), strict=True):
        part.add(rows)
    kept = [part.held.rows() for part in parts]
    totals = [part.tokens for part in parts]
    expected = sum(weighted_products(p, k) for p, k in zip(x.split(80), kept, strict=True))
    parts[0].merge(parts[1])
    assert parts[0].count == 160 and totals == [70, 70] and parts[0].tokens == 140
    assert torch.equal(parts[0].held.rows(), torch.cat(kept))
    found = parts[0].take()
    torch.testing.assert_close(found, expected / expected.trace() * found.trace())
    assert parts[0].take() is None and InputGram().take() is None


def weighted_products(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Sum of w x^T x over those of `rows` that are not `kept`."""
    others = rows[~(rows.unsqueeze(1) == kept).all(2).any(1)]
    energy = others.square().sum(1)
    return (others * (energy.median() / energy).clamp(max=1).unsqueeze(1)).T @ others
