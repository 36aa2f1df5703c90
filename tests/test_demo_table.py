"""What the demos measure with."""

import io

import torch
from rich.console import Console
from tiny_models import VOCAB_SIZE, byte_tokenizer, tiny_llama

from arc_ao import ARCConfig, demo_table
from arc_ao.demo_table import RememberedLogits, Subject


def test_remembered_logits_are_the_models_within_a_bound(monkeypatch):
    """Equal logits, one forward for equal ids, and no more bytes kept than allowed."""
    monkeypatch.setattr(demo_table, "REMEMBERED_BYTES", 3 * 8 * VOCAB_SIZE * 4)
    model = tiny_llama()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    remembered = RememberedLogits(model)
    first, second = torch.arange(16).view(2, 8), torch.arange(16, 32).view(2, 8)
    with torch.no_grad():
        for _ in range(2):
            for ids in (first, second):
                logits = remembered(ids).logits
                assert torch.equal(logits, model(ids).logits)
    assert len(calls) == 4 + 3  # those of the assertion; the second batch does not fit
    assert sum(kept.nbytes for kept in remembered.known.values()) == 2 * 8 * VOCAB_SIZE * 4


def test_rows_are_those_of_evaluate_text():
    """The reference has perplexity alone; the first config is what KL is closed against; sizes are
    of the saved files, and the model stays as it was."""
    model = tiny_llama().to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    subject = Subject(model, byte_tokenizer(), 600, 512)
    reference = subject.reference_row()
    expected = demo_table.evaluate_text(
        model, byte_tokenizer(), subject.text, window=512, max_tokens=600, progress=False
    )
    assert reference.perplexity == expected.perplexity and reference.mean_kl is None
    parameters = sum(p.nbytes for p in model.parameters())
    assert parameters < reference.file_bytes < parameters + 10_000
    configs = {
        "plain": ARCConfig(budget=0.0, recipe="plain"),
        "weights": ARCConfig(budget=0.0, recipe="plain", activation="bf16"),
    }
    batches = [torch.randint(0, 200, (1, 64), generator=torch.Generator().manual_seed(0))]
    console = Console(file=io.StringIO())
    rows = [row for row, _ in subject.quantized_rows(configs, batches, console)]
    plain, weights = rows
    assert plain.closed == 0.0
    assert weights.closed == 1 - weights.mean_kl / plain.mean_kl > 0
    assert plain.file_bytes < reference.file_bytes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
