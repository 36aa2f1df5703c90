"""arc::transform_input and arc::project_down: meaning, tracing, refusals, sharing, lowering."""

import pytest
import torch
from tiny_models import NormedPair
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import arc_ao
from arc_ao.formats.rotation import hadamard_signs, rotate
from arc_ao.ops import project_down, quant_augment, transform_input
from arc_ao.passes.backend import ARC_PASS
from arc_ao.passes.lower_transforms import fold_input_scale, lower_transforms
from arc_ao.passes.share_quantize import share_quantize

FAMILY = {
    "SERQ": arc_ao.SERQConfig(budget=0.2, channel_order="none"),
    "everything": arc_ao.ARHQConfig(rank=8, budget=0.1, rotation=16),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SCALE = torch.exp2(torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(1)).float())
SIGNS = hadamard_signs(16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_transform_scales_exactly_and_rotates_with_one_rounding(dtype):
    x = randn(2, 3, 64, dtype=dtype)
    scaled = transform_input(x, SCALE, None)
    assert torch.equal(scaled.double(), x.double() * SCALE.double())
    both = transform_input(x, SCALE, SIGNS)
    assert torch.equal(both, rotate(scaled, SIGNS).to(dtype)) and both.dtype == dtype
    copy = transform_input(x, None, None)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (0, 64)])
def test_operators_pass_opcheck(shape):
    x = randn(*shape)
    down = randn(4, 64, seed=2)
    torch.library.opcheck(transform_input, (x, SCALE, SIGNS, "plan"))
    torch.library.opcheck(transform_input, (x, None, None))
    torch.library.opcheck(project_down, (x, down, "plan"))
    rows = x.reshape(-1, 64)
    assert torch.equal(project_down(x, down), nn.functional.linear(rows, down))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match=r"input_scale must be fp32 \[32\], got fp32 \[64\]"):
        transform_input(randn(2, 32), SCALE, None)
    with pytest.raises(RuntimeError, match="x has 24 channels, no multiple of the rotation's 16"):
        transform_input(randn(2, 24), None, SIGNS)
    with pytest.raises(RuntimeError, match="project_down: x has 32 channels, down has 64"):
        project_down(randn(2, 32), randn(4, 64))


def traced(function, *inputs: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


def count(graph: Graph, operator) -> int:
    return sum(node.target is operator for node in graph.nodes)


def quantize(x: Tensor, plan: str) -> tuple[Tensor, ...]:
    none = torch.zeros(0, dtype=torch.int32)
    return quant_augment(x, none, none, None, "token", plan=plan)


def test_equal_digests_share_and_others_do_not():
    """Scales are different inputs of the graph; the digest says whether they are equal."""

    def twice(first: str, second: str):
        def run(x, s1, s2, d1, d2):
            one = quantize(transform_input(x, s1, None, first), first)
            two = quantize(transform_input(x, s2, None, second), second)
            return *one, *two, project_down(x, d1, first), project_down(x, d2, second)

        down = randn(4, 64)
        return traced(run, randn(3, 64), SCALE, SCALE.clone(), down, down.clone()).graph

    same, other, unknown = twice("a", "a"), twice("a", "b"), twice("", "")
    assert [share_quantize(g) for g in (same, other, unknown)] == [3, 0, 0]
    assert count(same, transform_input) == count(same, quant_augment) == 1


@pytest.mark.parametrize("rotation", [(), (SIGNS,)], ids=["scaled", "rotated"])
def test_lowered_graphs_keep_the_bits(rotation):
    def run(x, scale, down, *rotation):
        return transform_input(x, scale, *(rotation or (None,))), project_down(x, down)

    inputs = randn(2, 5, 64), SCALE, randn(4, 64, seed=1), *rotation
    gm = traced(run, *inputs)
    assert lower_transforms(gm.graph) == 2
    assert count(gm.graph, transform_input) == count(gm.graph, project_down) == 0
    gm.recompile()
    for lowered, expected in zip(gm(*inputs), run(*inputs), strict=True):
        assert torch.equal(lowered, expected)


def test_a_node_without_metadata_is_left_alone():
    graph = Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    graph.output(graph.call_function(transform_input, (x, scale, None)))
    assert lower_transforms(graph) == fold_input_scale(graph) == 0


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (wide * inverse).to(x.dtype)


@pytest.mark.parametrize("readers", [1, 2])
def test_scales_go_into_a_norm_that_nothing_else_reads(readers):
    """Bit for bit, since the scales are powers of two."""

    def run(x, weight, scale):
        y = norm(x, weight)
        z = transform_input(y, scale, None)
        return (z, y + 1) if readers == 2 else (z,)

    inputs = randn(3, 64), randn(64, seed=4), SCALE
    gm = traced(run, *inputs)
    assert fold_input_scale(gm.graph) == (1 if readers == 1 else 0)
    gm.graph.lint()
    gm.recompile()
    for folded, expected in zip(gm(*inputs), run(*inputs), strict=True):
        assert torch.equal(folded, expected)


@pytest.mark.parametrize("name", FAMILY)
def test_the_backend_gives_the_eager_bits_and_shares_between_linears(name):
    """Two linears behind one norm share transform, projection and quantization; scales alone go
    into the norm, which is then fused into the quantization."""
    model, x = NormedPair().bfloat16(), randn(20, 64)
    arc_ao.quantize_(model, FAMILY[name], calibration_data=[x], progress=False)
    model.requires_grad_(False)
    torch._dynamo.reset()
    # A cached graph would not go through the passes.
    with torch._inductor.config.patch(emulate_precision_casts=True, fx_graph_cache=False):
        compiled = torch.compile(model, fullgraph=True, backend="arc", dynamic=False)
        assert torch.equal(compiled(x), model(x))
    branch = FAMILY[name].rank > 0
    expected = {"share_quantize": 2 + branch, "fold_input_scale": 0, "fuse_rms_norm": 0}
    if name == "SERQ":
        expected |= {"fold_input_scale": 1, "fuse_rms_norm": 1}
    found = ARC_PASS.applied
    assert {key: found[key] for key in expected} == expected
