"""The accuracy and memory benchmarks: their readers and measures, and each one end to end."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_bert

from benchmarks.accuracy import embeddings, encoder
from benchmarks.accuracy.methods import PLAIN, quantized_rows
from benchmarks.common import memory
from benchmarks.layers import imatrix, sqnr
from benchmarks.memory import gptq, peak


def write_imatrix(path: Path, entries: dict[str, tuple[int, list[float]]]) -> Path:
    """entries: name -> (ncall, summed values)."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        encoded = name.encode()
        data += struct.pack("<i", len(encoded)) + encoded
        data += struct.pack("<ii", calls, len(values)) + np.array(values, "<f4").tobytes()
    path.write_bytes(data + struct.pack("<i", 0) + b"calibration.txt")
    return path


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_imatrix_values_are_sums_over_calls(tmp_path):
    """rms = sqrt(value / ncall), with each entry's own ncall; a dead channel is 0."""
    entries = {"blk.0.attn_q.weight": (4, [16.0, 0.0, 1.0]), "blk.1.ffn_up.weight": (1, [9.0])}
    rms = imatrix.read_imatrix(write_imatrix(tmp_path / "m.dat", entries))
    assert {name: values.tolist() for name, values in rms.items()} == {
        "blk.0.attn_q.weight": [2.0, 0.0, 0.5],
        "blk.1.ffn_up.weight": [3.0],
    }


@pytest.mark.parametrize("keep", [0, 20, 40])  # no header, inside a name, inside the values
def test_imatrix_cut_short_is_refused(tmp_path, keep):
    path = write_imatrix(tmp_path / "m.dat", {"blk.0.attn_q.weight": (1, [1.0] * 8)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.dat: expected a legacy importance matrix"):
        imatrix.read_imatrix(path)


def test_sqnr_of_a_known_error():
    """Signal energy 3^2 + 4^2 = 25 against error energy 0.5^2 = 0.25: a ratio of 100, 20 dB."""
    reference = torch.tensor([[3.0, 4.0]])
    assert sqnr.sqnr_db(reference, torch.tensor([[3.0, 4.5]])) == pytest.approx(20.0)
    assert sqnr.sqnr_db(reference, reference) == float("inf")


def test_constructed_activations_have_the_profile():
    rms = torch.tensor([0.0, 0.5, 8.0])
    x = sqnr.activations(rms, 200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.square().mean(0).sqrt(), rms, rtol=0.03, atol=0.0)
    kurtosis = (x[:, 2] / 8).pow(4).mean()
    assert kurtosis > 5  # 3 for a Gaussian, 9 in the limit


def test_balanced_weights_of_a_dead_channel_are_finite():
    rms = torch.tensor([0.0, 1.0, 4.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert sqnr.random_weight(rms, 8, "balanced", generator).isfinite().all()


def test_profiles_take_layers_in_order():
    """Files list layers in any order, and 10 comes after 9."""
    rms = {f"blk.{i}.ffn_up.weight": torch.tensor([float(i)]) for i in (10, 2, 0, 9)}
    rms["blk.1.ffn_down.weight"] = torch.tensor([-1.0])
    assert [p.item() for p in sqnr.profiles(rms, "MLP input", 1)] == [0, 2, 9, 10]
    assert [p.item() for p in sqnr.profiles(rms, "MLP input", 3)] == [0, 10]
    with pytest.raises(ValueError, match="attn_q"):
        sqnr.profiles(rms, "attention input", 1)


def test_mean_pool_leaves_padding_out():
    hidden = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [7.0], [9.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert embeddings.mean_pool(hidden, mask).tolist() == [[2.0], [7.0]]


def test_select_lines_counts_long_lines_only():
    """201 characters are long, 200 are not; calibration and evaluation keep their distance."""
    long = [f"{i:03d}" + "x" * 198 for i in range(110)]
    text = "\n".join(line for i in long for line in ("", " short ", "y" * 200, f" {i} "))
    calibration, evaluation = embeddings.select_lines(text, 3, 5)
    assert [line[:3] for line in calibration] == ["000", "001", "002"]
    assert [line[:3] for line in evaluation] == ["100", "101", "102", "103", "104"]
    with pytest.raises(ValueError, match="at least 111 lines"):
        embeddings.select_lines(text, 3, 11)


def test_an_encoder_without_text_says_what_to_pass(capsys):
    with pytest.raises(SystemExit):
        encoder.main([])
    assert "wiki.test.tokens" in capsys.readouterr().err


def test_encoder_runs(tmp_path, capsys):
    save_tiny_bert(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{i} " + "some words " * 20 for i in range(110)), encoding="utf-8")
    lines = ["--calibration-lines", "2", "--evaluation-lines", "3"]
    encoder.main(["--model", str(tmp_path / "model"), "--text", str(text), *lines])
    result = last_json(capsys)
    assert list(result["rows"]) == list(quantized_rows())
    assert all(0 < row["one_minus_cosine"] < 0.5 for row in result["rows"].values())
    assert result["rows"][PLAIN]["of_plain"] == 1
    assert "pooler.dense" not in json.dumps(result["rows"][PLAIN]["config"])
    assert result["rows"]["arc_ao 10 %"]["trials"]


def test_layer_sqnr_runs(tmp_path, capsys):
    profile = [0.0] + [1.0] * 30 + [900.0]  # a dead channel and an outlier
    entries = {f"blk.{i}.attn_q.weight": (1, profile * 8) for i in range(3)}
    path = write_imatrix(tmp_path / "m.dat", entries)
    sizes = ["--tokens", "16", "--out-features", "16", "--every", "2"]
    sqnr.main(["--imatrix", str(path), "--kinds", "attention input", *sizes])
    result = last_json(capsys)
    assert result["data"] == "constructed"
    rows = result["results"]["m.dat"]["attention input"]
    assert len(rows["arc_ao 10 %"]["sqnr_db_by_layer"]) == 2
    assert rows["arc_ao 10 %"]["sqnr_db"] > rows[PLAIN]["sqnr_db"] > 5


@pytest.mark.skipif(not memory.STATUS.exists(), reason="reads /proc of Linux")
def test_peak_of_sees_memory_that_is_freed_again():
    def allocate() -> None:
        torch.ones(32 * 2**20, dtype=torch.uint8)

    for measure in (memory.peak_of, memory.sampled_peak):
        before = memory.settle()
        assert 24 * 2**20 < measure(allocate) - before < 64 * 2**20


@pytest.mark.skipif(not memory.STATUS.exists(), reason="reads /proc of Linux")
def test_peak_memory_runs(capsys):
    sizes = ["--layers", "1", "--hidden", "64", "--intermediate", "128", "--tokens", "16"]
    code = peak.main([*sizes, "--threads", "1"])
    result = last_json(capsys)
    assert code == (0 if result["passed"] else 1)
    assert result["layer_bytes"] == 2 * (64 * 64 * 2 + 2 * 16 * 64 + 3 * 64 * 128 + 2 * 64)
    assert 0.99 * result["rest_bytes"] <= result["peak_bytes"]  # a page may be given back


@pytest.mark.skipif(not memory.STATUS.exists(), reason="reads /proc of Linux")
def test_gptq_memory_runs(capsys):
    sizes = ["--layers", "2", "--hidden", "64", "--intermediate", "128", "--tokens", "16"]
    code = gptq.main([*sizes, "--threads", "1", "--batches", "2"])
    result = last_json(capsys)
    assert code == (0 if result["passed"] else 1)
    assert result["hessian_bytes"] == 4 * (3 * 64 * 64 + 128 * 128)
    assert result["hidden_bytes"] == 2 * 64 * 16 * 2
    assert result["rest_bytes"] <= result["peak_bytes"]
