"""What the CUDA build tests share: tools that are there, or the reason why a test cannot run.

ARC_AO_REQUIRE_CUDA=1 (set by `make test-cuda-build`) turns that reason into a failure.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import build_cuda
from arc_ao.ops.cuda import library

REQUIRED = "ARC_AO_REQUIRE_CUDA"


def need(condition: object, reason: str) -> None:
    """Skip the test, or fail it where CUDA is required, unless `condition`."""
    if condition:
        return
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but {reason}")
    pytest.skip(reason)


def header_flags() -> list[str]:
    """-I flags of CUTLASS and of the toolkit behind nvcc, for a plain C++ compiler."""
    need(not build_cuda.missing(), f"CUDA build: {build_cuda.missing()}")
    cutlass = build_cuda.cutlass()
    command = [*build_cuda.nvcc(), "-dryrun", "-x", "cu", "-E", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    lines = [line for line in said.splitlines() if "INCLUDES=" in line]
    toolkit = re.findall(r'"(?:-I)?(/[^"]+)"', " ".join(lines))
    folders = [cutlass / "include", cutlass / "tools/util/include", *toolkit]
    return [f"-I{folder}" for folder in folders]


def built_library():
    """The CUDA library through ctypes."""
    need(library.load() is not None, "there is no CUDA library: make test-cuda-build")
    return library.load()


def object_file(name: str) -> Path:
    """An object of the library's build, which lie in objects/ beside it."""
    path = library.LIBRARY.parent / "objects" / name
    need(path.exists(), f"there is no {name} beside the CUDA library: make test-cuda-build")
    return path


def machine_code(name: str) -> str:
    """Disassembly of an object."""
    path = object_file(name)
    need(shutil.which("cuobjdump") and shutil.which("nvdisasm"), "no cuobjdump and nvdisasm")
    command = ["cuobjdump", "--dump-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
