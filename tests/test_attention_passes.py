"""Attention on CPUs: query groups into rows, and our kernel in the place of PyTorch's. Both may
change the last bits."""

import pytest
import torch
import torch.nn.functional as F
from pass_tools import BLOCKS, count, inputs, quantize, traced, unknown
from torch import Tensor

from arc_ao.ops import native
from arc_ao.passes.backend import ARC_PASS
from arc_ao.passes.fold_query_groups import fold_query_groups
from arc_ao.passes.pipeline import run_passes
from arc_ao.passes.use_native_attention import use_native_attention

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ours = torch.ops.arc.attention


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request, monkeypatch):
    """Whether our kernel is the faster one; it runs in any case."""
    monkeypatch.setattr(native, "pairs_are_fast", lambda: request.param)
    return request.param


@pytest.fixture
def is_fast(monkeypatch):
    monkeypatch.setattr(native, "pairs_are_fast", lambda: True)


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


def assert_close_to_exact(found: Tensor, fn, arguments: tuple) -> None:
    """Within one unit of bf16 at the largest number."""
    exact = fn(*(a.double() for a in arguments))
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().amax()
    assert (found.double() - exact).abs().max() <= unit


# fold_query_groups


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
    assert found.shape == before.shape
    assert_close_to_exact(found, fn, arguments)


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


# use_native_attention

SERVED = {
    "repeated": lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m),
    "scaled": lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m, scale=0.1),
    "without a mask": lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), None),
    "causal": lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), None, is_causal=True),
    "a mask of fewer dimensions": lambda q, k, v, m: attend(
        q, repeated(k, 4), repeated(v, 4), m[0, 0]
    ),
    "nothing shared": lambda q, k, v, m: attend(q[:, :2], k, v, m[:, :1]),
    "only keys repeated": lambda q, k, v, m: attend(q, repeated(k, 4), v.repeat(1, 4, 1, 1), m),
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.usefixtures("is_fast")
def test_our_kernel_takes_the_place_of_pytorch_s(name, rows):
    fn, arguments = SERVED[name], queries_and_keys(rows)
    gm = traced(fn, *arguments)
    assert use_native_attention(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    [call] = [n for n in gm.graph.nodes if n.target is ours.default]
    assert not count(gm, attention)
    assert call.args[1].meta["val"].shape[1] == (8 if name == "only keys repeated" else 2)
    found, before = gm(*arguments), fn(*arguments)
    assert found.shape == before.shape and found.stride() == call.meta["val"].stride()
    assert found.transpose(1, 2).is_contiguous()  # heads of a token side by side, as o_proj reads
    assert_close_to_exact(found, fn, arguments)


NOT_SERVED = {
    "fp32": lambda q, k, v, m: attend(
        q.float(), repeated(k, 4).float(), repeated(v, 4).float(), m.float()
    ),
    "dropout": lambda q, k, v, m: attend(q, repeated(k, 4), repeated(v, 4), m, dropout_p=0.1),
    "the log-sum-exp is read": lambda q, k, v, m: attention(
        q, repeated(k, 4), repeated(v, 4), attn_mask=m
    )[1],
    "an odd number of channels": lambda q, k, v, m: attend(
        q[..., :63], repeated(k, 4)[..., :63], repeated(v, 4)[..., :63], m
    ),
    "a mask of one number a row": lambda q, k, v, m: attend(
        q, repeated(k, 4), repeated(v, 4), m[..., :1]
    ),
}


@pytest.mark.parametrize("name", NOT_SERVED)
@pytest.mark.usefixtures("is_fast")
def test_attention_that_our_kernel_does_not_serve_stays(name):
    gm = traced(NOT_SERVED[name], *queries_and_keys(3))
    assert use_native_attention(gm.graph) == 0 and count(gm, attention) == 1


@pytest.mark.usefixtures("is_fast")
def test_without_metadata_pytorch_s_attention_stays():
    gm = unknown(traced(SERVED["repeated"], *queries_and_keys()))
    assert use_native_attention(gm.graph) == 0


@pytest.mark.usefixtures("is_fast")
def test_two_readers_of_repeated_keys_are_both_replaced():
    def twice(q, k, v, m):
        keys, values = repeated(k, 4), repeated(v, 4)
        return attend(q, keys, values, m) + attend(q * 2, keys, values, m)

    assert use_native_attention(traced(twice, *queries_and_keys(3)).graph) == 2


def test_our_kernel_is_called_only_where_it_is_the_faster_one(fast):
    """One query row is folded elsewhere; Inductor's caches tell the two machines apart."""
    gm = traced(SERVED["repeated"], *queries_and_keys())
    applied = run_passes(gm.graph)
    assert applied["use_native_attention"] == fast and applied["fold_query_groups"] == (not fast)
    uuid = ARC_PASS.uuid()
    native.pairs_are_fast = lambda: not fast
    assert ARC_PASS.uuid() != uuid


@pytest.mark.usefixtures("is_fast")
def test_compiled_prompts_of_any_length_attend_alike():
    """Grouped queries, a causal mask, one compilation for every length; and whatever a reader
    makes of the result's strides."""

    def fn(q, k, v):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return y.reshape(2, -1, 64) + 1

    compiled = torch.compile(fn, backend="arc", dynamic=True, fullgraph=True)
    for rows in (7, 20):
        q, k, v, _ = queries_and_keys(rows)
        k, v = k[:, :, :rows], v[:, :, :rows]
        with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
            assert_close_to_exact(compiled(q, k, v), fn, (q, k, v))
    assert ARC_PASS.applied["use_native_attention"] == 1


def test_where_bits_must_stay_these_passes_do_not_run(fast):
    """`emulate_precision_casts` is the user's word for the bits of eager execution."""

    def fn(x, b, q, k, v, m):
        return quantize(F.gelu(x), b), attend(q, repeated(k, 4), repeated(v, 4), m)

    gm = traced(fn, inputs()[0], BLOCKS, *queries_and_keys())
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert not any(run_passes(gm.graph).values())
    applied = run_passes(gm.graph)
    replaced = "use_native_attention" if fast else "fold_query_groups"
    assert applied["fuse_gelu"] == applied[replaced] == 1
