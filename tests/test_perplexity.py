"""Perplexity: hand-computed values, window boundaries, and what is left as it was."""

import json
import math

import pytest
import torch
from tiny_models import (
    VOCAB_SIZE,
    BigramModel,
    byte_tokenizer,
    perturbed,
    tiny_llama,
    uniform_model,
)

from arc_ao.eval import perplexity
from arc_ao.eval.perplexity import evaluate_text, read_jsonl, read_text
from arc_ao.inference import evaluation_mode
from arc_ao.outputs import divergence

TEXT = "The quick brown fox jumps over the lazy dog."  # 44 bytes


def evaluate(model, text=TEXT, **options):
    return evaluate_text(model, byte_tokenizer(), text, progress=False, **options)


def random_bigrams(seed: int) -> BigramModel:
    generator = torch.Generator().manual_seed(seed)
    return BigramModel(torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator))


def test_uniform_model_has_the_vocabulary_as_perplexity():
    metrics = evaluate(uniform_model())
    assert metrics.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert metrics.bits_per_byte == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-6)
    assert (metrics.tokens, metrics.windows, metrics.window) == (43, 1, 64)
    assert metrics.mean_kl is None


def test_bits_per_byte_counts_bytes_not_characters():
    """Each of these characters is 2 bytes, hence 2 tokens of the byte tokenizer."""
    metrics = evaluate(uniform_model(), "\u00e9\u00e8\u00ea", max_tokens=4)
    assert metrics.tokens == 3
    assert metrics.bits_per_byte == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-6)


# (tokens of the text, window, scored transitions): whole windows; a partial window of 2; a last
# token with no context, which is dropped; a text shorter than the window.
@pytest.mark.parametrize(
    "length, window, scored",
    [
        (8, 4, [0, 1, 2, 4, 5, 6]),
        (10, 4, [0, 1, 2, 4, 5, 6, 8]),
        (9, 4, [0, 1, 2, 4, 5, 6]),
        (3, 4, [0, 1]),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_window_boundaries(length, window, scored, batch_size):
    """Transition i (token i to i + 1) is scored unless i + 1 starts a window."""
    model, reference = random_bigrams(0), random_bigrams(1)
    ids = torch.tensor(byte_tokenizer()(TEXT[:length])["input_ids"])
    last, following = ids[scored], ids[[i + 1 for i in scored]]
    log_q = model.table.detach().double().log_softmax(-1)
    log_p = reference.table.detach().double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[last].mean().item()

    metrics = evaluate(
        model, TEXT[:length], reference=reference, window=window, batch_size=batch_size
    )
    expected = (-log_q[last, following]).mean().exp().item()
    assert metrics.perplexity == pytest.approx(expected, rel=1e-6)
    assert metrics.mean_kl == pytest.approx(kl, rel=1e-5)
    same = (log_p.argmax(-1) == log_q.argmax(-1))[last].double().mean().item()
    assert metrics.top1_agreement == pytest.approx(same)
    assert metrics.tokens == len(scored)
    assert metrics.windows == (length - length % window) // window + (length % window >= 2)


def test_loss_of_a_transformer_is_that_of_transformers():
    """One window: the model's own loss for the same labels."""
    model = tiny_llama()
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert evaluate(model).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_kl_is_zero_for_the_same_model_and_grows_with_the_noise():
    model = tiny_llama()
    same, small, large = (
        evaluate(other, reference=model)
        for other in (model, perturbed(model, 0.002), perturbed(model, 0.02))
    )
    assert same.mean_kl == 0.0 < small.mean_kl < large.mean_kl
    assert same.top1_agreement == 1.0 > small.top1_agreement > large.top1_agreement > 0.0
    assert evaluate(model).top1_agreement is None


def test_chunks_do_not_change_the_metrics(monkeypatch):
    """A memory limit below one window's logits gives the same result."""
    model, reference = random_bigrams(0), random_bigrams(1)
    whole = evaluate(model, reference=reference)
    for module in (perplexity, divergence):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    parts = evaluate(model, reference=reference)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-9)
    assert parts.mean_kl == pytest.approx(whole.mean_kl, rel=1e-9)


def test_max_tokens_cuts_the_text():
    model = random_bigrams(0)
    assert evaluate(model, max_tokens=10).perplexity == evaluate(model, TEXT[:10]).perplexity


def test_broken_model_has_infinite_perplexity():
    """NaN logits, and a loss whose exponential overflows, give inf and no exception."""
    for value in (math.nan, math.inf):
        model = BigramModel(torch.full((VOCAB_SIZE, VOCAB_SIZE), value))
        metrics = evaluate(model, reference=uniform_model())
        assert (metrics.perplexity, metrics.mean_kl) == (math.inf, math.inf)
    certain_but_wrong = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    certain_but_wrong[:, -1] = 1e4
    assert evaluate(BigramModel(certain_but_wrong)).perplexity == math.inf


def test_mode_of_every_module_is_restored():
    """A model in training mode with a frozen submodule is left so, also after an error."""
    model = tiny_llama().train()
    model.model.norm.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    evaluate(model)
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert [m for m in model.modules() if not m.training] == [model.model.norm]


def test_window_follows_the_configuration_up_to_2048():
    assert evaluate(tiny_llama(max_position_embeddings=16)).window == 16
    assert evaluate(tiny_llama(max_position_embeddings=4096)).window == 2048


def test_dict_survives_json():
    metrics = evaluate(uniform_model(), window=16)
    assert json.loads(json.dumps(metrics.to_dict())) == metrics.to_dict()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 1}, "window: expected at least 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2, got 1"),
        ({"text": "a"}, "text: expected at least 2 tokens, got 1"),
        ({"text": ""}, "text: expected at least 2 tokens, got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(uniform_model(), **options)


def test_model_without_logits_is_refused():
    with pytest.raises(ValueError, match="LlamaModel: expected a causal language model"):
        evaluate(tiny_llama().model)


def test_read_text_joins_rows_by_blank_lines(tmp_path):
    """Line separators inside a JSON string do not end a row; plain files are read as they are."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\n', encoding="utf-8")
    assert read_text(path) == "one\u2028two\n\nthree"
    path = tmp_path / "plain.txt"
    path.write_text("{}\n\n  \u00e9\n", encoding="utf-8")
    assert read_text(path) == "{}\n\n  \u00e9\n"


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl:3: expected an object, got list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: expected a \"text\" string, got.*body"),
        ("a.jsonl", b"\n", r"a\.jsonl: no rows"),
        ("a.txt", b"good\nbad \xff\n", r"a\.txt:2: not UTF-8"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)


def test_read_jsonl_counts_lines_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\r\n\n{"b": 2}')
    assert read_jsonl(tmp_path / "a.jsonl") == [(2, {"a": 1}), (4, {"b": 2})]
