"""smooth="awq": against a naive loop, what it gains, in every flow, with W4A16 and with W4A4."""

import copy
import dataclasses

import pytest
import torch
from test_quantize import assert_same_tensors, batches, same_logits, small_llama, three_steps
from tiny_models import NormedPair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, quantize_
from arc_ao.formats import nvfp4
from arc_ao.passes.backend import ARC_PASS
from arc_ao.summary import arc_tensors

PLAIN = ARCConfig(recipe="plain", activation="bf16")
AWQ = dataclasses.replace(PLAIN, smooth="awq")
CONFIGS = {
    "W4A16": AWQ,
    "W4A16, residuals, GPTQ": ARCConfig(
        recipe="balanced", budget=0.1, activation="bf16", smooth="awq", rounding="gptq"
    ),
    "W4A4": ARCConfig(recipe="balanced", budget=0.1, smooth="awq"),
}
flows = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
HIDDEN = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).bfloat16().unbind()


def outliers(rows: int, seed: int) -> Tensor:
    """Inputs [rows, 256] whose channels differ in size, a few by much."""
    rms = torch.exp(1.2 * torch.randn(256, generator=torch.Generator().manual_seed(5)))
    rms[::37] *= 20
    return rms * torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(256, 96, bias=False)).requires_grad_(False)
    model[0].weight.copy_(torch.randn(96, 256, generator=torch.Generator().manual_seed(3)) / 16)
    return model


def scales_by_hand(weight: Tensor, x: Tensor) -> Tensor:
    """The paper's search: 20 exponents, weights rounded, inputs as they are."""
    mean, best, least = x.abs().mean(0), None, float("inf")
    for i in range(20):
        s = mean ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        s = torch.exp2(torch.log2(s).round())
        rounded = nvfp4.dequantize(*nvfp4.quantize(weight * s)) / s
        error = ((x @ (rounded - weight).T) ** 2).mean().item()
        if error < least:
            best, least = s, error
    return best


def test_the_search_is_the_papers():
    """Amax block scales on 200 tokens, all of which the search sees."""
    model, x = linear(), outliers(200, seed=0)
    expected = scales_by_hand(model[0].weight, x)
    assert expected.amax() / expected.amin() >= 16
    quantize_(model, AWQ, calibration_data=[x], progress=False)
    assert torch.equal(model[0].weight.input_scale, 1 / expected)


def output_error(config: ARCConfig) -> float:
    """On tokens that calibration did not see, relative."""
    model, x = linear(), outliers(512, seed=1)
    quantize_(model, config, calibration_data=[outliers(512, seed=0)], progress=False)
    expected = linear()(x)
    return ((model(x) - expected).norm() / expected.norm()).item()


def test_it_helps_where_channels_are_unequal():
    """Weights alone, rounded with amax scales: less than half of the error is left."""
    assert output_error(AWQ) < 0.45 * output_error(PLAIN)


@pytest.mark.parametrize("settings", [{"budget": 0.1}, {"budget": 0.0, "rounding": "gptq"}])
def test_it_composes(settings):
    """Residuals, or GPTQ, on top gain more than AWQ alone, and more than they do without it."""
    alone, both = (
        ARCConfig(recipe="balanced", activation="bf16", smooth=smooth, **settings)
        for smooth in ("none", "awq")
    )
    assert output_error(both) < 0.98 * output_error(alone)
    assert output_error(both) < 0.75 * output_error(AWQ)


def test_equal_channels_keep_their_scales():
    """Nothing to gain: within one power of two of no scaling at all."""
    model = linear()
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    quantize_(model, AWQ, calibration_data=[x], progress=False)
    assert model[0].weight.input_scale.eq(1).all()


@flows
def test_one_call_three_steps_and_checkpoint_agree(config, tmp_path):
    """GPTQ's Hessians differ behind quantized predecessors, so there it is rounding to nearest."""
    config = dataclasses.replace(config, rounding="nearest")
    one, three = small_llama(), small_llama()
    quantize_(one, config, calibration_data=batches(), progress=False)
    three_steps(three, config)
    assert_same_tensors(one, three)
    assert all(t.input_scale is not None for t in arc_tensors(one).values())
    arc_ao.save_pretrained(one, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert_same_tensors(one, loaded)
    assert same_logits(one, loaded)


def pair(config: ARCConfig) -> nn.Module:
    model = NormedPair().bfloat16().requires_grad_(False)
    quantize_(model, config.with_step("prepare"))
    for x in HIDDEN:
        model(x)
    quantize_(model, config.with_step("convert"), progress=False)
    return model


@flows
def test_graph_flow_export_and_compile_give_the_eager_bits(config):
    """And linears behind one norm share one scaling, which goes into the norm's weight."""
    eager, rows = pair(config), ({0: torch.export.Dim("rows", min=2, max=64)},)
    original = NormedPair().bfloat16().requires_grad_(False)
    exported = torch.export.export(original, (HIDDEN[0],), dynamic_shapes=rows)
    prepared = arc_ao.prepare_arc(exported, config)
    for x in HIDDEN:
        prepared(x)
    graph = arc_ao.convert_arc(prepared)
    again = torch.export.export(eager, (HIDDEN[0],), dynamic_shapes=rows).module()
    torch._dynamo.reset()
    with torch._inductor.config.patch(emulate_precision_casts=True, fx_graph_cache=False):
        compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="arc")
        for x in (HIDDEN[0], HIDDEN[1][:9]):
            expected = eager(x)
            assert torch.equal(graph(x), expected) and torch.equal(again(x), expected)
            assert torch.equal(compiled(x), expected)
    assert ARC_PASS.applied["fold_input_scale"] == 1
