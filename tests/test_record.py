"""The accuracy record: its data, its measures, and a run that stops and goes on."""

import json
import lzma
from types import SimpleNamespace

import pytest
import torch
from record_tools import WORDS, make_record
from tiny_models import (
    byte_tokenizer,
    perturbed,
    save_tiny_bert,
    tiny_llama,
)
from torch import nn

from arc_ao import ARCConfig
from arc_ao.eval.perplexity import evaluate_text
from benchmarks.accuracy import methods as record_methods
from benchmarks.accuracy import metrics, subjects, texts
from benchmarks.accuracy import record as record_command
from benchmarks.accuracy.store import Job, Store
from benchmarks.peers import run

LLAMA = "model.layers.0."


@pytest.fixture
def record(tmp_path, monkeypatch):
    return make_record(tmp_path, monkeypatch)


def test_a_run_goes_on_where_it_stopped(record, monkeypatch, capsys):
    """Seeds of main rows, a row that fails, and a second run that measures the rest."""
    methods = ["--methods", "unquantized", "plain NVFP4", "ARC (paper) 10 %", "Hadamard 128"]
    document = record.run(*methods, "MXFP4 (format only)")
    rows = {(row["method"], row["seed"]): row for row in document["rows"]}
    assert len(rows) == 6 and ("ARC (paper) 10 %", 1) in rows and ("plain NVFP4", 1) not in rows
    plain = rows["plain NVFP4", 0]
    assert 0 < plain["metrics"]["books"]["mean_kl"] < 0.1
    assert plain["cost"]["extra_channels"] == 0 and plain["tasks"]["parity"]["n"] == 2
    assert set(plain["sqnr_db"]) == set(metrics.KINDS)
    assert all(10 < value < 40 for value in plain["sqnr_db"].values())
    assert 40 % 16 and plain["cost"]["extra_bits"] > 0  # down_proj is padded
    assert "expected in_features to be a multiple" in rows["Hadamard 128", 0]["error"]
    draws = [rows["ARC (paper) 10 %", s]["metrics"]["books"]["mean_kl"] for s in (0, 1)]
    assert draws[0] != draws[1]
    markdown = (record.output / "accuracy.md").read_text()
    assert "* Hadamard 128: seed 0: ValueError: " in markdown and "+-" in markdown
    assert "Not run: ARC (paper) 6 %" not in markdown and "; ARC (paper) 6 %;" in markdown
    measured = []
    measure = subjects.Subject.measure
    count = lambda self, row, *rest: measured.append(row) or measure(self, row, *rest)
    monkeypatch.setattr(subjects.Subject, "measure", count)
    record.run(*methods, "RTN, mse scales")
    assert [row.rotation for row in measured] == [0, 128]  # new, and failed before
    record.run("--report-only")
    assert len(measured) == 2
    assert "NOT MEASURED: shipped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        record.run("--report-only", "--check")


def test_an_encoder_is_compared_by_its_embeddings(record, tmp_path, monkeypatch):
    """Both figures, two seeds, no lm-eval tasks."""
    save_tiny_bert(tmp_path / "bert")
    monkeypatch.setattr(subjects, "model_directory", lambda name: tmp_path / "bert")
    lines = [f"{i} " + WORDS[40 * i : 40 * i + 199].replace("\n", " ") for i in range(240)]
    (tmp_path / "data" / texts.WIKI_LINES).write_text("\n".join(f"{x:x<201}" for x in lines))
    pairs = [f"about {i},about {i * i},{i % 6}" for i in range(12)]
    (tmp_path / "data" / texts.STSB).write_text("\n".join(pairs))
    methods = ["--methods", "unquantized", "plain NVFP4", "ARC (paper) 10 %"]
    rows = record.run(*methods, "--models", "encoder", "--evaluation-lines", "3")["rows"]
    assert [row["error"] for row in rows] == [None] * 4
    found = [row["metrics"][subjects.LINES].get("one_minus_cosine") for row in rows]
    assert found[0] is None and all(0 < value < 0.1 for value in found[1:])
    assert all(-100 <= row["metrics"]["STS-B"]["sts_spearman"] <= 100 for row in rows)
    assert not any("tasks" in row for row in rows)
    assert set(rows[1]["sqnr_db"]) == set(metrics.KINDS)  # the pooler is none of them
    assert "## encoder" in (record.output / "accuracy.md").read_text()


def test_a_model_that_does_not_load_fails_all_its_rows(record, monkeypatch):
    def broken(*_):
        raise OSError("no such\nfile at all")

    monkeypatch.setattr(record_command, "load_subject", broken)
    document = record.run("--methods", "plain*")
    assert [row["error"] for row in document["rows"]] == ["OSError: file at all"] * 3


def test_peers_are_measured_like_our_rows_or_listed_with_their_error(record, monkeypatch):
    """A peer that returns the model's own outputs has no divergence; its budget is what it says."""

    def outputs(peer, recipe, directory, kind, calibration, evaluation, work, *, timeout):
        if recipe == "broken":
            return SimpleNamespace(outputs=None, error="it asks for a GPU", info={})
        model, _ = subjects.load_model(directory)
        found = [model(**batch).logits.detach() for batch in evaluation]
        return SimpleNamespace(outputs=found, error=None, info={"bits_per_weight": 5.0})

    monkeypatch.setattr(run, "PEERS", {"other": ["good", "broken"]})
    monkeypatch.setattr(run, "peer_outputs", outputs)
    assert not record.run("--methods", "other*")["rows"]  # not without --peers
    good, broken = record.run("--methods", "other*", "--peers")["rows"]
    assert good["metrics"]["books"]["mean_kl"] == pytest.approx(0, abs=1e-7)
    assert good["cost"]["extra_bits"] == 0.5
    assert broken["error"] == "RuntimeError: it asks for a GPU"


def test_rows_of_another_commit_count_only_if_asked(tmp_path):
    job = Job("m", "row", 0, "main", {"tokens": 1})
    Store(tmp_path, "old").save(job, {}, None)
    assert Store(tmp_path, "old").finished(job)
    assert Store(tmp_path, "new").load(job) is None
    assert Store(tmp_path, "new", any_commit=True).load(job)["commit"] == "old"
    other = Job("m", "row", 0, "main", {"tokens": 2})
    assert other.key != job.key and not Store(tmp_path, "old").finished(other)


def test_text_metrics_are_those_of_evaluate_text():
    """On windows that follow each other, as evaluate_text has them."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    other = perturbed(model, 0.02)
    text = WORDS[: 64 * 8]
    batches = texts.spread_windows(tokenizer, text, window=64, tokens=512)
    reference = list(metrics.decoder_outputs(model, batches))
    outputs = metrics.decoder_outputs(other, batches)
    found = metrics.text_metrics(batches, outputs, reference)
    options = {"reference": model, "window": 64, "progress": False}
    expected = evaluate_text(other, tokenizer, text, **options)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert found["mean_kl"] == pytest.approx(expected.mean_kl, rel=1e-5) and found["mean_kl"] > 1e-3


def test_outputs_that_are_missing_or_not_finite_are_refused():
    batch = texts.spread_windows(byte_tokenizer(), WORDS, window=8, tokens=8)
    with pytest.raises(ValueError, match="expected logits for .* tokens, found None"):
        metrics.text_metrics(batch, [], None)
    broken = [torch.full((1, 8, 300), torch.nan)]
    with pytest.raises(ValueError, match="perplexity: expected a finite figure"):
        metrics.text_metrics(batch, broken, None)


def test_pairs_read_as_people_do_correlate_fully(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('"a, b",c,1.0\nc,dd,3.0\n"a, b",dd,5.0\n')
    pairs = texts.read_pairs(path)
    assert pairs.sentences == ["c", "dd", "a, b"]  # short ones first, each once
    angles = {"a, b": 0.0, "dd": 0.1, "c": 1.0}  # similarity falls with the difference
    vectors = torch.tensor([[angles[s]] for s in pairs.sentences])
    vectors = torch.cat((vectors.cos(), vectors.sin()), 1)
    assert metrics.pair_metrics(pairs, vectors)["sts_spearman"] == pytest.approx(100)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("model.layers.3.self_attn.v_proj", "q/k/v"),
        ("model.layers.3.self_attn.o_proj", "o"),
        ("encoder.layer.1.attention.self.query", "q/k/v"),
        ("encoder.layer.1.attention.output.dense", "o"),
        ("encoder.layer.1.intermediate.dense", "gate/up"),
        ("encoder.layer.1.output.dense", "down"),
        ("pooler.dense", None),
        ("lm_head", None),
    ],
)
def test_layer_kinds(name, kind):
    assert metrics.layer_kind(name) == kind


def test_layer_sqnr_is_the_mean_over_changed_linears():
    """Weights scaled by 1.1 and 1.01: noise a hundredth and a ten-thousandth, 20 and 40 dB."""
    model, changed = tiny_llama(), tiny_llama()
    with torch.no_grad():
        changed.model.layers[0].self_attn.q_proj.weight *= 1.1
        changed.model.layers[1].self_attn.k_proj.weight *= 1.01
    batches = texts.spread_windows(byte_tokenizer(), WORDS, window=16, tokens=64)
    found = metrics.layer_sqnr(model, changed, batches)
    assert found == {"q/k/v": pytest.approx(30, abs=0.01)}


def test_layers_left_alone_cost_what_they_store():
    """Two linears of one shape, one of them in 16 bits: 11.5 extra bits for half the weights."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    row = ARCConfig(budget=0.0, recipe="plain")
    calibration = [torch.ones(1, 32)]
    found = record_methods.quantize_row(model, row, calibration, lambda _, name: name == "0")
    outer_scale = 32 / 32**2
    assert found["cost"]["extra_bits"] == pytest.approx(outer_scale)
    both = record_methods.cost(model, ["0", "1"])
    assert both["extra_bits"] == pytest.approx((11.5 + outer_scale) / 2)


def test_mxfp4_rounds_both_operands():
    """Powers of two pass, 1.1 becomes 1; a rotation that does not fit is refused by name."""
    linear = nn.Linear(32, 4, bias=False)
    nn.init.constant_(linear.weight, 1.1)
    model = nn.Sequential(linear)
    record_methods.quantize_row(model, record_methods.MXFP4(), [], None)
    x = torch.full((2, 32), 2.0)
    x[1] = 2.2
    assert torch.equal(model(x), torch.full((2, 4), 64.0))
    with pytest.raises(ValueError, match="0: expected in_features that are a multiple .* 128"):
        record_methods.round_to_mxfp4({"0": linear}, 128)


def test_every_row_has_its_own_settings():
    rows = record_methods.all_rows()
    described = [json.dumps(record_methods.describe(row), default=str) for row in rows.values()]
    assert len(set(described)) == len(rows) > 30
    assert record_methods.describe(rows["SVDQuant r16"])["rank"] == 16


def test_calibration_and_evaluation_keep_apart():
    line = "x" * 61
    texts.require_apart("model", [line + "y", "short"], ["short", line])
    with pytest.raises(ValueError, match="model: expected .* found 1, such as 'xxx"):
        texts.require_apart("model", f"a\n {line}\n", [line])


def test_books_end_where_the_calibration_text_begins(tmp_path):
    path = tmp_path / "books.xz"
    with lzma.open(path, "wt") as file:
        file.write("first\n\nsecond\n\nthird\n")
    assert texts.read_books(path, "second\n") == "first\n\n"
    with pytest.raises(ValueError, match="found none"):
        texts.read_books(path, "first")


def test_draws_of_lines_keep_their_distance_from_the_evaluated_ones():
    lines = [f"{i:03d}" + "x" * 198 for i in range(400)]
    text = "\n".join(lines)
    assert texts.calibration_lines(text, 0) == lines[:64]
    drawn = [{int(line[:3]) for line in texts.calibration_lines(text, s)} for s in (1, 2)]
    assert drawn[0] != drawn[1] and all(len(d) == 64 for d in drawn)
    assert not (drawn[0] | drawn[1]) & set(range(64, 264))


def test_windows_are_spread_over_the_text_and_drawn_by_seed():
    tokenizer = byte_tokenizer()
    text = "".join(chr(97 + i) * 4 for i in range(10))  # ten windows of one letter
    (batch,) = texts.spread_windows(tokenizer, text, window=4, tokens=16)
    letters = [tokenizer.decode(ids)[0] for ids in batch["input_ids"]]
    assert letters == ["a", "c", "f", "h"]
    draw = lambda seed: [
        tokenizer.decode(b["input_ids"][0])[0]
        for b in texts.calibration_windows(tokenizer, text, window=4, tokens=12, seed=seed)
    ]
    assert draw(0) == ["a", "b", "c"] and draw(1) == draw(1) != draw(2)
    with pytest.raises(ValueError, match="expected 48 tokens"):
        texts.spread_windows(tokenizer, text, window=4, tokens=48)
