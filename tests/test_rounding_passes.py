"""Passes that may change the last bits: GELU into the quantization, query groups into rows."""

import pytest
import torch
import torch.nn.functional as F
from pass_tools import BLOCKS, count, inputs, quantize, traced, unknown
from torch import Tensor

from arc_ao.ops import producers
from arc_ao.passes.fold_query_groups import fold_query_groups
from arc_ao.passes.fuse_gelu import fuse_gelu
from arc_ao.passes.pipeline import run_passes

gelu_operator = torch.ops.arc.gelu_quant_augment
attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def gelu(x: Tensor) -> Tensor:
    """As Inductor decomposes it."""
    wide = x.to(torch.float32)
    return (wide * 0.5 * (torch.erf(wide * 0.7071067811865476) + 1)).to(x.dtype)


def tanh_gelu(x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    cube = wide * wide * wide
    inner = 0.7978845608028654 * (wide + cube * 0.044715)
    return (wide * 0.5 * (torch.tanh(inner) + 1)).to(x.dtype)


# fuse_gelu


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


# fold_query_groups


def repeated(x: Tensor, groups: int) -> Tensor:
    """As transformers' repeat_kv."""
    batch, heads, length, size = x.shape
    wide = x[:, :, None].expand(batch, heads, groups, length, size)
    return wide.reshape(batch, heads * groups, length, size)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings) -> Tensor:
    return attention(q, k, v, attn_mask=mask, **settings)[0]


def queries_and_keys(rows: int = 1, mask_heads: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, rows, 64, generator=generator).bfloat16()
    k, v = (torch.randn(2, 2, 37, 64, generator=generator).bfloat16() for _ in range(2))
    mask = torch.randn(2, mask_heads, rows, 37, generator=generator).bfloat16()
    return q, k, v, mask


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m),
        lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m, scale=0.1),
        lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), None),
        lambda q, k, v, m: attend(q, k, v, None),  # PyTorch's own grouped queries
        lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m[0, 0]),
    ],
)
def test_one_query_row_is_folded_and_attends_alike(fn):
    arguments = queries_and_keys()
    gm = traced(fn, *arguments)
    assert fold_query_groups(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    [call] = [n for n in gm.graph.nodes if n.target is attention.default]
    assert call.args[0].meta["val"].shape == (2, 2, 4, 64)
    assert call.args[1].meta["val"].shape == (2, 2, 37, 64)
    found, before = gm(*arguments), fn(*arguments)
    exact = fn(*(a.double() for a in arguments))
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().amax()
    assert found.shape == before.shape and (found.double() - exact).abs().max() <= unit


@pytest.mark.parametrize(
    ("fn", "arguments"),
    [
        (lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m), {"rows": 3}),
        (lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m), {"mask_heads": 8}),
        (lambda q, k, v, m: attend(q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1), m), {}),
        (lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), None, is_causal=True), {}),
        (lambda q, k, v, m: attend(q[:, :2], k, v, m), {}),  # nothing is shared
        (
            lambda q, k, v, m: attention(q, repeated(k, 4), repeated(v, 4), attn_mask=m)[1],
            {},
        ),
    ],
)
def test_other_attention_stays(fn, arguments):
    gm = traced(fn, *queries_and_keys(**arguments))
    assert fold_query_groups(gm.graph) == 0


def test_without_metadata_attention_stays():
    fn = lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m)
    assert fold_query_groups(unknown(traced(fn, *queries_and_keys())).graph) == 0


def test_two_readers_of_repeated_keys_are_both_folded():
    def twice(q, k, v, m):
        keys, values = repeated(k, 4), repeated(v, 4)
        return attend(q, keys, values, m) + attend(q * 2, keys, values, m)

    assert fold_query_groups(traced(twice, *queries_and_keys()).graph) == 2


def test_where_bits_must_stay_these_passes_do_not_run():
    """`emulate_precision_casts` is the user's word for the bits of eager execution."""

    def fn(x, b, q, k, v, m):
        return quantize(gelu(x), b), attend(q, repeated(k, 4), repeated(v, 4), m)

    gm = traced(fn, inputs()[0], BLOCKS, *queries_and_keys())
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert not any(run_passes(gm.graph).values())
    applied = run_passes(gm.graph)
    assert applied["fuse_gelu"] == applied["fold_query_groups"] == 1
