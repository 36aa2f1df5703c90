"""`arc-ao report --html` on the shipped model: what is measured, and what the page makes of it."""

import json
from pathlib import Path

import pytest
import torch
from report_cases import Page
from tiny_models import byte_tokenizer, tiny_llama
from torch import nn
from transformers import BertConfig, BertModel

from arc_ao import ARCConfig, quantize_, save_pretrained
from arc_ao.calibration.data import text_batches
from arc_ao.cli import main
from arc_ao.eval.perplexity import evaluate_text, read_text
from arc_ao.eval.report import layer_report
from arc_ao.integrations.huggingface import load_model
from arc_ao.report_page.channels import channel_amax, column_amax, residual_columns
from arc_ao.report_page.data import block_of, budget_by_kind, kind_of
from arc_ao.report_page.facts import notes
from arc_ao.report_page.quality import NEW_TOKENS, PROMPTS
from arc_ao.shipped import HELDOUT_TEXT, MIXED_TEXT, MODEL

TOKENS, QUALITY_TOKENS = 128, 256
SECTIONS = {"model", "quality", "samples", "outliers", "sqnr", "budget", "config"}
BALANCED = ARCConfig(recipe="balanced", budget=0.1)
PLAIN = ARCConfig(recipe="plain", budget=0.0)


def quantized(folder: Path, config: ARCConfig) -> Path:
    model, tokenizer = load_model(MODEL)
    batches = text_batches(tokenizer, read_text(MIXED_TEXT), window=64, max_tokens=128)
    quantize_(model, config, calibration_data=batches, progress=False)
    return save_pretrained(model, folder, tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The shipped model, quantized by "balanced" and plainly."""
    parent = tmp_path_factory.mktemp("quantized")
    configs = {"balanced": BALANCED, "plain": PLAIN}
    return {name: quantized(parent / name, config) for name, config in configs.items()}


def report(tmp_path: Path, *models: Path, original: Path | None = MODEL) -> tuple[Page, dict]:
    """Run the command; the page and the dictionary."""
    html, data = tmp_path / "out.html", tmp_path / "out.json"
    command = ["report", *map(str, models), "--html", str(html), "--json", str(data)]
    command += ["--tokens", str(TOKENS), "--quality-tokens", str(QUALITY_TOKENS)]
    assert main(command + (["--original", str(original)] if original else [])) == 0
    return Page(html.read_text()), json.loads(data.read_text())


@pytest.fixture(scope="module")
def compared(folders, tmp_path_factory) -> tuple[Page, dict]:
    """Balanced against plain."""
    tmp_path = tmp_path_factory.mktemp("compared")
    return report(tmp_path, folders["balanced"], folders["plain"])


def test_the_page_has_the_numbers_of_the_json(compared):
    page, data = compared
    assert page.ids() >= SECTIONS and len(data["layers"]) == 28
    values = set(page.values())
    for row in [*data["facts"], *data["quality"]["metrics"]]:
        assert {value for value in row["models"] if value is not None} <= values
    for layer in data["layers"]:
        first, second = layer["models"]
        assert {first["sqnr_db"], second["sqnr_db"], first["sqnr_plain_db"]} <= values
        assert second["sqnr_db"] - first["sqnr_db"] in values


def test_layers_are_those_of_the_layer_report(compared, folders):
    """SQNR as `arc_ao.report` measures it on the same tokens, for both models."""
    _, data = compared
    original, tokenizer = load_model(MODEL)
    batches = text_batches(tokenizer, read_text(MIXED_TEXT), max_tokens=TOKENS)
    assert data["layer_tokens"] == TOKENS
    for i, folder in enumerate((folders["balanced"], folders["plain"])):
        model, _ = load_model(folder)
        rows = layer_report(model, original, batches, progress=False)
        found = {layer["name"]: layer["models"][i]["sqnr_db"] for layer in data["layers"]}
        assert found == {row.name: row.sqnr_db for row in rows}


def test_quality_is_that_of_the_text(compared, folders):
    """Perplexity, KL and agreement as `arc-ao eval` has them; the original's perplexity too."""
    _, data = compared
    original, tokenizer = load_model(MODEL)
    model, _ = load_model(folders["balanced"])
    options = {"window": 512, "max_tokens": QUALITY_TOKENS, "progress": False}
    text = read_text(HELDOUT_TEXT)
    expected = evaluate_text(model, tokenizer, text, reference=original, **options)
    rows = {row["key"]: row for row in data["quality"]["metrics"]}
    for key in ("perplexity", "mean_kl", "top1_agreement"):
        assert rows[key]["models"][0] == pytest.approx(getattr(expected, key), rel=1e-6)
    of_original = evaluate_text(original, tokenizer, text, **options).perplexity
    assert rows["perplexity"]["original"] == pytest.approx(of_original, rel=1e-6)
    assert rows["mean_kl"]["original"] is None and data["quality"]["missing"] == ""


def test_facts_are_those_of_the_quantization(compared, folders):
    _, data = compared
    facts = {row["key"]: row for row in data["facts"]}
    for i, folder in enumerate((folders["balanced"], folders["plain"])):
        summary = json.loads((folder / "arc_ao.json").read_text())
        assert data["models"][i]["summary"] == summary
        assert facts["bits_per_weight"]["models"][i] == pytest.approx(summary["bits_per_weight"])
        assert facts["extra_channels"]["models"][i] == pytest.approx(summary["extra_channels"])
        assert facts["skipped"]["models"][i] == len(summary["skipped"])
        assert facts["bytes"]["original"] == summary["bytes_before"]


def test_samples_of_all_three_models(compared):
    """Greedy, of one length; the share that is the same begins both texts."""
    _, data = compared
    assert [sample["prompt"] for sample in data["samples"]] == list(PROMPTS)
    for sample in data["samples"]:
        assert len(sample["models"]) == 2
        for found in sample["models"]:
            assert 0 <= found["same_tokens"] <= found["tokens"] <= NEW_TOKENS
            assert (found["text"] == sample["original"]) == (found["same_tokens"] == NEW_TOKENS)


def test_without_an_original_the_page_says_what_is_missing(folders, tmp_path):
    page, data = report(tmp_path, folders["plain"], original=None)
    assert page.ids() >= SECTIONS
    assert "--original" in data["quality"]["missing"] and "--original" in data["layers_missing"]
    assert [row["key"] for row in data["quality"]["metrics"]] == ["perplexity"]
    assert all(layer["input"]["median_amax"] > 0 for layer in data["layers"])
    assert data["samples"][0]["original"] is None


def test_encoders_are_measured_by_their_output(tmp_path):
    """1 - cosine similarity, and no samples."""
    settings = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    model, tokenizer = BertModel(BertConfig(**settings)), byte_tokenizer()
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    quantize_(model, PLAIN, progress=False)
    save_pretrained(model, tmp_path / "quantized", tokenizer)
    page, data = report(tmp_path, tmp_path / "quantized", original=tmp_path / "original")
    assert page.ids() >= SECTIONS - {"samples"} and "samples" not in page.ids()
    (metric,) = data["quality"]["metrics"]
    assert metric["name"].startswith("1 - cosine") and 0 < metric["models"][0] < 0.1
    assert data["samples"] == [] and data["quality"]["tokens"] == QUALITY_TOKENS


def test_models_of_another_shape_are_refused(folders, tmp_path, capsys):
    other = tiny_llama()
    quantize_(other, PLAIN, progress=False)
    save_pretrained(other, tmp_path / "other", byte_tokenizer())
    options = ["--html", str(tmp_path / "x.html"), "--tokens", "16", "--quality-tokens", "16"]
    assert main(["report", str(folders["plain"]), str(tmp_path / "other"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "q_proj: expected shape 256 x 256" in error and "found 64 x 64" in error
    assert main(["report", str(MODEL), *options]) == 2
    assert "expected a quantized model, found no ARCTensor" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_what_only_a_page_shows_is_refused_without_one(capsys):
    """Before any model is looked for."""
    assert main(["report", "MODEL"]) == 2
    assert "expected --original" in capsys.readouterr().err
    assert main(["report", "MODEL", "OTHER", "--original", "ORIGINAL"]) == 2
    assert "expected --html with a second model, OTHER" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--html: no folder nowhere"):
        main(["report", "MODEL", "--html", "nowhere/x.html"])


def test_channels_are_measured_and_binned():
    """The largest magnitude of each channel; no more than 256 columns, of neighbours."""
    linear = nn.Linear(600, 4)
    x = torch.zeros(2, 3, 600)
    x[0, 1, 299], x[1, 2, 599], x[0, 0, 0] = -7.0, 3.0, 0.5
    with channel_amax({"linear": linear}) as meters:
        linear(x)
        linear(input=x / 2)
        linear(x[:0])
    columns = column_amax(meters["linear"].amax)
    assert len(columns) == 200 and {i: v for i, v in enumerate(columns) if v} == {
        0: 0.5,
        99: 7.0,
        199: 3.0,
    }
    assert not linear._forward_pre_hooks


@pytest.mark.parametrize("order", ["none", "amax"])
def test_residuals_are_marked_at_the_models_channels(order):
    """Outliers that got residuals are where they are in the input, however blocks are formed."""
    outliers = [3, 40, 77, 90]
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, outliers] *= 50
    model = nn.Sequential(nn.Linear(128, 32))
    config = ARCConfig(
        recipe="balanced", num_act_channels=64, num_weight_channels=0, channel_order=order
    )
    quantize_(model, config, calibration_data=[x], progress=False)
    marked = residual_columns(model[0].weight)
    assert marked["weight_columns"] == [] and len(marked["act_columns"]) == 64
    assert set(outliers) <= set(marked["act_columns"])


def test_names_of_kinds():
    assert kind_of("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
    assert kind_of("layers.3.mlp.experts.17.w1") == "mlp.experts.*.w1"
    assert kind_of("encoder.layers.3") == "encoder.layers.*" and kind_of("vision.proj") == "proj"
    assert block_of("layers.3.mlp.experts.17.w1") == "3.17" and block_of("proj") == ""


def test_budget_is_summed_by_kind():
    """Extra multiply-adds weigh a channel by the rows of its layer."""
    row = {"act_channels": 16, "weight_channels": 0}
    layers = [
        {"kind": "q", "out_features": 64, "in_features": 32, "models": [row]},
        {"kind": "up", "out_features": 192, "in_features": 32, "models": [row]},
        {"kind": "up", "out_features": 64, "in_features": 32, "models": [None]},
    ]
    q, up = budget_by_kind(layers, 1)
    assert (q["models"][0]["extra"], q["models"][0]["share"]) == (0.5, 0.25)
    assert up["linears"] == 2 and up["models"][0]["share"] == 0.75
    assert up["models"][0]["extra"] == 0.5 and up["models"][0]["act_channels"] == 16


def test_notes_say_what_a_reader_should_know():
    """Where GPTQ had few tokens or was not kept, what was chosen, and where weights come from."""
    layer = {"rounding": "nearest", "damping": 0.1, "tokens": 100, "shape": [8, 64]}
    enough = {"rounding": "gptq", "damping": 0.1, "tokens": 1000, "shape": [8, 64]}
    trials = [[{"recipe": "paper", "divergence": 0.1}, {"recipe": "plain", "divergence": 0.2}]]
    layers = {"a": layer, "b": enough, "c": {"rounding": "nearest", "shape": [8, 8]}}
    found = notes({"source": "from Q4_K", "trials": trials, "layers": layers})
    assert found[:2] == ["from Q4_K", "Measured 2 candidates, chose recipe paper."]
    assert "at 1 of 2 linears" in found[2] and found[3].startswith("1 of 2 linears were rounded")
