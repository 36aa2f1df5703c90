"""The graph passes, one by one: rewritten, near misses, no metadata, several users, bits."""

import time

import pytest
import torch
from pass_tools import BLOCKS, OTHERS, count, inputs, quantize, rewritten, traced, unknown
from tiny_models import tiny_llama
from torch import Tensor

import arc_ao
from arc_ao.ops import producers
from arc_ao.passes.fuse_rms_norm import fuse_rms_norm
from arc_ao.passes.fuse_silu_mul import fuse_silu_mul
from arc_ao.passes.pipeline import PASSES, ROUNDING_PASSES, run_passes
from arc_ao.passes.share_quantize import share_quantize

EPS = 1e-5


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As transformers' LlamaRMSNorm."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def silu(gate: Tensor) -> Tensor:
    """As Inductor decomposes it."""
    wide = gate.to(torch.float32)
    return (wide / (torch.exp(torch.neg(wide)) + 1)).to(gate.dtype)


def by_sigmoid(gate: Tensor) -> Tensor:
    wide = gate.to(torch.float32)
    return (wide * torch.sigmoid(wide)).to(gate.dtype)


# share_quantize


def test_equal_plans_of_one_tensor_are_quantized_once():
    def qkv(x, first, second, third):
        return quantize(x, first), quantize(x, second), quantize(x, third)

    x = inputs()[0]
    gm, applied = rewritten(qkv, share_quantize, x, BLOCKS, BLOCKS.clone(), BLOCKS.clone())
    assert applied == 2 and count(gm, torch.ops.arc.quant_augment) == 1


@pytest.mark.parametrize(
    "second",
    [
        lambda x, y, b: quantize(y, b),  # another tensor
        lambda x, y, b: quantize(x, b, plan="q"),  # other values
        lambda x, y, b: quantize(x, b, plan=""),  # unknown values
        lambda x, y, b: quantize(x.relu(), b),
    ],
)
def test_other_quantizations_are_not_shared(second):
    x, other, _ = inputs()
    fn = lambda x, y, a, b: (quantize(x, a), second(x, y, b))
    _, applied = rewritten(fn, share_quantize, x, other, BLOCKS, OTHERS)
    assert applied == 0


def test_without_digests_the_nodes_decide():
    fn = lambda x, a, b: (quantize(x, a, ""), quantize(x, a, ""), quantize(x, b, ""))
    _, applied = rewritten(fn, share_quantize, inputs()[0], BLOCKS, OTHERS)
    assert applied == 1


def test_sharing_needs_no_metadata():
    fn = lambda x, a, b: (quantize(x, a), quantize(x, b))
    gm = unknown(traced(fn, inputs()[0], BLOCKS, BLOCKS.clone()))
    assert share_quantize(gm.graph) == 1


# fuse_rms_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_is_fused_into_its_quantization(dtype):
    fn = lambda x, w, b: quantize(norm(x, w), b)
    x, _, weight = inputs(dtype)
    gm, applied = rewritten(fn, fuse_rms_norm, x, weight, BLOCKS)
    assert applied == 1 and count(gm, torch.ops.arc.rms_norm_quant_augment) == 1
    assert count(gm, torch.ops.arc.quant_augment) == count(gm, torch.ops.aten.rsqrt) == 0


def test_the_residual_sum_is_fused_and_returned():
    def block(x, y, w, b):
        total = x + y
        return quantize(norm(total, w), b), total * 2

    gm, applied = rewritten(block, fuse_rms_norm, *inputs(), BLOCKS)
    assert applied == 1 and count(gm, torch.ops.arc.add_rms_norm_quant_augment) == 1
    assert count(gm, torch.ops.aten.add) == 0  # neither the sum nor + eps


def test_a_norm_of_fp32_is_fused_within_the_rounding_of_its_mean():
    """There the bits of the mean show: torch sums in fp32, the operator in fp64."""
    x, _, weight = inputs(torch.float32)
    gm = traced(lambda x, w, b: quantize(norm(x, w), b), x, weight, BLOCKS)
    assert fuse_rms_norm(gm.graph) == 1
    gm.recompile()
    fused, unfused = gm(x, weight, BLOCKS), quantize(norm(x, weight), BLOCKS)
    assert torch.allclose(fused[2], unfused[2], rtol=1e-6)
    assert (fused[0] == unfused[0]).float().mean() > 0.999


@pytest.mark.parametrize(
    "other",
    [
        lambda x, w: weight_first(x, w, lambda v: v.pow(3)),
        lambda x, w: weight_first(x, w, lambda v: v * v.abs()),
        lambda x, w: (
            w * (x.float() * torch.rsqrt(x.float().pow(2).mean(1, True) + EPS)).to(x.dtype)
        ),
        lambda x, w: (
            w * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, True) + EPS)).to(x.dtype)
        ),
        lambda x, w: (w + 1) * norm(x, torch.ones_like(w)),
        lambda x, w: norm(x, w) + 1,
        lambda x, w: norm(x, w).flatten(0, 1)[:, :32],
    ],
)
def test_what_is_almost_a_norm_stays(other):
    fn = lambda x, w, b: quantize(other(x, w), b)
    x, _, weight = inputs()
    gm, applied = rewritten(fn, fuse_rms_norm, x, weight, BLOCKS)
    assert applied == 0 or count(gm, torch.ops.arc.rms_norm_quant_augment) == 0


def weight_first(x: Tensor, weight: Tensor, power) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(power(wide).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def test_a_norm_that_something_else_reads_stays():
    def routed(x, w, b):
        normed = norm(x, w)
        return quantize(normed, b), normed.sum()

    x, _, weight = inputs()
    _, applied = rewritten(routed, fuse_rms_norm, x, weight, BLOCKS)
    assert applied == 0


def test_a_norm_without_metadata_stays():
    x, _, weight = inputs()
    gm = unknown(traced(lambda x, w, b: quantize(norm(x, w), b), x, weight, BLOCKS))
    assert fuse_rms_norm(gm.graph) == 0


def test_a_weight_made_after_the_sum_prevents_only_fusing_the_sum():
    def late(x, y, w, b):
        total = x + y
        return quantize(norm(total, w.exp()), b), total

    gm, applied = rewritten(late, fuse_rms_norm, *inputs(), BLOCKS)
    assert applied == 1 and count(gm, torch.ops.arc.rms_norm_quant_augment) == 1
    assert count(gm, torch.ops.aten.add) == 1


# fuse_silu_mul


@pytest.mark.parametrize(
    "product",
    [
        lambda g, u: silu(g) * u,
        lambda g, u: u * silu(g),
        lambda g, u: torch.nn.functional.silu(g) * u,
        lambda g, u: by_sigmoid(g) * u,
    ],
)
def test_a_gated_product_is_fused(product):
    gate, up, _ = inputs()
    gm, applied = rewritten(
        lambda g, u, b: quantize(product(g, u), b), fuse_silu_mul, gate, up, BLOCKS
    )
    assert applied == 1 and count(gm, torch.ops.arc.silu_mul_quant_augment) == 1
    assert count(gm, torch.ops.arc.quant_augment) == count(gm, torch.ops.aten.mul) == 0


@pytest.mark.parametrize(
    "product",
    [
        lambda g, u: (g.float() / (torch.exp(torch.neg(u.float())) + 1)).to(g.dtype) * u,
        lambda g, u: (g.float() / (torch.exp(torch.neg(g.float())) + 2)).to(g.dtype) * u,
        lambda g, u: torch.nn.functional.gelu(g) * u,
        lambda g, u: silu(g) * u[:1],
        lambda g, u: silu(g) * 2,
        lambda g, u: silu(g) + u,
    ],
)
def test_other_products_stay(product):
    gate, up, _ = inputs()
    fn = lambda g, u, b: quantize(product(g, u), b)
    _, applied = rewritten(fn, fuse_silu_mul, gate, up, BLOCKS)
    assert applied == 0


def test_a_product_that_something_else_reads_stays():
    def both(g, u, b):
        product = silu(g) * u
        return quantize(product, b), product.sum()

    gate, up, _ = inputs()
    _, applied = rewritten(both, fuse_silu_mul, gate, up, BLOCKS)
    assert applied == 0


def test_a_product_without_metadata_stays():
    gate, up, _ = inputs()
    gm = unknown(traced(lambda g, u, b: quantize(silu(g) * u, b), gate, up, BLOCKS))
    assert fuse_silu_mul(gm.graph) == 0


def test_the_fused_exponential_is_as_good_as_torchs():
    """silu by the fixed polynomial against float64: within 2.5 ulp of fp32."""
    x = torch.linspace(-80, 80, 200_001)
    exact = x.double() * torch.sigmoid(x.double())
    error = (producers.silu_mul(x, torch.ones_like(x)).double() - exact).abs()
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs().clamp_min(2.0**-126)))) * 2.0**-23
    assert (error <= 2.5 * spacing).all()


# all of them


def test_all_passes_in_their_order():
    def block(x, y, w, q, k):
        total = x + y
        normed = norm(total, w)
        gate, up = quantize(normed, q), quantize(normed, k)
        return gate, up, quantize(silu(total) * y, q, plan="r")

    gm = traced(block, *inputs(), BLOCKS, BLOCKS.clone())
    expected = dict.fromkeys([rewrite.__name__ for rewrite in (*PASSES, *ROUNDING_PASSES)], 0)
    found = expected | {"share_quantize": 1, "fuse_rms_norm": 1, "fuse_silu_mul": 1}
    assert run_passes(gm.graph) == found
    assert run_passes(gm.graph) == expected


@pytest.mark.slow
def test_thirty_two_layers_take_less_than_ten_seconds():
    """On an exported and decomposed decoder; every block ends with four quantizations."""
    layers = 32
    model = tiny_llama(num_hidden_layers=layers).bfloat16().requires_grad_(False)
    ids = torch.arange(12)[None]
    config = arc_ao.ARCConfig(recipe="balanced", budget=0.1)
    arc_ao.quantize_(model, config, calibration_data=[ids], progress=False)
    program = torch.export.export(model, (ids,), {"use_cache": False}).run_decompositions()
    start = time.perf_counter()
    applied = run_passes(program.graph)
    seconds = time.perf_counter() - start
    assert applied["share_quantize"] == 3 * layers and applied["fuse_rms_norm"] == 2 * layers
    assert applied["fuse_silu_mul"] == layers
    assert seconds < 10
