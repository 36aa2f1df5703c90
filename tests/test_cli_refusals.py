"""The command line's refusals: one sentence for a mistake of the user, a traceback for our own."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_config, tiny_llama
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from arc_ao import cli, output_folder
from arc_ao import quantize as quantize_module
from arc_ao.cli import main

TEXT = "It is a truth universally acknowledged that a test wants text. " * 9
PLAIN = ("--recipe", "plain", "--calib-tokens", "128")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "projection_dim": 32}
MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory) -> Path:
    return save(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(llama_dir, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(llama_dir, tmp_path / "model")


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def quantize(model: Path, text: Path, output: Path, *options: str) -> int:
    return main(["quantize", str(model), "-o", str(output), "--calib", str(text), *PLAIN, *options])


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def leave_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def lose_a_part(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_the_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def lose_the_vocabulary(folder: Path) -> None:
    """transformers makes a tokenizer of five special tokens."""
    lose_the_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def damage_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def damage_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def write_an_unknown_type(folder: Path) -> None:
    change_config(folder, model_type="unheard-of")


def write_other_sizes(folder: Path) -> None:
    change_config(folder, intermediate_size=96)


def write_more_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)


def bring_code(folder: Path) -> None:
    (folder / "modeling.py").write_text(MODELING)
    classes = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnModel"}
    change_config(folder, model_type="own", architectures=["OwnModel"], auto_map=classes)


def bring_code_for_a_known_type(folder: Path) -> None:
    bring_code(folder)
    change_config(folder, model_type="llama")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "model.safetensors: expected a whole safetensors file"),
        (leave_a_pointer, "model.safetensors: expected weights, found a pointer of Git LFS"),
        (lose_a_part, "model-00002.safetensors: expected a part of the model"),
        (lose_the_tokenizer, "expected the model's tokenizer in its folder, found none"),
        (lose_the_vocabulary, "a BertTokenizer of 5 tokens, none of them text"),
        (damage_the_tokenizer, "expected the model's tokenizer in its folder, found none"),
        (damage_the_config, "config.json: expected JSON, this file is damaged"),
        (write_an_unknown_type, "found model_type 'unheard-of'"),
        (write_other_sizes, "found other shapes for 3: model.layers.0.mlp.down_proj.weight"),
        (write_more_layers, "found none for 9: model.layers.1.input_layernorm.weight"),
        (bring_code, "read that code, then give trust_remote_code=True (--trust-remote-code)"),
        (bring_code_for_a_known_type, "found one with code of its own"),
    ],
)
def test_a_damaged_model_is_one_sentence(damage, expected, model, text, tmp_path, capsys):
    """It names the file or folder, and nothing is written."""
    damage(model)
    assert quantize(model, text, tmp_path / "output") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"arc-ao quantize: {model}") and expected in error
    assert not (tmp_path / "output").exists()


def test_models_with_code_of_their_own_run_where_it_is_trusted(model, text, tmp_path, capsys):
    """Quantized, saved with their code, and loaded again."""
    bring_code(model)
    output, trust = tmp_path / "output", "--trust-remote-code"
    assert quantize(model, text, output, trust) == 0
    assert (output / "modeling.py").is_file()
    assert main(["eval", str(output), "--text", str(text)]) == 2
    capsys.readouterr()
    assert main(["eval", str(output), "--text", str(text), trust]) == 0
    assert "perplexity" in capsys.readouterr().out


def t5() -> torch.nn.Module:
    sizes = {"vocab_size": 257, "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, d_kv=16))


def bert() -> torch.nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=257, **SMALL))


def clip() -> torch.nn.Module:
    vision = SMALL | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=SMALL | {"vocab_size": 257}, vision_config=vision)
    return CLIPModel(config)


def classifier() -> torch.nn.Module:
    return LlamaForSequenceClassification(tiny_config(num_hidden_layers=1, pad_token_id=0))


@pytest.mark.parametrize(
    ("make", "command", "expected"),
    [
        (t5, "quantize", "expected a model that runs on a plain text, found an encoder-decoder"),
        (t5, "eval", "expected a causal language model, found an encoder-decoder"),
        (bert, "eval", "expected a causal language model, found an encoder, which sees"),
        (clip, "quantize", "expected a model that runs on token ids alone, its forward raised"),
        (clip, "eval", "expected a model that runs on token ids alone, its forward raised"),
        (classifier, "eval", "expected logits of every token of a vocabulary, found shape"),
    ],
)
def test_models_that_a_command_cannot_use_are_one_sentence(
    make, command, expected, text, tmp_path, capsys
):
    """No perplexity is printed of a model that has none."""
    folder = save(make(), tmp_path / "model")
    if command == "quantize":
        assert quantize(folder, text, tmp_path / "output") == 2
    else:
        assert main(["eval", str(folder), "--text", str(text)]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err.strip().splitlines()[-1] and "perplexity " not in printed.out


def test_another_models_tokenizer_is_one_sentence(text, tmp_path, capsys):
    folder = save(tiny_llama(vocab_size=100, num_hidden_layers=1), tmp_path / "model")
    assert quantize(folder, text, tmp_path / "output") == 2
    assert "token ids below the model's vocabulary of 100, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("quantize", "MODEL", "-o", "OUT", "--calib-tokens", "-5"),
        ("quantize", "MODEL", "-o", "OUT", "--calib-tokens", "many"),
        ("eval", "MODEL", "--max-tokens", "0"),
        ("eval", "MODEL", "--window", "-1"),
        ("eval", "MODEL", "--limit", "-1"),
        ("eval", "MODEL", "--num-fewshot", "-1"),
        ("report", "MODEL", "--original", "MODEL", "--tokens", "-1"),
        ("explain", "MODEL", "--tokens", "0"),
        ("demo", "--max-tokens", "-1"),
        ("demo-llm", "--tokens", "1"),
    ],
)
def test_counts_of_no_use_are_refused_with_the_options_name(options, capsys):
    """Before any model is looked for."""
    with pytest.raises(SystemExit) as stopped:
        main(list(options))
    assert stopped.value.code == 2
    assert f"argument {options[-2]}: expected a whole number of at least" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError])
def test_our_own_faults_show_where_they_are(error, model, text, tmp_path, monkeypatch):
    """Only what arc_ao says on purpose, and what the system refuses, is a mistake of the user."""

    def fail(*_, **__):
        raise error("of no use to a user")

    monkeypatch.setattr(quantize_module, "quantize_", fail)
    with pytest.raises(error, match="of no use"):
        quantize(model, text, tmp_path / "output")


def test_an_accident_in_our_own_code_is_no_refusal(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_least_bytes", lambda *_: "many")
    with pytest.raises(TypeError, match="not supported between"):
        quantize(model, text, tmp_path / "output")


def test_what_another_process_wrote_meanwhile_does_not_cost_the_work(
    model, text, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "output"

    def slower(*args, f=quantize_module.quantize_, **kwargs):
        output.mkdir()
        (output / "config.json").write_text("theirs")
        return f(*args, **kwargs)

    monkeypatch.setattr(quantize_module, "quantize_", slower)
    assert quantize(model, text, output) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    kept = Path(error.rpartition(" is in ")[2])
    assert (kept / "model.safetensors").stat().st_size > 10_000
    assert (output / "config.json").read_text() == "theirs"


def test_outputs_are_checked_before_any_work(text, tmp_path, monkeypatch, capsys):
    """No model is loaded: it does not exist either."""
    work = tmp_path / "work"
    (tmp_path / "file").write_text("mine")
    assert quantize(tmp_path / "model", text, tmp_path / "file" / "output") == 2
    assert "file is no folder" in capsys.readouterr().err
    assert quantize(tmp_path / "model", text, work / "output", "--resume", str(work)) == 2
    assert "--resume: expected a folder apart from the output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--graph: cannot write .*: Is a directory"):
        main(["explain", "MODEL", "--graph", str(tmp_path)])


def test_too_little_space_is_refused_before_any_work(model, text, tmp_path, monkeypatch, capsys):
    """At least 4.5 bits for a weight of a linear, 32 for the others: 36,864 and 2 * 257 * 64."""
    usage = lambda _: SimpleNamespace(free=1000)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", usage)
    monkeypatch.setattr(quantize_module, "quantize_", lambda *_, **__: pytest.fail("worked"))
    assert quantize(model, text, tmp_path / "output") == 2
    expected = (36_864 * 4.5 / 8 + (2 * 257 * 64 + 3 * 64 + 16) * 4) / 1e6
    message = f"at least {expected:,.1f} MB of free space for the quantized model, found 0.0 MB"
    assert message in capsys.readouterr().err
