"""The shipped model and texts, and the demo on them."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao import demo as demo_module
from arc_ao.calibration.data import text_batches
from arc_ao.eval.perplexity import evaluate_text, read_text
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL

FOUND = {
    "channel_order": "amax",
    "exchange_rate": 0.3,
    "activation_block_scale": "mse",
}  # by the demo


@pytest.fixture(scope="module")
def shipped():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def batches(shipped):
    return text_batches(shipped[1], read_text(CALIBRATION_TEXT), window=512, max_tokens=8192)


def test_size_and_shapes(shipped):
    """At most 8 MB in bf16, every linear a multiple of 128 both ways, 200 kB of held-out text."""
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    linears = [m for n, m in shipped[0].named_modules() if isinstance(m, nn.Linear)]
    assert all(s % 128 == 0 for m in linears for s in m.weight.shape)
    assert all(m.weight.dtype == torch.bfloat16 for m in linears)
    assert HELDOUT_TEXT.stat().st_size >= 200_000


def test_outlier_channels_are_where_the_card_says(shipped):
    """6 of 256 channels stand out in every norm, the same ones in every layer (jitter can hide
    the quietest among them)."""
    loud = set()
    for layer in shipped[0].model.layers:
        for norm, least in ((layer.input_layernorm, 4.0), (layer.post_attention_layernorm, 2.2)):
            gain = norm.weight.float()
            relative = gain / gain.median()
            loud.add(tuple(relative.topk(5).indices.sort().values.tolist()))
            assert relative.topk(6).values.min() > least and relative.max() > 15
    assert len(loud) == 1


def test_the_model_learned_english(shipped):
    """Far better than the uniform 2048 and than a unigram model of the same text."""
    model, tokenizer = shipped
    text = read_text(HELDOUT_TEXT)
    metrics = evaluate_text(model, tokenizer, text, window=512, max_tokens=8192, progress=False)
    assert metrics.perplexity < 60


@pytest.mark.slow
def test_ours_closes_forty_percent_the_best_fifty_five(shipped, batches):
    """At 10 % extra channels, against plain NVFP4's KL, on held-out text; the paper's, less."""
    model, tokenizer = shipped
    text = read_text(HELDOUT_TEXT)

    def mean_kl(config: ARCConfig) -> float:
        quantized = copy.deepcopy(model)
        summary = quantize_(quantized, config, calibration_data=batches, progress=False)
        assert summary.extra_channels <= 0.10
        options = {"reference": model, "window": 512, "max_tokens": 8192, "progress": False}
        return evaluate_text(quantized, tokenizer, text, **options).mean_kl

    plain = mean_kl(ARCConfig(budget=0.0, recipe="plain"))
    paper = mean_kl(ARCConfig(budget=0.10, recipe="paper"))
    ours = mean_kl(ARCConfig(budget=0.10, recipe="balanced", **FOUND))
    best = mean_kl(ARCConfig(budget=0.10, recipe="best", granularity="block", **FOUND))
    assert 1 - ours / plain >= 0.40
    assert 1 - best / plain >= 0.55
    assert best < ours < paper < plain


def test_demo_writes_its_table_and_plot(tmp_path, monkeypatch):
    """Every row with every figure, JSON and PNG; a second run replaces the first one's files."""
    configs = {
        "NVFP4, plain": ARCConfig(budget=0.0, recipe="plain"),
        "ours": ARCConfig(budget=0.10, recipe="balanced"),
    }
    monkeypatch.setattr(demo_module, "CONFIGS", configs)
    for _ in range(2):
        console = Console(file=io.StringIO(), width=100)
        rows = demo_module.run_demo(tmp_path, max_tokens=1024, console=console)
    assert [row.name for row in rows] == ["bf16", *configs]
    plain, ours = rows[1:]
    assert plain.closed == 0 and ours.closed > 0 and ours.mean_kl < plain.mean_kl
    assert rows[0].file_bytes > 2 * ours.file_bytes
    assert json.loads((tmp_path / "demo.json").read_text())[2]["name"] == "ours"
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert all(row.name in console.file.getvalue() for row in rows)
