"""How the native library is built, found and refused."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import build_native
from arc_ao.ops import backends, native, registry

ROOT = Path(__file__).resolve().parents[1]
CXX = build_native.compiler()
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_library = pytest.mark.skipif(native.load() is None, reason="no native library")


def run(*command, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(map(str, command), cwd=ROOT, env=env, capture_output=True, text=True)


def wheel(folder: Path, **environment) -> tuple[Path, str]:
    """Build a wheel into `folder`; its path and what the build said."""
    command = [sys.executable, "setup.py", "build", "-b", folder / "build"]
    command += ["egg_info", "--egg-base", folder, "bdist_wheel", "--dist-dir", folder]
    done = run(*command, **environment)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), done.stdout + done.stderr


@needs_compiler
def test_declarations_agree_with_torchs_own(tmp_path):
    """Both in one file: a C function declared with two types is an error."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "both.cpp"
    source.write_text(
        "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n"
        "#include <torch/csrc/stable/c/shim.h>\n"
        '#include "torch_shim.h"\n'
    )
    command = [*CXX, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{ROOT / 'csrc'}", source]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text(source.read_text() + 'extern "C" int aoti_torch_get_dim(int);\n')
    assert run(*command[:-1], wrong).returncode != 0


@needs_compiler
@pytest.mark.slow
def test_wheel_holds_the_library_for_every_python(tmp_path):
    path, _ = wheel(tmp_path)
    assert "-py3-none-linux_" in path.name
    assert "arc_ao/libarc_ao.so" in zipfile.ZipFile(path).namelist()


def test_wheel_without_a_compiler_is_pure_and_says_so(tmp_path):
    path, said = wheel(tmp_path, ARC_AO_NATIVE="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert "installed without native CPU kernels" in said
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())


@needs_compiler
def test_an_error_of_the_compiler_ends_the_build(tmp_path):
    done = run(sys.executable, "build_native.py", tmp_path / "x.so", CXXFLAGS="--no-such-flag")
    assert done.returncode != 0 and "no-such-flag" in done.stderr
    assert not (tmp_path / "x.so").exists()


@needs_library
def test_the_library_needs_no_python_of_ours(tmp_path):
    """A process that imports torch alone loads it and runs an operator, bit for bit as here."""
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0, dtype=torch.int32)
    torch.save((x, torch.ops.arc.quant_augment(x, none, none, None, "token")), tmp_path / "io.pt")
    program = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(native.LIBRARY.resolve())!r})\n"
        f"x, expected = torch.load({str(tmp_path / 'io.pt')!r})\n"
        "none = torch.zeros(0, dtype=torch.int32)\n"
        "found = torch.ops.arc.quant_augment(x, none, none, None, 'token')\n"
        "assert all(map(torch.equal, found, expected)) and 'arc_ao' not in sys.modules\n"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


@needs_library
def test_a_library_of_another_version_is_refused(monkeypatch):
    schema = "quant_augment(Tensor x) -> Tensor"
    with pytest.raises(RuntimeError, match="was built from another version: .*install arc_ao"):
        registry.define(schema, lambda x: x, lambda x: x)


def test_switching_off_and_wrong_levels(monkeypatch):
    program = "from arc_ao.ops import native; print(native.cpu_level())"
    assert run(sys.executable, "-c", program, ARC_AO_CPU_LEVEL="eager").stdout.split() == ["eager"]
    done = run(sys.executable, "-c", program, ARC_AO_CPU_LEVEL="sse9")
    assert done.returncode != 0 and "ARC_AO_CPU_LEVEL: expected one of ('eager'" in done.stderr


@needs_library
def test_the_environment_caps_the_level():
    program = "from arc_ao.ops import native; print(native.cpu_level())"
    done = run(sys.executable, "-c", program, ARC_AO_CPU_LEVEL="portable")
    assert done.stdout.split() == ["portable"], done.stderr


def test_the_report_says_why_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.delenv(native.LEVEL_VARIABLE, raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    native.load.cache_clear()
    try:
        report = backends.backend_report()
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
        native.load()
    for operator in backends.OPERATORS:
        assert report[operator]["backend"] == "eager"
        if operator != backends.WEIGHT_ONLY:  # which has no native kernel anyway
            assert "without a C++ compiler" in report[operator]["reason"]
