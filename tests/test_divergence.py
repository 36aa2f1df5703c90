"""Divergence of model outputs: hand-computed values, what is left out, what must be infinite."""

import math
from types import SimpleNamespace

import pytest
import torch

from arc_ao.outputs import divergence
from arc_ao.outputs.divergence import (
    cosine_divergence,
    is_logits,
    kl_divergence,
    model_output,
    output_divergence,
)

NAN, INF = math.nan, math.inf


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits_output(logits: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)


def test_output_tensor_is_found_in_every_kind_of_output():
    """Logits come before hidden states, those before the first tensor of a tuple."""
    x, y = randn(1, 2, 4), randn(1, 2, 4, seed=1)
    assert model_output(SimpleNamespace(logits=x, last_hidden_state=y)) is x
    assert model_output(SimpleNamespace(logits=None, last_hidden_state=y)) is y
    assert model_output((None, y, x)) is y
    assert model_output(x) is x
    assert model_output({"loss": y, "logits": x}) is x
    assert is_logits({"logits": x}) and not is_logits({"last_hidden_state": y})
    assert is_logits(logits_output(x))
    assert not is_logits(SimpleNamespace(last_hidden_state=y))
    assert not is_logits(x)
    with pytest.raises(TypeError, match="output: expected .logits.*got dict"):
        model_output({"scores": x})


def test_kl_of_two_known_distributions():
    """KL((1/2, 1/2) || (1/4, 3/4)) = (ln 2 + ln 2/3) / 2, averaged with an equal token's 0."""
    reference = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log()
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log() + 3.0  # softmax ignores the shift
    expected = (math.log(2) + math.log(2 / 3)) / 2 / 2
    assert kl_divergence(reference, logits).item() == pytest.approx(expected, rel=1e-6)


def test_kl_is_zero_for_equal_and_positive_for_other_logits():
    reference = 5.0 * randn(2, 7, 33)
    assert kl_divergence(reference, reference.clone()).item() == 0.0
    assert kl_divergence(reference, reference + 0.01 * randn(2, 7, 33, seed=1)).item() > 0.0


# 14 tokens: one chunk, a divisor, a ragged last chunk, and one token at a time.
@pytest.mark.parametrize("chunk_tokens", [100, 7, 4, 1])
def test_chunks_do_not_change_the_divergence(chunk_tokens, monkeypatch):
    """The chunk size, given or from the memory limit, only bounds memory."""
    reference, value = randn(2, 7, 33), randn(2, 7, 33, seed=1)
    for function in (kl_divergence, cosine_divergence):
        whole = function(reference, value)
        torch.testing.assert_close(function(reference, value, chunk_tokens=chunk_tokens), whole)
        with monkeypatch.context() as patch:
            patch.setattr(divergence, "CHUNK_ELEMENTS", 33 * chunk_tokens)
            torch.testing.assert_close(function(reference, value), whole)


def test_kl_reads_strided_and_low_precision_logits():
    """A slice of the sequence and bf16 logits give what their fp32 copy gives, bit for bit."""
    reference, value = randn(2, 8, 33).bfloat16(), randn(2, 8, 33, seed=1).bfloat16()
    result = kl_divergence(reference[:, :-1], value[:, :-1])
    expected = kl_divergence(reference[:, :-1].clone().float(), value[:, :-1].clone().float())
    assert torch.equal(result, expected)


# The reference gives every entry a probability, so that a -inf in the output is an error too.
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_broken_logits_give_infinity(bad):
    """One bad value among many tokens may not be averaged away or raise."""
    reference = randn(2, 5, 9)
    broken = reference.clone()
    broken[1, 3, 4] = bad
    assert kl_divergence(reference, broken).item() == INF
    assert output_divergence(logits_output(reference), logits_output(broken)) == INF


def test_broken_logits_are_seen_where_the_reference_underflows():
    """A reference probability that underflows to 0 does not hide a -inf, NaN or +inf."""
    reference = torch.tensor([[0.0, -1000.0, 0.0]])
    for bad in (NAN, INF, -INF):
        assert kl_divergence(reference, torch.tensor([[0.0, bad, 0.0]])).item() == INF


def test_vocabulary_masked_in_both_contributes_nothing():
    reference, value = randn(3, 8), randn(3, 8, seed=1)
    expected = kl_divergence(reference, value)
    mask = torch.full((3, 2), -INF)
    masked = kl_divergence(torch.cat([reference, mask], -1), torch.cat([value, mask], -1))
    torch.testing.assert_close(masked, expected)


def test_cosine_of_known_vectors():
    """Equal 0, scaled 0, orthogonal 1, opposite 2: mean 3/4."""
    reference = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    hidden = torch.tensor([[1.0, 0.0], [6.0, 8.0], [0.0, 5.0], [-1.0, -1.0]])
    assert cosine_divergence(reference, hidden).item() == pytest.approx(0.75, abs=1e-12)


def test_cosine_of_zero_huge_and_broken_vectors():
    """Zeros compare as equal to zeros only; squares that overflow fp32 do not; NaN is infinite."""
    zero, one, huge = torch.zeros(1, 4), torch.ones(1, 4), torch.full((1, 4), 1e30)
    assert cosine_divergence(zero, zero).item() == 0.0
    assert cosine_divergence(one, zero).item() == 1.0
    assert cosine_divergence(one, huge).item() == pytest.approx(0.0, abs=1e-12)
    for bad in (NAN, INF, -INF):
        broken = torch.tensor([[bad, 1.0, 1.0, 1.0]])
        assert cosine_divergence(one, broken).item() == INF
        assert cosine_divergence(zero, broken).item() == INF


@pytest.mark.parametrize("kind", [logits_output, lambda x: SimpleNamespace(last_hidden_state=x)])
def test_padding_tokens_are_left_out(kind):
    """The masked result is that of the kept tokens alone, even if padding holds NaN."""
    reference, value = randn(2, 4, 9), randn(2, 4, 9, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    kept = mask.bool()
    expected = output_divergence(kind(reference[kept]), kind(value[kept]))
    value[~kept] = NAN
    assert output_divergence(kind(reference), kind(value), mask) == pytest.approx(expected)
    assert output_divergence(kind(reference), kind(value)) == INF


def test_kind_of_output_chooses_the_measure():
    reference, value = randn(2, 4, 9), randn(2, 4, 9, seed=1)
    kl = output_divergence(logits_output(reference), logits_output(value))
    assert kl == kl_divergence(reference, value).item()
    assert output_divergence((reference,), value) == cosine_divergence(reference, value).item()


def test_outputs_without_tokens_ignore_the_mask():
    """A classifier's [B, C] logits and pooled embeddings have nothing to mask."""
    reference, value, mask = randn(2, 3), randn(2, 3, seed=1), torch.tensor([[1, 0], [1, 1]])
    kl = output_divergence(logits_output(reference), logits_output(value), mask)
    assert kl == kl_divergence(reference, value).item()


def test_single_logit_is_a_binary_classifier():
    """KL of Bernoulli(sigmoid(0)) from Bernoulli(sigmoid(ln 3)) = (ln(1/2 / 3/4) + ln 2) / 2."""
    output = output_divergence(
        logits_output(torch.tensor([[0.0]])), logits_output(torch.tensor([[math.log(3)]]))
    )
    assert output == pytest.approx((math.log(2 / 3) + math.log(2)) / 2, rel=1e-6)


def test_outputs_that_cannot_be_compared_are_refused():
    x = randn(2, 4, 9)
    with pytest.raises(ValueError, match="same shape.*2, 4, 9.*2, 4, 8"):
        kl_divergence(x, x[..., :8])
    with pytest.raises(ValueError, match="same kind"):
        output_divergence(logits_output(x), x)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[2, 4\], got \[2, 3\]"):
        output_divergence(x, x, torch.ones(2, 3))
    with pytest.raises(ValueError, match="no token"):
        output_divergence(x, x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no token"):
        kl_divergence(x[:0], x[:0])
