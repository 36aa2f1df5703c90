"""A run of the accuracy record on tiny models, with texts and a task made up here."""

import json
import lzma
from types import SimpleNamespace

from tiny_models import byte_tokenizer, tiny_llama

from benchmarks.accuracy import real_subjects, record, subjects, texts

WORDS = "".join(
    f"Sentence {i} of a text that goes on for a while, {i * i} words.\n" for i in range(99)
)


def make_record(tmp_path, monkeypatch) -> SimpleNamespace:
    """run(*arguments) runs the record on a tiny Llama, "stories260K" unless --models says
    otherwise, and returns its JSON; folders; smollm2: another tiny Llama's folder."""
    data, model, real = tmp_path / "data", tmp_path / "stories", tmp_path / "real"
    for name in ("wikitext2", "books", "lm_eval", "stsb"):
        (data / name).mkdir(parents=True)
    (data / texts.WIKITEXT).write_text(WORDS)
    with lzma.open(data / texts.BOOKS, "wt") as file:
        file.write(WORDS.replace("text", "book"))
    rows = [{"query": f"{i} is", "choices": ["odd", "even"], "gold": 1 - i % 2} for i in range(4)]
    task = data / "lm_eval" / "parity.jsonl"
    task.write_text("\n".join(json.dumps(row) for row in rows))
    for module, name, word in (
        (subjects, "CALIBRATION_TEXT", "play"),
        (real_subjects, "CALIBRATION_TEXT", "play"),
        (real_subjects, "MIXED_TEXT", "poem"),
    ):
        path = tmp_path / f"{word}.txt"
        path.write_text(WORDS.replace("text", word)[:3000])
        monkeypatch.setattr(module, name, path)
    monkeypatch.setenv("ARC_AO_CACHE", str(tmp_path / "cache"))
    tiny_llama(hidden_size=32, intermediate_size=40).save_pretrained(model)
    tiny_llama(seed=3, hidden_size=32).bfloat16().save_pretrained(real)
    for folder in (model, real):
        byte_tokenizer().save_pretrained(folder)
    sizes = ["--tokens", "256", "--calibration-tokens", "128", "--task-limit", "2", "--seeds", "2"]
    work, output = tmp_path / "work", tmp_path / "output"
    paths = ["--data", data, "--stories", model, "--work", work, "--output", output]
    command = [*map(str, paths), "--models", "stories260K", *sizes]

    def run(*arguments: str) -> dict:
        record.main([*command, *arguments])
        return json.loads((output / "accuracy.json").read_text())

    return SimpleNamespace(run=run, data=data, work=work, output=output, smollm2=real)
