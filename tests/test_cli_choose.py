"""`arc-ao quantize --include --exclude`, and vision-language models calibrated on text."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB_SIZE, byte_tokenizer, tiny_llama
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from arc_ao import ARCConfig
from arc_ao.cli import main
from arc_ao.flow.targets import choose_by_name, collect_targets

ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def model_dir(tmp_path) -> Path:
    directory = tmp_path / "model"
    tiny_llama().to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def quantize(model: Path, output: Path, *options: str) -> int:
    calibration = ["--calib-tokens", "256", "--recipe", "balanced"]
    return main(["quantize", str(model), "-o", str(output), *calibration, *options])


@pytest.mark.parametrize(
    "options, chosen",
    [
        (["--exclude", "*.mlp.*"], ALL - {"gate_proj", "up_proj", "down_proj"}),
        (["--include", "*.mlp.*"], {"gate_proj", "up_proj", "down_proj"}),
        (["--include", "*_proj", "--exclude", "*.[kq]_proj"], ALL - {"k_proj", "q_proj"}),
        (["--exclude", "*.mlp.*", "--exclude", "*.o_proj"], {"q_proj", "k_proj", "v_proj"}),
        (["--include", "*"], ALL),
        (["--include", "*.o_proj", "--include", "lm_head"], {"o_proj", "lm_head"}),
    ],
)
def test_patterns_choose_linears(options, chosen, model_dir, tmp_path):
    """Exclusion wins; the output head only if it is named in full."""
    assert quantize(model_dir, tmp_path / "out", *options) == 0
    summary = json.loads((tmp_path / "out" / "arc_ao.json").read_text())
    assert {name.rsplit(".", 1)[-1] for name in summary["layers"]} == chosen


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option, model_dir, tmp_path, capsys):
    assert quantize(model_dir, tmp_path / "out", option, "*.mlp") == 2
    message = capsys.readouterr().err
    assert "'*.mlp' matches no linear" in message and "model.layers.0.self_attn.q_pr" in message
    assert not (tmp_path / "out").exists()


def test_patterns_choose_the_same_objects_as_before():
    """No pattern: the config itself; with patterns one config object, so one budget."""
    model, config = tiny_llama(), ARCConfig()
    assert choose_by_name(model, config, [], []) is config
    targets = collect_targets(model, choose_by_name(model, config, [], ["*.mlp.*"]))
    assert len(targets.by_config()) == 1 and len(targets.modules) == 8


def vision_language_model() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_llama(vocab_size=VOCAB_SIZE + 1).config,
        image_token_index=VOCAB_SIZE,
        image_seq_length=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval().bfloat16()


@pytest.mark.parametrize("architectures", [["LlavaForConditionalGeneration"], None])
def test_a_vision_language_model_is_calibrated_on_text(architectures, tmp_path, capsys):
    """Its vision tower and projector stay, the processor goes along, and it reads images."""
    source, output = tmp_path / "model", tmp_path / "out"
    original = vision_language_model()
    original.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(source)
    config = json.loads((source / "config.json").read_text()) | {"architectures": architectures}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="14 linears stay unquantized: model.vision_tower.*no cal"):
        assert quantize(source, output) == 0
    assert "14 linears quantized" in capsys.readouterr().out
    processor = CLIPImageProcessorPil.from_pretrained(output)
    model = AutoModelForImageTextToText.from_pretrained(output, dtype="auto").eval()
    pixels = processor(torch.full((3, 20, 20), 99, dtype=torch.uint8), return_tensors="pt")
    ids = torch.tensor([[1, *[VOCAB_SIZE] * 4, 2, 3]])
    inputs = {"input_ids": ids, "pixel_values": pixels["pixel_values"].bfloat16()}
    with torch.no_grad():
        found, expected = model(**inputs).logits, original(**inputs).logits
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()
