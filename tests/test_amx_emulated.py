"""The level "amx" on any machine with AVX-512: built with its tile instructions emulated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = "from build_native import compiler; print(bool(compiler()))"
FEATURES = "from arc_ao.ops import native; print(native.cpu_features())"
GEMM_TESTS = "amx and (gemm or threads or nan or layouts)"


def python(*arguments: str, **variables: str) -> str:
    """Standard output of this interpreter in the source folder."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "ARC_AO_CPU_LEVEL"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    """Path of a build whose level "amx" runs wherever AVX-512 does."""
    if python("-c", COMPILER).strip() != "True":
        pytest.skip("no C++ compiler")
    path = str(tmp_path_factory.mktemp("emulated") / "libarc_ao.so")
    python("build_native.py", path, CXXFLAGS="-DARC_AO_EMULATE_AMX")
    features = python("-c", FEATURES, ARC_AO_LIBRARY=path).strip()
    if "avx512 (" in features or "amx (not built" in features:
        pytest.skip(f"needs AVX-512 and a compiler that knows AMX, but: {features}")
    assert "amx" in features.split(", ")
    return path


def test_gemm_with_emulated_tiles(library):
    """The product's tests of test_native_cpu.py, every number of rows by tiles; none is skipped."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_native_cpu.py"]
    output = python(*command, "-k", GEMM_TESTS, ARC_AO_LIBRARY=library)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 50 and "skipped" not in output, output


def test_a_library_that_is_not_there_is_named(tmp_path):
    missing = str(tmp_path / "none.so")
    with pytest.raises(AssertionError, match="ARC_AO_LIBRARY: there is no file .*none.so"):
        python("-c", FEATURES, ARC_AO_LIBRARY=missing)
