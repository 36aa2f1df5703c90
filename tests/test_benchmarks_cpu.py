"""The speed benchmarks of the CPU: their helpers, and each one end to end on tiny shapes."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks.common import acceptance, timing
from benchmarks.common.acceptance import Line
from benchmarks.common.checkout import ROOT
from benchmarks.cpu import gemm, guards, load_time, model, probes, providers

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="the probes need a C++ compiler"
)


def test_samples_are_taken_in_turns():
    order = []
    values = {"a": iter([1.0, 9.0, 2.0]), "b": iter([4.0, 4.0, 4.0])}
    samplers = {name: lambda n=name: order.append(n) or next(values[n]) for name in values}
    timings = timing.interleaved(samplers, 3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert timings["a"] == timing.Timing(2.0, 1.0, 4.0)  # of 1, 2, 9: 4 = (9 - 1) / 2
    assert timings["b"] == timing.Timing(4.0, 4.0, 0.0)


@pytest.mark.parametrize(
    "line, verdict",
    [
        (Line("speed", 2.0, at_least=2.0), "PASS"),
        (Line("speed", 1.9, at_least=2.0), "FAIL"),
        (Line("time", 1.1, at_most=1.0), "FAIL"),
        (Line("tiles", None, at_least=0.5, missing="needs AMX"), "needs AMX"),
    ],
)
def test_acceptance_line(line, verdict):
    assert line.verdict == verdict
    assert acceptance.all_passed([line]) == (verdict != "FAIL")


def test_cold_weights_are_taken_in_turn():
    weights = [torch.full((1, 16), float(i)) for i in range(3)]
    provider = providers.Provider(weights, 64, 16, torch.float32, lambda x, w: w[0, 0].item())
    run = provider.runner(torch.ones(1, 16), warm=False)
    assert sorted(itertools.islice(iter(run, None), 3)) == [0.0, 1.0, 2.0]
    run = provider.runner(torch.ones(1, 16), warm=True)
    assert {run() for _ in range(3)} == {0.0}


def test_a_wrong_product_is_found():
    """One stored code too large by a step is far outside the bound."""
    torch.manual_seed(0)
    weight = providers.nvfp4_weight(torch.randn(32, 256).bfloat16(), share=0.25)
    assert weight.num_act_channels == weight.num_weight_channels == 32
    x = torch.randn(3, 256).bfloat16()
    assert providers.check(weight, x)["columns"] == 32

    class Wrong(type(weight)):
        """Says to the check that it is another weight than the one it multiplies with."""

        def to_layout(self, layout):
            plain = super().to_layout(layout)
            plain.qdata[5] ^= 1
            return plain

    weight.__class__ = Wrong
    with pytest.raises(AssertionError, match="M=3"):
        providers.check(weight, x)


@needs_compiler
def test_probes_measure_something():
    assert "fp32_fma" in probes.ceilings()
    assert probes.rate("fp32_fma", threads=1, seconds=1e-3) > 1e8
    data = probes.random_bytes(2**20)
    assert probes.read_seconds(data, threads=1, ahead=probes.best_prefetch(data, 1)) > 0


@needs_compiler
def test_gemm_benchmark_runs(capsys, monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    sizes = ["--in-features", "128", "--out-features", "48", "--rows", "1", "17"]
    few = ["--rounds", "2", "--footprint-mib", "1", "--threads", "1"]
    compared = ["--providers", "bf16", "fp32", "nvfp4", "arc"]
    threads = torch.get_num_threads()
    try:
        assert gemm.main([*sizes, *few, *compared]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = {(c["provider"], c["rows"], c["weights"]): c for c in result["cells"]}
    assert len(cells) == 4 * 2 * 2
    assert cells["arc", 1, "cold"]["ceiling"] == "read"
    assert cells["arc", 1, "warm"]["of_ceiling"] is None
    assert cells["fp32", 17, "warm"]["ceiling"] == "fp32_fma"
    assert all(c["microseconds"] > 0 for c in cells.values())
    assert result["stored"]["nvfp4"][0] == 48 * (64 + 8)
    assert set(result["checked"]) == {"nvfp4", "arc"}
    assert list(result["quantize_gb_per_second"]) == ["amax", "four_over_six", "mse"]
    assert all(rate > 0 for rate in result["quantize_gb_per_second"].values())
    verdicts = {line["name"]: line["verdict"] for line in result["acceptance"]}
    assert verdicts["M=1 warm, speedup over int8"] == "not measured"
    assert verdicts["M=1 cold, of read bandwidth"] in ("PASS", "FAIL")


def test_guard_benchmark_runs(capsys):
    """Every variant is compiled once: a sample in another state of the weights would raise."""
    assert guards.main(["--linears", "2", "--budget", "0.0", "--rounds", "2"]) == 0
    seconds = json.loads(capsys.readouterr().out.splitlines()[-1])["seconds"]
    both = ["bf16, unguarded", "arc_ao, unguarded"]
    assert list(seconds) == ["bf16", "arc_ao", "made anew", *both]
    assert all(times["warm"] > 0 and times["cold"] > 0 for times in seconds.values())


def test_searched_scales_are_judged_round_by_round():
    """The median of the ratios, not the ratio of medians, which noise between rounds moves."""

    def line(searched, wide) -> Line:
        seconds = {model.SEARCHED: searched, model.WIDE: wide}
        figures = {name: {"prefill_cpu_seconds": s} for name, s in seconds.items()}
        return model.scale_acceptance(figures)[0]

    assert line([1.05, 2.1, 8.0], [1.0, 2.0, 4.0]).value == pytest.approx(1.05)
    assert line([1.05, 2.1, 8.0], [1.0, 2.0, 4.0]).verdict == "PASS"
    assert line([1.07, 2.0, 8.0], [1.0, 2.0, 4.0]).verdict == "FAIL"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc of Linux")
@pytest.mark.parametrize(
    "options, names, lines",
    [
        ([], model.VARIANTS, 7),
        (["--block-scales", "--rounds", "1"], model.SCALE_VARIANTS, 1),
    ],
)
def test_model_benchmark_runs(options, names, lines):
    """Processes that each compile one layer for a prompt and for a token."""
    sizes = ["--layers", "1", "--hidden", "64", "--intermediate", "128", "--heads", "4"]
    sizes += ["--kv-heads", "2", "--vocabulary", "64", "--prompt", "8", "--tokens", "2"]
    command = [sys.executable, "-m", "benchmarks.cpu.model", *sizes, *options]
    command += ["--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert tuple(result["variants"]) == names
    for figures in result["variants"].values():
        assert figures["prefill_tokens_per_second"] > 0
        assert figures["decode_tokens_per_second"] > 0
        assert figures["memory"] == figures["weights"] + figures["running"]
    assert len(result["acceptance"]) == lines


@pytest.mark.slow
def test_compiler_benchmark_counts_and_packs():
    """One small layer; the counts, the recompilations and the package do not depend on sizes."""
    sizes = ["--layers", "1", "--hidden", "256", "--rounds", "0", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.cpu.compiler", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout.splitlines()[-1])["acceptance"]
    verdicts = {line["name"]: line["verdict"] for line in lines}
    assert verdicts.pop('compile time, backend "arc" over plain') == "not measured"
    assert len(verdicts) == 12 and set(verdicts.values()) == {"PASS"}


@pytest.mark.parametrize("bound, code", [("1e9", 0), ("0", 1)])
def test_load_time_checks_the_ratio(bound, code, capsys):
    """Its last line has the seconds of both loads; --check turns the verdict into the exit code."""
    options = ["--linears", "7", "--rounds", "1", "--bound", bound, "--check"]
    assert load_time.main(options) == code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["seconds"]["7"].keys() == {"bf16", "arc_ao"}
    assert document["passed"] is (code == 0)
