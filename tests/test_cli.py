"""The command line, in process, on tiny models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, tiny_llama

from arc_ao.cli import main
from arc_ao.env import env_report
from arc_ao.methods import hessian
from arc_ao.ops import OPERATORS

TEXT = "It is a truth universally acknowledged that a test wants text. " * 40


@pytest.fixture
def model_dir(tmp_path) -> Path:
    directory = tmp_path / "model"
    tiny_llama().to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def _quantize(model_dir: Path, text_file: Path, output: Path, *options: str) -> int:
    calibration = ["--calib", str(text_file), "--calib-tokens", "256"]
    return main(["quantize", str(model_dir), "-o", str(output), *calibration, *options])


def test_quantize_eval_report(model_dir, text_file, tmp_path, capsys):
    """The chain a user runs: quantize, evaluate against the original, report per layer."""
    output = tmp_path / "quantized"
    assert _quantize(model_dir, text_file, output, "--recipe", "balanced", "--budget", "0.2") == 0
    assert "14 linears quantized" in capsys.readouterr().out
    figures = tmp_path / "eval.json"
    original = ["--original", str(model_dir)]
    command = ["eval", str(output), *original, "--text", str(text_file), "--json", str(figures)]
    assert main(command) == 0
    text = json.loads(figures.read_text())["text"]
    assert text["mean_kl"] > 0 and text["perplexity"] > 1
    rows, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    files = ["--text", str(text_file), "--json", str(rows), "--plot", str(plot)]
    assert main(["report", str(output), *original, *files]) == 0
    assert len(json.loads(rows.read_text())) == 14 and plot.stat().st_size > 1000


def test_quantize_chooses_by_layer(model_dir, text_file, tmp_path, capsys):
    """--extra-bits prints what every linear got, and keeps to both bounds."""
    output, options = tmp_path / "mixed", ("--extra-bits", "1", "--budget", "0.1")
    assert _quantize(model_dir, text_file, output, *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("bits per weight, error") == 14
    summary = json.loads((output / "arc_ao.json").read_text())
    assert summary["extra_bits"] <= 1 and summary["extra_multiply_adds"] <= 0.1
    assert _quantize(model_dir, text_file, tmp_path / "no", *options, "--recipe", "paper") == 2
    assert "recipe='balanced' or 'best'" in capsys.readouterr().err


def test_quantize_calibrates_on_the_mixed_text_by_the_models_width(model_dir, tmp_path, capsys):
    """Without --calib and --calib-tokens: the shipped text, as much of it as the rounding wants."""
    command = ["quantize", str(model_dir), "--recipe", "plain", "--budget", "0", "-o"]
    assert main([*command, str(tmp_path / "nearest")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "calibrating on 16,384 tokens of calibration_mixed.txt: enough where no GPTQ asks for more"
    )
    assert main([*command, str(tmp_path / "gptq"), "--rounding", "gptq"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "calibrating on 16,384 tokens of calibration_mixed.txt: 10 per input channel of the "
        "widest linear, 128; at least 16,384"
    )


def test_quantize_says_how_much_a_short_text_gives(model_dir, text_file, tmp_path, capsys):
    output, unmeasured = tmp_path / "quantized", ["--recipe", "plain", "--budget", "0"]
    command = ["quantize", str(model_dir), "-o", str(output), *unmeasured]
    assert main([*command, "--calib", str(text_file)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "tokens of text.txt" in line and line.endswith("as far as the text goes")


def test_quantize_resumes(model_dir, text_file, tmp_path, monkeypatch):
    """An interrupted `--rounding gptq --resume` goes on and saves what a whole run saves."""
    options = ["--recipe", "balanced", "--rounding", "gptq"]
    assert _quantize(model_dir, text_file, tmp_path / "whole", *options) == 0
    resume = [*options, "--resume", str(tmp_path / "work")]
    rounds = []

    def interrupt(*args, f=hessian.prepare_rounding):
        rounds.append(1)
        if len(rounds) == 5:
            raise KeyboardInterrupt
        return f(*args)

    monkeypatch.setattr(hessian, "prepare_rounding", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _quantize(model_dir, text_file, tmp_path / "resumed", *resume)
    assert not (tmp_path / "resumed").exists()
    assert _quantize(model_dir, text_file, tmp_path / "resumed", *resume) == 0
    assert len(rounds) == 5 + 4  # the second block alone
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert _quantize(model_dir, text_file, tmp_path / "other", "--resume", resume[-1]) == 2


def test_quantize_tunes(model_dir, text_file, tmp_path, capsys):
    """--recipe tuned trains for as long as it is told, says what that gave, and saves it."""
    output, options = tmp_path / "tuned", ("--recipe", "tuned", "--tuning-minutes", "0.02")
    assert _quantize(model_dir, text_file, output, *options) == 0
    assert "on 128 tokens kept aside" in capsys.readouterr().out
    tuning = json.loads((output / "arc_ao.json").read_text())["tuning"]
    assert tuning["steps"] > 0 and tuning["after"] <= tuning["before"]


def test_eval_tasks(model_dir, tmp_path, capsys):
    """Local JSONL tasks, quantized and floating point side by side."""
    task = tmp_path / "colours.jsonl"
    row = {"query": "The sky is", "choices": ["blue", "a tax form"], "gold": 0}
    task.write_text("\n".join([json.dumps(row)] * 3))
    command = ["eval", str(model_dir), "--original", str(model_dir), "--tasks", str(task)]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["lm_eval"]
    assert results["tasks"] == results["reference"] and "colours" in results["tasks"]


def test_env_names_every_operator(capsys):
    assert main(["env"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in OPERATORS)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(env_report()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "-1"], "budget is extra channels over in_features"),
        (["--recipe", "paper", "--budget", "3"], "expected 0 to 2"),
    ],
)
def test_mistakes_print_one_line_and_leave_nothing(
    model_dir, text_file, tmp_path, capsys, options, message
):
    """A user mistake is one line on stderr, exit status 2, and no output folder."""
    output = tmp_path / "quantized"
    assert _quantize(model_dir, text_file, output, *options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quantize", "MODEL", "-o", "out", "--calib", "missing.txt"], "missing.txt is not a file"),
        (["eval", "MODEL", "--text", "missing.txt"], "missing.txt is not a file"),
        (["eval", "MODEL", "--json", "nowhere/x.json"], "no folder nowhere to write to"),
        (
            ["report", "MODEL", "--original", "MODEL", "--plot", "nowhere/x.png"],
            "no folder nowhere",
        ),
    ],
)
def test_paths_are_checked_before_any_work(command, message):
    """No model is loaded: MODEL does not exist either."""
    with pytest.raises(SystemExit, match=message):
        main(command)


def test_report_needs_the_unquantized_original(model_dir, text_file, tmp_path, capsys):
    output = tmp_path / "quantized"
    assert _quantize(model_dir, text_file, output, "--recipe", "plain") == 0
    assert main(["report", str(output), "--original", str(output), "--tokens", "64"]) == 2
    assert "expected the unquantized original" in capsys.readouterr().err


def test_existing_output_is_refused_before_any_work(model_dir, text_file, tmp_path, capsys):
    assert _quantize(model_dir, text_file, model_dir) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_missing_model_is_named(tmp_path, capsys):
    assert main(["eval", str(tmp_path / "nowhere")]) == 2
    assert "expected a Hugging Face model directory" in capsys.readouterr().err


def test_already_quantized_model_is_refused(model_dir, text_file, tmp_path, capsys):
    output = tmp_path / "quantized"
    assert _quantize(model_dir, text_file, output, "--recipe", "plain", "--budget", "0") == 0
    assert _quantize(output, text_file, tmp_path / "again", "--recipe", "plain") == 2
    assert "already quantized" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
