"""arc::attention: the native kernel at every level of this machine, against float64."""

import math

import pytest
import torch
from torch import Tensor

from arc_ao.ops import attention, native
from arc_ao.ops.attention import attention_eager

if native.load() is None:
    pytest.skip(f"no native kernels: {native.reason_absent()}", allow_module_level=True)

INF = math.inf
SHAPES = {  # B, H, Hk, T, L, D, Dv
    "a prompt": (1, 8, 2, 70, 130, 64, 64),
    "one token": (2, 8, 2, 1, 77, 64, 64),
    "no shared heads": (2, 3, 3, 20, 19, 32, 32),
    "one head of keys": (1, 6, 1, 33, 64, 16, 128),
    "ragged channels": (2, 4, 2, 9, 35, 34, 7),
    "a single key": (1, 2, 1, 5, 1, 80, 96),
}


def tensors(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query and value as views of [B, rows, heads, channels], key in standard order."""
    batch, heads, key_heads, queries, keys, channels, value_channels = shape
    generator = torch.Generator().manual_seed(seed)

    def make(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).bfloat16()

    query = make(batch, queries, heads, channels).transpose(1, 2)
    value = make(batch, keys, key_heads, value_channels).transpose(1, 2)
    return query, make(batch, key_heads, keys, channels), value


def masks(shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    batch, heads, _, queries, keys = shape[:5]
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(batch, heads, queries, keys, generator=generator) < 0.3
    behind = torch.arange(keys) > torch.arange(queries)[:, None] + keys // 2
    zeros = torch.zeros(queries, keys)
    return {
        "none": None,
        "causal": zeros.masked_fill(behind, -INF).bfloat16(),
        "padding": torch.zeros(batch, 1, 1, keys).masked_fill(some[:, :1, :1], -INF),
        "numbers": torch.randn(some.shape, generator=generator).masked_fill(some, -INF).bfloat16(),
        "a row's own": torch.randn(1, heads, queries, 2 * keys, generator=generator)[..., ::2],
    }


def exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """In float64; zeros where a row sees no key."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.double()
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -INF)
    unseen = (scores == -INF).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(unseen, 0) @ value


def bound(query: Tensor, key: Tensor, value: Tensor, mask, is_causal: bool, scale: float) -> Tensor:
    """Weights rounded to bf16 (2^-8 of each), sums in fp32, the result rounded to bf16 (2^-8)."""
    sizes = exact(query, key, value.abs(), mask, is_causal, scale)
    return 2**-7 * sizes * 1.01 + 1e-6


@pytest.mark.parametrize("name", masks(SHAPES["a prompt"]))
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_within_its_rounding(level, shape, name):
    arguments = (*tensors(SHAPES[shape]), masks(SHAPES[shape])[name], False, 0.2)
    found = attention(*arguments)
    error = (found.double() - exact(*arguments)).abs()
    assert found.dtype == torch.bfloat16 and (error <= bound(*arguments)).all()


@pytest.mark.parametrize("shape", ["a prompt", "one token", "no shared heads"])
def test_causal_attention(level, shape):
    """The first row sees one key; tiles that span two heads see those of each."""
    arguments = (*tensors(SHAPES[shape]), None, True, 0.3)
    error = (attention(*arguments).double() - exact(*arguments)).abs()
    assert (error <= bound(*arguments)).all()


@pytest.mark.parametrize("scale", [0.0, -0.4, 30.0])
def test_any_scale(level, scale):
    """Also a negative one, and one that leaves a single key its weight."""
    arguments = (*tensors(SHAPES["a prompt"]), None, False, scale)
    error = (attention(*arguments).double() - exact(*arguments)).abs()
    assert (error <= bound(*arguments) + 1e-4 * abs(scale)).all()


def test_large_scores_and_far_apart_ones(level):
    """Scores of +-1e4: no overflow, and the maximum moves from chunk to chunk."""
    query, key, value = tensors((1, 2, 1, 17, 300, 32, 16))
    key = key * torch.linspace(1, 400, 300)[:, None].bfloat16()
    arguments = (query, key, value, None, False, 1.0)
    found, expected = attention(*arguments), exact(*arguments)
    # A score's own error in fp32 moves its weight: 32 products of up to 1e4 in units of 2^-24.
    assert found.isfinite().all()
    assert (found.double() - expected).abs().max() <= 0.05 * value.abs().max()


@pytest.mark.parametrize("size", [1.0, 1e9, 1e20, 3e37])
def test_one_key_has_all_the_weight(level, size):
    """However large its score is, while fp32 holds it."""
    query, key, value = tensors((2, 4, 2, 33, 1, 2, 16))
    found = attention(query, key * size, value, None, False, 0.1)
    expected = value.repeat_interleave(2, 1).expand(found.shape)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_a_row_that_sees_no_key_is_zeros(level):
    query, key, value = tensors(SHAPES["a prompt"])
    mask = torch.zeros(1, 1, 70, 130)
    mask[:, :, 3] = -INF
    found = attention(query, key, value, mask, False, 0.1)
    assert (found[:, :, 3] == 0).all() and (found[:, :, 4] != 0).any()
    query[0, 0, 0, 0] = INF
    for function in (attention, attention_eager):
        nothing = function(query, key[:, :, :0], value[:, :, :0], None, False, 0.1)
        assert nothing.shape == (1, 8, 70, 64) and (nothing == 0).all()


def test_nan_and_infinity_stay_in_their_row(level):
    query, key, value = tensors(SHAPES["a prompt"])
    clean = attention(query, key, value, None, False, 0.1)
    query = query.clone()
    query[0, 1, 5, 3], query[0, 2, 66, 0] = math.nan, INF
    found = attention(query, key, value, None, False, 0.1)
    rows = torch.zeros(8, 70, dtype=torch.bool)
    rows[1, 5] = rows[2, 66] = True
    assert found[0][rows].isnan().all()
    assert torch.equal(found[0][~rows], clean[0][~rows])


def test_unseen_values_do_not_matter(level):
    """NaN behind the causal mask, in chunks that are skipped and in keys of the same chunk."""
    query, key, value = tensors((1, 2, 1, 10, 200, 32, 32))
    expected = attention(query, key[:, :, :10], value[:, :, :10], None, True, 0.2)
    key = key.clone()
    key[:, :, 10:] = math.nan
    assert torch.equal(attention(query, key, value, None, True, 0.2), expected)


def test_empty_results(level):
    query, key, value = tensors(SHAPES["a prompt"])
    assert attention(query[:, :, :0], key, value, None, False, 1.0).shape == (1, 8, 0, 64)
    assert attention(query[:0], key[:0], value[:0], None, False, 1.0).shape == (0, 8, 70, 64)


def test_any_strides_give_the_same_bits(level):
    query, key, value = tensors(SHAPES["a prompt"])
    expected = attention(query, key, value, None, False, 0.1)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (query, key, value)]
    assert odd[0].stride(-1) != 1
    assert torch.equal(attention(*odd, None, False, 0.1), expected)


def test_bits_do_not_depend_on_threads_or_batch(level):
    arguments = tensors((3, 8, 2, 70, 130, 64, 64))
    threads = torch.get_num_threads()
    expected = attention(*arguments, None, True, 0.1)
    try:
        torch.set_num_threads(3)
        assert torch.equal(attention(*arguments, None, True, 0.1), expected)
    finally:
        torch.set_num_threads(threads)
    alone = attention(*(x[1:2] for x in arguments), None, True, 0.1)
    assert torch.equal(alone, expected[1:2])


def test_the_meaning_agrees():
    """Eager PyTorch within twice the bound: its rounding and ours."""
    for name in ("none", "causal", "padding"):
        shape = SHAPES["a prompt"]
        arguments = (*tensors(shape), masks(shape)[name], False, 0.2)
        found, eager = attention(*arguments), attention_eager(*arguments)
        assert eager.stride() == found.stride() and eager.dtype == found.dtype
        assert ((found - eager).abs() <= 2 * bound(*arguments)).all()


@pytest.mark.parametrize("name", ["none", "causal"])
def test_opcheck(name):
    arguments = (*tensors(SHAPES["ragged channels"]), masks(SHAPES["ragged channels"])[name])
    torch.library.opcheck(torch.ops.arc.attention.default, (*arguments, False, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k, v, None, False), "query must be bf16"),
        (
            lambda q, k, v: (q[0], k, v, None, False),
            r"query must be bf16 \[\*, \*, \*, \*\], got bf16 \[8, 70, 64\]",
        ),
        (lambda q, k, v: (q, k[..., :32], v, None, False), r"expected query \[B, H, T, D\]"),
        (lambda q, k, v: (q, k, v[:, :1], None, False), r"expected query \[B, H, T, D\]"),
        (lambda q, k, v: (q[:, :7], k, v, None, False), "multiple of key heads"),
        (lambda q, k, v: (q[..., :63], k[..., :63], v, None, False), "D even"),
        (
            lambda q, k, v: (q, k, v, torch.zeros(70, 129), False),
            r"broadcastable to \[1, 8, 70, 130\]",
        ),
        (lambda q, k, v: (q, k, v, torch.zeros(70, 130).bool(), False), "must be bf16 or fp32"),
        (lambda q, k, v: (q, k, v, torch.zeros(70, 130), True), "and is_causal"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        attention(*change(*tensors(SHAPES["a prompt"])), 1.0)
