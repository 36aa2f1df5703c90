"""GELU into the quantization: a pass that may change the last bits."""

import pytest
import torch
import torch.nn.functional as F
from pass_tools import BLOCKS, count, inputs, quantize, traced, unknown
from torch import Tensor

from arc_ao.ops import producers
from arc_ao.passes.fuse_gelu import fuse_gelu

gelu_operator = torch.ops.arc.gelu_quant_augment


def gelu(x: Tensor) -> Tensor:
    """As Inductor decomposes it."""
    wide = x.to(torch.float32)
    return (wide * 0.5 * (torch.erf(wide * 0.7071067811865476) + 1)).to(x.dtype)


def tanh_gelu(x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    cube = wide * wide * wide
    inner = 0.7978845608028654 * (wide + cube * 0.044715)
    return (wide * 0.5 * (torch.tanh(inner) + 1)).to(x.dtype)


@pytest.mark.parametrize(
    ("activate", "gated", "approximate"),
    [
        (gelu, False, "none"),
        (tanh_gelu, False, "tanh"),
        (lambda x: F.gelu(x, approximate="tanh"), True, "tanh"),
        (F.gelu, True, "none"),
        (tanh_gelu, True, "tanh"),
    ],
)
def test_a_gelu_is_fused_with_its_gate_where_there_is_one(activate, gated, approximate):
    def fn(x, up, b):
        return quantize(activate(x) * up if gated else activate(x), b)

    x, up, _ = inputs()
    gm = traced(fn, x, up, BLOCKS)
    assert fuse_gelu(gm.graph) == 1 and count(gm, gelu_operator) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    [call] = [n for n in gm.graph.nodes if n.target is gelu_operator.default]
    assert call.args[2] == approximate and (call.args[1] is not None) == gated
    codes, expected = gm(x, up, BLOCKS)[0], fn(x, up, BLOCKS)[0]
    assert (codes == expected).float().mean() > 0.98


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.float() * 0.5 * (torch.erf(x.float() * 0.7) + 1)).to(x.dtype),
        lambda x: (x.float() * 0.5 * (torch.erf(x.float() * 0.7071067811865476) + 2)).to(x.dtype),
        lambda x: (x.float() * 0.5 * (torch.erf((x + 1).float() * 0.7071067811865476) + 1)).to(
            x.dtype
        ),
        lambda x: gelu(x) + 1,
        lambda x: gelu(x)[..., :32],
        lambda x: torch.tanh(x),
    ],
)
def test_what_is_almost_a_gelu_stays(other):
    gm = traced(lambda x, b: quantize(other(x), b), inputs()[0], BLOCKS)
    assert fuse_gelu(gm.graph) == 0


def test_a_gelu_that_something_else_reads_stays():
    def both(x, b):
        activated = gelu(x)
        return quantize(activated, b), activated.sum()

    assert fuse_gelu(traced(both, inputs()[0], BLOCKS).graph) == 0


def test_without_metadata_no_gelu_is_recognised():
    gm = traced(lambda x, b: quantize(gelu(x), b), inputs()[0], BLOCKS)
    assert fuse_gelu(unknown(gm).graph) == 0


@pytest.mark.parametrize("approximate", producers.APPROXIMATIONS)
def test_the_fixed_gelu_is_as_exact_as_said(approximate):
    """Within 1.1e-7 |x| and some rounding errors of fp32, against float64 on [-20, 20]."""
    x = torch.linspace(-20, 20, 100_001)
    exact = F.gelu(x.double(), approximate=approximate)
    error = (producers.gelu(x, approximate).double() - exact).abs()
    bound = 1.1e-7 * x.abs() + 4 * torch.finfo(torch.float32).eps * exact.abs()
    assert (error <= bound).all()


def test_a_fused_bf16_gelu_rarely_differs_from_pytorch_s():
    """By one unit in the last place, in less than 2 % of the numbers."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = producers.gelu(x).view(torch.int16), F.gelu(x).view(torch.int16)
    apart = (ours.int() - theirs.int()).abs()
    assert (apart[x > -3] <= 1).all() and (apart > 0).float().mean() < 0.02
