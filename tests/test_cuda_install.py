"""When an installation compiles the CUDA kernels, and what it says where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import build_cuda

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch) -> None:
    for name in ("ARC_AO_CUDA", "ARC_AO_CUDA_ARCHS", "ARC_AO_CUTLASS", "NVCC"):
        monkeypatch.delenv(name, raising=False)


def show_gpus(folder: Path, monkeypatch, *capabilities: str) -> None:
    """Put a driver's tool on PATH that lists GPUs of these capabilities."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {c}\n" for c in capabilities))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "capabilities, expected",
    [((), []), (("9.0",), []), (("12.0", "12.0"), ["120"]), (("12.1", "10.3"), ["100", "120"])],
)
def test_gpus_that_are_there_decide(tmp_path, monkeypatch, capabilities, expected):
    """An H200 has no use for the kernels, and an installation beside it does not wait for them."""
    show_gpus(tmp_path, monkeypatch, *capabilities)
    assert build_cuda.families() == expected
    monkeypatch.setenv("ARC_AO_CUDA", "0")
    assert build_cuda.families() == []


def test_demanded_kernels_are_built_without_a_gpu(tmp_path, monkeypatch):
    """All families, or the chosen ones."""
    show_gpus(tmp_path, monkeypatch)
    monkeypatch.setenv("ARC_AO_CUDA", "1")
    assert build_cuda.families() == ["100", "120"]
    monkeypatch.setenv("ARC_AO_CUDA_ARCHS", "120")
    assert build_cuda.families() == ["120"]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ARC_AO_CUDA", "yes", r"ARC_AO_CUDA: expected 0 or 1, got 'yes'"),
        ("ARC_AO_CUDA_ARCHS", "90,120", r"ARC_AO_CUDA_ARCHS: expected some of .*, got \['90'\]"),
    ],
)
def test_settings_that_mean_nothing_are_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        build_cuda.families()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    """The compiler first, then the headers; a folder that is no CUTLASS is none."""
    monkeypatch.setenv("NVCC", str(tmp_path / "none"))
    assert "nvcc" in build_cuda.missing() and build_cuda.requirements() == []
    monkeypatch.setenv("NVCC", sys.executable)
    monkeypatch.setenv("ARC_AO_CUTLASS", str(tmp_path))
    assert build_cuda.cutlass() is None and "ARC_AO_CUTLASS" in build_cuda.missing()
    header = tmp_path / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert build_cuda.cutlass() == tmp_path and build_cuda.missing() is None


def test_isolated_builds_get_the_headers_only_where_they_are_wanted(monkeypatch):
    monkeypatch.setenv("NVCC", sys.executable)
    monkeypatch.setenv("ARC_AO_CUDA", "1")
    monkeypatch.setattr(build_cuda, "cutlass", lambda: None)
    assert build_cuda.requirements() == [build_cuda.CUTLASS_REQUIREMENT]
    pinned = (ROOT / "constraints-cuda.txt").read_text()
    assert build_cuda.CUTLASS_REQUIREMENT in pinned
    monkeypatch.setenv("ARC_AO_CUDA", "0")
    assert build_cuda.requirements() == []
    monkeypatch.setenv("ARC_AO_CUDA", "1")
    monkeypatch.setattr(build_cuda, "cutlass", lambda: ROOT)
    assert build_cuda.requirements() == []


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`setup.py build_cuda` with an nvcc that is not there."""
    env = {**os.environ, "NVCC": str(folder / "none"), **environment}
    command = [sys.executable, "setup.py", "build_cuda"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_demand_that_cannot_be_met_ends_the_build(tmp_path, monkeypatch):
    """Where nobody asked and no GPU is there, nothing happens."""
    done = build(tmp_path, ARC_AO_CUDA="1")
    assert done.returncode != 0 and "nvcc (of CUDA 13) is not on PATH" in done.stderr
    show_gpus(tmp_path, monkeypatch)
    done = build(tmp_path)
    assert done.returncode == 0 and "without CUDA" not in done.stdout + done.stderr


def test_a_gpu_without_a_compiler_is_a_warning(tmp_path, monkeypatch):
    """The package is installed, and says what it went without."""
    show_gpus(tmp_path, monkeypatch, "12.0")
    done = build(tmp_path)
    assert done.returncode == 0 and "installed without CUDA kernels" in done.stdout + done.stderr
