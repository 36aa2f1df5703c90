"""torch.compile and torch.export of quantized models: no graph break, no recompile, same bits."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, Logits, tiny_llama
from torch import Tensor, nn
from torch._dynamo.utils import counters

import arc_ao

TOKENS = torch.randint(VOCAB_SIZE, (4, 48), generator=torch.Generator().manual_seed(0))
LENGTHS = (5, 17, 40, 6, 33)
ARC_OPS = (torch.ops.arc.quant_augment.default, torch.ops.arc.nvfp4_gemm.default)


def quantized_llama(dtype: torch.dtype) -> Logits:
    model = tiny_llama().to(dtype)
    config = arc_ao.ARCConfig(budget=0.1, recipe="balanced")
    data = [TOKENS[:2], TOKENS[2:]]
    arc_ao.quantize_(model, config, calibration_data=data, progress=False)
    return Logits(model).requires_grad_(False)


@pytest.fixture(scope="module")
def llama() -> Logits:
    return quantized_llama(torch.bfloat16)


def quantized_mlp(**changes) -> tuple[nn.Module, Tensor]:
    """Both kinds of residual, and an input of 32 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        mlp = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).bfloat16()
    both = {"num_act_channels": 16, "num_weight_channels": 16}
    config = arc_ao.ARCConfig(recipe="balanced", **both, **changes)
    arc_ao.quantize_(mlp, config, calibration_data=[x], progress=False)
    return mlp.requires_grad_(False), x


def assert_quantized(module: nn.Module) -> None:
    assert any(isinstance(p.data, arc_ao.ARCTensor) for p in module.parameters())


def num_arc_ops(program: torch.export.ExportedProgram) -> int:
    return sum(node.target in ARC_OPS for node in program.graph.nodes)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
def test_compiled_llama_is_bit_equal_and_compiles_once(llama):
    """One full graph for every sequence length after the first call, equal to eager."""
    compiled = torch.compile(llama, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(TOKENS[:, :12])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in LENGTHS:
            tokens = TOKENS[:, :length]
            assert torch.equal(compiled(tokens), llama(tokens)), length
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_llama_has_no_graph_break(llama):
    assert_quantized(llama)
    explanation = torch._dynamo.explain(llama)(TOKENS)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_order": "amax", "granularity": "channel"},
        {"activation_scale": "static", "activation_block_scale": "mse"},
        {"activation_scale": "tensor"},
    ],
    ids=["sorted channels", "static, searched", "tensor"],
)
def test_every_kind_of_layer_compiles_to_the_same_bits(changes):
    """The optional tensors of ARCTensor go through tracing, decode (M = 1) included."""
    mlp, x = quantized_mlp(**changes)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(x[:8])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 5, 32):
            assert torch.equal(compiled(x[:rows]), mlp(x[:rows]))
    assert torch.equal(compiled(x[:1]), mlp(x[:1]))  # sizes 0 and 1 are always specialised
    assert torch.equal(compiled(x[:0]), mlp(x[:0]))


@pytest.mark.slow
def test_inductor_is_bit_equal_with_eager_rounding():
    mlp, x = quantized_mlp()
    with torch._inductor.config.patch(emulate_precision_casts=True):
        compiled = torch.compile(mlp, fullgraph=True, dynamic=True)
        for rows in (8, 3, 32):
            assert torch.equal(compiled(x[:rows]), mlp(x[:rows]))


@pytest.mark.slow
def test_exported_llama_runs_at_other_lengths_after_loading(llama, tmp_path):
    """Two operators a linear in the graph; saved, loaded, bit-equal."""
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(llama, (TOKENS,), dynamic_shapes=({1: length},))
    linears = sum(isinstance(p.data, arc_ao.ARCTensor) for p in llama.parameters())
    assert num_arc_ops(program) == 2 * linears > 0
    torch.export.save(program, tmp_path / "llama.pt2")
    loaded = torch.export.load(tmp_path / "llama.pt2").module()
    for tokens in (TOKENS, TOKENS[:, :11], TOKENS[:, :2]):
        assert torch.equal(loaded(tokens), llama(tokens))


@pytest.mark.slow
def test_decompositions_keep_the_operators():
    """Core ATen replaces what surrounds them, which in fp32 costs the last bits only."""
    llama = quantized_llama(torch.float32)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(llama, (TOKENS,), dynamic_shapes=({1: length},))
    same = program.run_decompositions({}).module()
    assert torch.equal(same(TOKENS[:, :11]), llama(TOKENS[:, :11]))
    core = program.run_decompositions()
    assert num_arc_ops(core) == num_arc_ops(program)
    difference = core.module()(TOKENS[:, :11]) - llama(TOKENS[:, :11])
    assert difference.norm() < 0.02 * llama(TOKENS[:, :11]).norm()  # a code may flip


def test_exported_mlp_survives_decomposition_bit_for_bit():
    mlp, x = quantized_mlp(channel_order="amax")
    program = torch.export.export(mlp, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for form in (program, program.run_decompositions()):
        assert num_arc_ops(form) == 4
        assert torch.equal(form.module()(x[:7]), mlp(x[:7]))
