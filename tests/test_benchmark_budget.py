"""The benchmark of mixes: a row of every kind on a small encoder, within its bounds."""

import json

import pytest
from tiny_models import save_tiny_bert

from benchmarks.accuracy import budget_search


def test_an_encoder_needs_a_text_and_the_shipped_model_has_one(capsys):
    for arguments in (["--model", "minilm"], ["--text", "text.txt"]):
        with pytest.raises(SystemExit):
            budget_search.main(arguments)
        assert "--text goes with an encoder" in capsys.readouterr().err


def test_rows_of_an_encoder(tmp_path, capsys, monkeypatch):
    """Closed shares are those of the divergences; a mix keeps to its bounds."""
    save_tiny_bert(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} " + "some words " * 20 for i in range(110)), encoding="utf-8")
    monkeypatch.setattr(budget_search, "LINES", (2, 3))
    arguments = ["--model", str(tmp_path / "model"), "--text", str(text), "--extra-bits", "1"]
    budget_search.main([*arguments, "--rows", "nearest"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    plain, mix = rows["plain NVFP4"], rows["mix, 1 bits, nearest"]
    assert len(rows) == 2 and mix["closed"] == 1 - mix["divergence"] / plain["divergence"] > 0
    assert mix["extra_bits"] <= 1 and mix["extra_multiply_adds"] <= 0.10
    assert len(mix["choices"]) == 6 and mix["trials"]
