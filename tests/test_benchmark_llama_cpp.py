"""The benchmark against llama.cpp, which is not installed here: a script with made-up figures
stands for its process."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common.checkout import ROOT
from benchmarks.cpu import llama_cpp as bench
from benchmarks.cpu import model
from benchmarks.peers import environments

SECONDS = {"bf16": 0.5, "nvfp4": 2.0}  # of a prompt; a token takes a tenth
PROCESS = f"""
import json, sys
from array import array
from pathlib import Path

action, path, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
if action == "write":
    for fmt in options[options.index("--formats") + 1 :]:
        (path / (fmt + ".gguf")).write_bytes(bytes(2**20))
else:
    step = array("f", [1.0, 2.0, 3.0])
    Path(options[options.index("--logits") + 1]).write_bytes(step.tobytes())
    facts = {{"stored": path.stat().st_size, "total": 2**21, "system_info": "CPU : NONE = 1 "}}
    facts |= {{"buffers_mib": {{"CPU_Mapped": 1.0}}, "tensors": {{"f32": 5, "nvfp4": 14}}}}
    facts |= {{"flash_attention": True, "folder": str(path.parent)}}
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        seconds = {SECONDS}[path.stem]
        print(json.dumps({{"prefill": seconds, "decode": seconds / 10}}), flush=True)
"""


def rows(prefill: float, decode: float) -> dict[str, dict[str, float]]:
    """Backend "arc" so many times as fast as llama.cpp's NVFP4."""
    theirs = {bench.PREFILL: 40.0, bench.DECODE: 10.0}
    ours = {bench.PREFILL: 40.0 * prefill, bench.DECODE: 10.0 * decode}
    return {bench.label("nvfp4"): theirs, bench.FUSED: ours}


@pytest.mark.parametrize(
    "prefill, decode, verdicts",
    [
        (10.0, 3.0, ["PASS", "PASS"]),
        (9.9, 3.1, ["FAIL", "PASS"]),
        (10.1, 2.9, ["PASS", "FAIL"]),
    ],
)
def test_bounds_are_ten_and_three_times_nvfp4(prefill, decode, verdicts):
    lines = bench.acceptance(rows(prefill, decode))
    assert [line.value for line in lines] == pytest.approx([prefill, decode])
    assert [line.verdict for line in lines] == verdicts


def test_other_formats_and_our_plain_compile_do_not_count():
    figures = rows(10.0, 3.0)
    figures[bench.label("bf16")] = figures[bench.OURS] = {bench.PREFILL: 1e9, bench.DECODE: 1e9}
    assert [line.value for line in bench.acceptance(figures)] == pytest.approx([10.0, 3.0])


@pytest.mark.parametrize("missing", [bench.FUSED, bench.label("nvfp4")])
def test_what_was_not_measured_has_no_verdict(missing):
    figures = rows(10.0, 3.0)
    del figures[missing]
    assert [line.verdict for line in bench.acceptance(figures)] == ["not measured"] * 2


def test_both_processes_get_the_same_model_and_run():
    args = bench.parse(["--layers", "3", "--kv-heads", "4", "--formats", "q4_0", "bf16"])
    assert args.formats == ["bf16", "q4_0"] and args.ours  # the reference comes first
    argv = bench.options(args, (*bench.SHAPE, *bench.RUN, "budget"))
    ours = vars(model.parse(argv))
    assert ours["layers"] == 3 and ours["kv_heads"] == 4
    assert all(ours[name] == value for name, value in vars(args).items() if name in ours)


def test_logits_of_another_model_are_refused(tmp_path):
    path = tmp_path / "logits"
    reference = np.array([1.0, 2.0, 3.0], np.float32)
    reference.tofile(path)
    assert bench.check_logits("q4_0", path, None) is None
    assert bench.check_logits("q4_0", path, reference) == pytest.approx(1.0)
    with pytest.raises(SystemExit, match="q4_0: expected logits within 0.5 .* found -1.000"):
        bench.check_logits("q4_0", path, -reference)
    np.array([1.0, np.nan], np.float32).tofile(path)
    with pytest.raises(SystemExit, match="expected finite logits"):
        bench.check_logits("q4_0", path, None)


def test_rows_of_the_processes_and_no_file_left(tmp_path, monkeypatch, capsys):
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    monkeypatch.setattr(bench, "RUNNER", script)
    monkeypatch.setattr(environments, "interpreter", lambda peer: sys.executable)
    folder = tmp_path / "folder"
    folder.mkdir()
    few = ["--no-ours", "--formats", "nvfp4", "bf16", "--prompt", "8", "--rounds", "2"]
    threads = torch.get_num_threads()
    try:
        assert bench.main([*few, "--folder", str(folder), "--check"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "nvfp4: 5 f32, 14 nvfp4 tensors; CPU_Mapped 1 MiB; with flash attention" in out
    found = json.loads(out.splitlines()[-1])
    assert list(found["rows"]) == ["llama.cpp bf16", "llama.cpp nvfp4"]
    row = found["rows"]["llama.cpp nvfp4"]
    assert row[bench.PREFILL] == pytest.approx(4.0) and row[bench.DECODE] == pytest.approx(5.0)
    assert row["stored"] == 2**20 and row["cosine"] == pytest.approx(1.0)
    assert [line["verdict"] for line in found["acceptance"]] == ["not measured"] * 2
    assert Path(row["folder"]).parent == folder and not list(folder.iterdir())


def test_a_missing_environment_is_named(tmp_path, monkeypatch):
    built = environments.interpreter
    monkeypatch.setattr(environments, "interpreter", lambda peer: built(peer, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run `.*peers.environments llama_cpp`"):
        bench.main(["--no-ours"])


def test_the_peer_is_compiled_here_from_pinned_sources():
    text = environments.requirements(bench.PEER).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "--"))]
    assert bench.PEER in environments.NAMES and all("==" in line for line in lines)
    assert "--no-binary llama-cpp-python" in text and "GGML_NATIVE=ON" in text


def test_gguf_file_holds_the_model(tmp_path, monkeypatch):
    """Names, types and values that llama.cpp reads, down to the same weights of the same seed."""
    gguf = pytest.importorskip("gguf", reason="writes a GGUF file: needs gguf")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    import gguf_file

    sizes = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}
    run = {"vocabulary": 96, "prompt": 8, "tokens": 2, "seed": 3}
    args = argparse.Namespace(**sizes, **run)
    gguf_file.write_bf16(tmp_path / "a.gguf", args)
    gguf_file.write_bf16(tmp_path / "b.gguf", args)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    found = {t.name: t for t in reader.tensors}
    assert len(found) == 2 * 9 + 3
    assert found["blk.1.attn_k.weight"].shape.tolist() == [64, 32]  # GGUF: in_features first
    assert found["blk.1.ffn_down.weight"].shape.tolist() == [128, 64]
    assert found["output_norm.weight"].data.tolist() == [1.0] * 64
    head = found["output.weight"]
    weight = gguf.quants.dequantize(head.data, head.tensor_type)
    assert head.tensor_type.name == "BF16" and weight.shape == (96, 64)
    assert weight.std() == pytest.approx(gguf_file.STANDARD_DEVIATION, rel=0.05)
