"""GGUF files in: what is loaded, kept, said and refused."""

import importlib.util
import json

import pytest
import torch
from tiny_gguf import SPECIAL, conversation, random_ids, write_tiny_gguf
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from arc_ao.checkpoints.gguf_rope import llama3_divisors
from arc_ao.cli import main
from arc_ao.integrations import gguf as gguf_module
from arc_ao.integrations.huggingface import load_model

TEXT = "It is a truth universally acknowledged that the test wants the text. " * 40


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "gguf" / "tiny.Q8_0.gguf"
    path.parent.mkdir()
    write_tiny_gguf(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_logits_are_those_of_the_rounded_weights(gguf_file):
    """bf16 by default; in fp32 the same logits as the source with its weights rounded to Q8_0, so
    names, shapes and the order of q and k rows are right."""
    gguf = pytest.importorskip("gguf")
    assert load_model(gguf_file)[0].dtype == torch.bfloat16
    source = write_tiny_gguf(gguf_file)
    model, _ = load_model(gguf_file, torch.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    with torch.no_grad():
        for module in source.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module is not source.lm_head:
                rounded = gguf.dequantize(gguf.quants.quantize(module.weight.numpy(), kind), kind)
                module.weight.copy_(torch.from_numpy(rounded))
        logits, expected = model(random_ids()).logits, source(random_ids()).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    attention = source.model.layers[0].self_attn.q_proj
    attention.weight.data = attention.weight.roll(1, 0)  # the comparison sees rows of q
    assert not torch.allclose(source(random_ids()).logits, expected, atol=1e-3)
    assert not model.training and not hasattr(model.config, "quantization_config")


def test_quantize_eval_report(gguf_file, text_file, tmp_path, capsys):
    """The chain a user runs, from a folder with one file and from the file itself; the summary says
    that the weights were quantized before, and of which types."""
    output, figures = tmp_path / "out", tmp_path / "eval.json"
    calibration = ["--calib", str(text_file), "--calib-tokens", "256", "--recipe", "balanced"]
    assert main(["quantize", str(gguf_file.parent), "-o", str(output), *calibration]) == 0
    remark = "weights came from a GGUF file: Q8_0; errors add up"
    assert remark in capsys.readouterr().out
    assert json.loads((output / "arc_ao.json").read_text())["source"] == remark
    text = ["--text", str(text_file), "--json", str(figures)]
    assert main(["eval", str(output), "--original", str(gguf_file), *text]) == 0
    assert json.loads(figures.read_text())["text"]["mean_kl"] > 0
    assert main(["eval", str(gguf_file), "--original", str(gguf_file.parent), *text]) == 0
    assert json.loads(figures.read_text())["text"]["mean_kl"] == 0
    assert (
        main(["report", str(output), "--original", str(gguf_file), "--text", str(text_file)]) == 0
    )


def test_output_keeps_tokenizer_chat_template_and_generation_config(gguf_file, text_file, tmp_path):
    """What is saved reloads without the GGUF file, and speaks and generates as the file's."""
    output = tmp_path / "out"
    options = ["--calib", str(text_file), "--recipe", "plain"]
    assert main(["quantize", str(gguf_file), "-o", str(output), *options]) == 0
    _, original = load_model(gguf_file)
    gguf_file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(
        conversation(), tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|start|>user\nWhat is the time?<|end|>\n<|start|>assistant\n"
    assert tokenizer(prompt).input_ids == original(prompt).input_ids
    assert [tokenizer.bos_token, tokenizer.eos_token] == SPECIAL
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    folders = json.dumps([file.read_text() for file in output.glob("*.json")])
    assert str(tmp_path) not in folders and "/tmp" not in folders


def test_files_beside_it_do_not_matter(gguf_file):
    """A named file is read alone: neither a tokenizer nor a config in its folder replaces its own,
    and a folder with config.json is a Hugging Face directory."""
    (gguf_file.parent / "tokenizer.json").write_text("not a tokenizer")
    (gguf_file.parent / "config.json").write_text("{}")
    assert load_model(gguf_file)[1]("the").input_ids == [257]
    assert gguf_module.find_gguf(gguf_file.parent) is None


def test_unquantized_file_is_an_ordinary_source(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", linear_type="F16")
    model, _ = load_model(tmp_path)
    assert model._arc_source == ""


@pytest.mark.parametrize("factor", [8.0, 1.0])
def test_llama3_rope_scaling_is_restored(tmp_path, factor):
    """transformers' loader passes over llama.cpp's tensor of divisors."""
    divisors = llama3_divisors(8, 10_000.0, factor).float()
    write_tiny_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": divisors})
    model, _ = load_model(tmp_path)
    plain = 10_000.0 ** (-torch.arange(8) / 8)
    assert torch.allclose(model.model.rotary_emb.inv_freq, plain / divisors, rtol=1e-5)
    assert model.config.rope_parameters["rope_type"] == ("llama3" if factor > 1 else "default")


def test_yarn_keys_are_restored(tmp_path):
    extra = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    extra["llama.rope.scaling.original_context_length"] = 16
    write_tiny_gguf(tmp_path / "tiny.gguf", extra=extra)
    rope = load_model(tmp_path)[0].config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 16


UNKNOWN_ROPE = {"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"architecture": "mysteryllm"}, "architecture 'mysteryllm'.*Hugging Face directory"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "found none for model.layers.1.mlp.up_proj"),
        ({"extra": {"split.count": 3}}, "one of 3 parts; join them"),
        ({"extra": UNKNOWN_ROPE}, "rotary scaling of type none, linear or yarn, found.*spiral"),
        ({"tensors": {"rope_freqs.weight": torch.linspace(1, 3, 8)}}, "as Llama 3's rule"),
    ],
)
def test_files_that_cannot_be_converted_are_refused(tmp_path, file, message):
    """Naming the file, what it is, and what to take instead."""
    write_tiny_gguf(tmp_path / "tiny.gguf", **file)
    with pytest.raises(ValueError, match=f"tiny.gguf: .*{message}"):
        load_model(tmp_path / "tiny.gguf")


def test_wrong_files_print_one_line(gguf_file, tmp_path, capsys):
    """No GGUF, half a GGUF, several in a folder: the command says which."""
    other = tmp_path / "notes.gguf"
    other.write_text("not a model")
    assert main(["eval", str(other)]) == 2
    assert "expected a GGUF file" in capsys.readouterr().err
    half = tmp_path / "half.gguf"
    half.write_bytes(gguf_file.read_bytes()[:60_000])
    assert main(["eval", str(half)]) == 2
    assert "ends early or is damaged" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "found 2; name one of half.gguf, notes.gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(gguf_file, monkeypatch, capsys):
    find = importlib.util.find_spec
    hide = lambda name, *rest: None if name in ("gguf", "accelerate") else find(name, *rest)
    monkeypatch.setattr(gguf_module.importlib.util, "find_spec", hide)
    assert main(["eval", str(gguf_file)]) == 2
    assert "needs gguf and accelerate; run: pip install 'arc-ao[gguf]'" in capsys.readouterr().err


def test_older_transformers_dequantizes_by_default(monkeypatch):
    """Releases before GgufConfig take no such option."""
    monkeypatch.setattr(gguf_module, "transformers", object())
    assert gguf_module._dequantize() == {}
