"""The neighbouring methods as configs: every flow, bit for bit; degenerate weights; their gains."""

import warnings

import pytest
import torch
from test_quantize import assert_same_tensors, same_logits, small_llama, three_steps
from tiny_models import VOCAB_SIZE, NormedPair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARHQConfig, NVFP4Config, SERQConfig, SVDQuantConfig, quantize_
from arc_ao.cost import extra_cost
from arc_ao.summary import arc_tensors

FAMILY = {
    "plain": NVFP4Config(),
    "rotated": NVFP4Config(rotation=16),
    "SERQ": SERQConfig(budget=0.1),
    "SERQ, published": SERQConfig(num_weight_channels=32, selection="threshold"),
    "SVDQuant": SVDQuantConfig(rank=4, branch_iterations=2),
    "ARHQ": ARHQConfig(rank=8),
    "ARC": ARCConfig(recipe="balanced", budget=0.2, exchange_rate=0.3),
    "smoothing + ARC": ARCConfig(recipe="balanced", smooth="search"),
    "everything": ARHQConfig(rank=4, budget=0.1, rotation=32, channel_order="amax"),
}
methods = pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY)
TOKENS = torch.randint(VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:2], TOKENS[2:]]
HIDDEN = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(1)).bfloat16().unbind()


def quantized(config: ARCConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = small_llama().to(dtype)
    quantize_(model, config, calibration_data=BATCHES, progress=False)
    return model


@methods
def test_one_call_equals_three_steps(config):
    from test_quantize import batches

    one, three = small_llama().bfloat16(), small_llama().bfloat16()
    quantize_(one, config, calibration_data=batches(), progress=False)
    three_steps(three, config)
    assert_same_tensors(one, three)


@methods
def test_saved_and_loaded_models_are_bit_equal(config, tmp_path):
    """Through transformers; q, k and v, which share a projection, come back with their own."""
    model = quantized(config, torch.float32)  # .bfloat16() would round the rotary frequencies
    arc_ao.save_pretrained(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert_same_tensors(model, loaded)
    assert same_logits(model, loaded)


def pair(config: ARCConfig | None = None) -> nn.Module:
    model = NormedPair().bfloat16().requires_grad_(False)
    if config is not None:
        quantize_(model, config, calibration_data=HIDDEN, progress=False)
    return model


@methods
def test_the_graph_flow_gives_the_bits_of_the_eager_one(config):
    rows = ({0: torch.export.Dim("rows", min=2, max=64)},)
    program = torch.export.export(pair(), (HIDDEN[0],), dynamic_shapes=rows)
    prepared = arc_ao.prepare_arc(program, config)
    for batch in HIDDEN:
        prepared(batch)
    converted, eager = arc_ao.convert_arc(prepared), pair(config)
    for x in (HIDDEN[0], HIDDEN[1][:5]):
        assert torch.equal(converted(x), eager(x))


@methods
def test_exported_and_traced_models_are_bit_equal(config):
    """torch.export with a dynamic length, and torch.compile of the whole graph."""
    model = pair(config)
    rows = ({0: torch.export.Dim("rows", min=2, max=64)},)
    program = torch.export.export(model, (HIDDEN[0],), dynamic_shapes=rows).module()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (HIDDEN[0], HIDDEN[1][:9]):
        assert torch.equal(program(x), model(x))
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["SERQ", "everything"])
def test_other_dtypes(name, dtype):
    """Factors are stored in 16 bits; the output stays near the original one."""
    model, original = quantized(FAMILY[name], dtype), small_llama().to(dtype)
    for tensor in arc_tensors(model).values():
        assert tensor.down is None or tensor.down.element_size() == tensor.up.element_size() == 2
    difference = (model(TOKENS).logits - original(TOKENS).logits).norm()
    assert difference < 0.25 * original(TOKENS).logits.norm()


@methods
def test_dequantized_weights_reproduce_the_layer(config):
    """With an exact input (one that NVFP4 keeps), the layer is that of `dequantize`. Transforms
    are undone by it, so it is near the original weight, too."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(128, 48, bias=False)
    linear.weight.data = torch.randn(48, 128, generator=generator) / 11
    model, x = nn.Sequential(linear), torch.randn(64, 128, generator=generator)
    original = linear.weight.detach().clone()
    quantize_(model, config, calibration_data=[x], progress=False)
    tensor = model[0].weight
    error = (tensor.dequantize() - original).norm() / original.norm()
    assert error < 0.12
    y, expected = model(x), x @ tensor.dequantize().t()
    assert (y - expected).norm() < 0.15 * expected.norm()  # only the input is rounded


@pytest.mark.parametrize("name", ["SERQ", "SVDQuant", "ARHQ", "everything"])
def test_weights_of_zeros_and_of_rank_one(name):
    for weight in (torch.zeros(32, 64), torch.ones(32, 64)):
        linear = nn.Linear(64, 32, bias=False)
        linear.weight.data = weight.clone()
        model, x = nn.Sequential(linear), torch.randn(20, 64)
        quantize_(model, FAMILY[name], calibration_data=[x], progress=False)
        expected = x @ weight.t()
        assert (model(x) - expected).norm() <= 0.2 * expected.norm()


def outlier_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weight and inputs with a profile of unequal channels, as LLMs have."""
    generator = torch.Generator().manual_seed(5)
    rms = torch.exp(1.2 * torch.randn(256, generator=generator))
    weight = torch.randn(96, 256, generator=generator) / 16
    x = rms * torch.randn(1024, 256, generator=generator)
    return weight, x[:512], x[512:]


def sqnr_db(config: ARCConfig) -> float:
    weight, calibration, x = outlier_problem()
    linear = nn.Linear(256, 96, bias=False)
    linear.weight.data = weight.clone()
    model = nn.Sequential(linear)
    quantize_(model, config, calibration_data=[calibration], progress=False)
    y = x @ weight.t()
    return (10 * torch.log10(y.square().sum() / (model(x) - y).square().sum())).item()


def test_the_papers_relations_hold_on_a_small_problem():
    """Margins are about half of what is measured."""
    amax = {"weight_scale": "amax"}
    plain = sqnr_db(NVFP4Config())
    arc = ARCConfig(recipe="balanced", budget=0.1, exchange_rate=0.0, **amax)
    smooth_arc = ARCConfig(
        recipe="balanced", budget=0.1, exchange_rate=0.0, smooth="search", **amax
    )
    once = SVDQuantConfig(rank=16, branch_iterations=0, smooth="none", **amax)
    assert sqnr_db(SERQConfig(budget=0.1, **amax)) > plain
    assert sqnr_db(smooth_arc) > sqnr_db(arc) - 0.05
    assert sqnr_db(ARHQConfig(rank=16, smooth="none", **amax)) > sqnr_db(once) + 0.2
    svdquant = sqnr_db(SVDQuantConfig(rank=16, **amax))
    assert svdquant > sqnr_db(once) + 0.5
    iterated = ARHQConfig(rank=16, branch_iterations=100, **amax)
    assert sqnr_db(iterated) > svdquant - 0.2  # as good: last bits of an SVD say which is ahead
    assert sqnr_db(NVFP4Config(rotation=16)) < plain - 0.2


def test_what_correction_costs():
    """By hand, for [96, 256]: rank 8 in 16 bits, scales in 32, no residuals; q and k share down."""
    config = ARHQConfig(rank=8)
    model = nn.Sequential(nn.Linear(256, 96, bias=False))
    quantize_(model, config, calibration_data=[torch.randn(64, 256)], progress=False)
    tensor = model[0].weight
    cost = extra_cost([tensor])
    weights = 96 * 256
    assert cost.bits_per_weight == pytest.approx((8 * 16 * (96 + 256) + 32 * 256 + 32) / weights)
    assert cost.multiply_adds_per_token == 8 * (96 + 256) + 256
    both = extra_cost([tensor, tensor])
    assert both.multiply_adds_per_token == 2 * 8 * 96 + 8 * 256 + 256
    assert extra_cost([]).multiply_adds == 0.0


def test_misuse_is_refused_by_name():
    with pytest.raises(ValueError, match="rotation must be one of"):
        NVFP4Config(rotation=8)
    with pytest.raises(ValueError, match="rank must be a number >= 0, got -1"):
        SVDQuantConfig(rank=-1)
    with pytest.raises(ValueError, match="calibration_data"):
        quantize_(small_llama(), SVDQuantConfig())
    model = nn.Sequential(nn.Linear(80, 16))
    with pytest.raises(ValueError, match="0: expected in_features to be a multiple of rotation=64"):
        quantize_(model, NVFP4Config(rotation=64))
    assert not arc_tensors(model)


def test_statistics_without_rows_are_refused():
    """A prepared model's state_dict carries sums, not the rows that a branch needs."""
    config = SVDQuantConfig(rank=4)
    filled, empty = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(64, 32))
    for model in (filled, empty):
        quantize_(model, config.with_step("prepare"))
    filled(torch.randn(8, 64))
    empty.load_state_dict(filled.state_dict())
    with pytest.raises(ValueError, match="0: expected rows of the input for smooth"):
        quantize_(empty, config.with_step("convert"))


def test_low_rank_needs_no_warning_under_autocast():
    """The output has autocast's dtype, as that of nn.Linear has."""
    model = quantized(FAMILY["everything"], torch.float32)
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dim() == 2)
    x = torch.randn(3, linear.in_features)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        assert linear(x).dtype == torch.bfloat16
