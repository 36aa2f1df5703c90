"""Compile csrc/cuda to `arc_ao/libarc_ao_cuda.so`: NVFP4 on Blackwell's matrix units.

One unit per architecture family holds CUTLASS's block-scaled products; sm_100f is machine code for
compute capability 10.0 and 10.3, sm_120f for 12.0 and 12.1. (Any other suffix compiles, without an
error, to kernels that hold no matrix instruction: tests/test_cuda_build.py looks into the code.)
The library has a C interface and its own CUDA runtime, so that one binary serves every torch.

It takes minutes and 8 GB of memory, so an installation builds it where a GPU of these families is
visible, or where asked. It needs nvcc 13 and the headers of nvidia-cutlass 4.2 (build time only).

ARC_AO_CUDA=0 leaves it out, ARC_AO_CUDA=1 demands it; ARC_AO_CUDA_ARCHS="120" chooses families;
ARC_AO_CUTLASS names a folder with CUTLASS's include/ and tools/; NVCC the compiler, NVCCFLAGS more
flags.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from build_native import BuildLibrary

SOURCES = Path(__file__).parent / "csrc" / "cuda"
LIBRARY = "libarc_ao_cuda.so"
CUTLASS_REQUIREMENT = "nvidia-cutlass==4.2.0.0"
# family: compute capabilities that its machine code runs on
FAMILIES = {"100": ("10.0", "10.3"), "120": ("12.0", "12.1")}
FLAGS = (
    "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-fPIC "
    "-Xcompiler=-fvisibility=hidden -Xcompiler=-ffp-contract=off"
).split()
# No contraction: codes and scales must have the same bits as everywhere.
ROW_KERNELS, ROW_FLAGS = ("quant_augment.cu", "dot_gemm.cu"), ["-fmad=false"]
# Calls to members of CUTLASS's host tuples from functions that the device never runs.
CUTLASS_FLAGS = ["-diag-suppress=20012"]
PTXAS_LOG = "ptxas.log"


def nvcc() -> list[str] | None:
    """The CUDA compiler's command, or None."""
    command = shlex.split(os.environ.get("NVCC", "nvcc"))
    return command if command and shutil.which(command[0]) else None


def cutlass() -> Path | None:
    """The folder with CUTLASS's include/ and tools/, found without importing anything; or None."""
    found = os.environ.get("ARC_AO_CUTLASS")
    if found is None:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            return None
        found = Path(spec.origin).parent / "source"
    return Path(found) if (Path(found) / "include/cutlass/cutlass.h").is_file() else None


def families() -> list[str]:
    """The families to build: the chosen ones, else all where demanded, else those of visible GPUs.

    Raises:
        ValueError: an unknown family in ARC_AO_CUDA_ARCHS, or ARC_AO_CUDA neither 0 nor 1.
    """
    wanted = os.environ.get("ARC_AO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"ARC_AO_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return []
    chosen = os.environ.get("ARC_AO_CUDA_ARCHS", "").replace(",", " ").split()
    if unknown := sorted(set(chosen) - set(FAMILIES)):
        raise ValueError(f"ARC_AO_CUDA_ARCHS: expected some of {list(FAMILIES)}, got {unknown}")
    visible = list(FAMILIES) if wanted == "1" else _visible_families()
    return [name for name in FAMILIES if name in (chosen or FAMILIES) and name in visible]


def _visible_families() -> list[str]:
    """Families of the GPUs that the driver shows."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = set(done.stdout.split()) if done.returncode == 0 else set()
    return [name for name, capabilities in FAMILIES.items() if found & set(capabilities)]


def missing() -> str | None:
    """What a build lacks, or None."""
    if nvcc() is None:
        return "nvcc (of CUDA 13) is not on PATH; NVCC names it"
    if cutlass() is None:
        return (
            f"CUTLASS's headers are not there: pip install --no-deps {CUTLASS_REQUIREMENT}, or let "
            "ARC_AO_CUTLASS name a folder with its include/ and tools/"
        )
    return None


def requirements() -> list[str]:
    """What pip installs into an isolated build's environment for this."""
    return [CUTLASS_REQUIREMENT] if families() and nvcc() and cutlass() is None else []


def build_library(target: Path, work: Path, names: list[str]) -> None:
    """Compile for the families `names` and link to `target`; objects and the assembler's report go
    to `work`. One unit after the other: each takes up to 8 GB.

    Raises:
        RuntimeError: something is missing, or an error of the compiler, with its output.
    """
    if lack := missing():
        raise RuntimeError(f"CUDA kernels: {lack}")
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    include = [f"-I{cutlass() / 'include'}", f"-I{cutlass() / 'tools/util/include'}"]
    codes = {name: f"-gencode=arch=compute_{name}f,code=sm_{name}f" for name in names}
    jobs = [(kernel, [*ROW_FLAGS, *codes.values()]) for kernel in ROW_KERNELS]
    jobs += [(f"gemm_sm{n}.cu", [*CUTLASS_FLAGS, *include, codes[n]]) for n in names]
    jobs += [("gemm.cpp", [f"-DARC_AO_SM{name}" for name in names])]
    extra = shlex.split(os.environ.get("NVCCFLAGS", ""))
    report = ""
    for source, flags in jobs:
        output = work / f"{Path(source).stem}.o"
        report += _run([*nvcc(), *FLAGS, *flags, *extra, "-c", SOURCES / source, "-o", output])
    (work / PTXAS_LOG).write_text(report)
    objects = [work / f"{Path(source).stem}.o" for source, _ in jobs]
    # Linked elsewhere first: a file that is being loaded must not change.
    fresh = work / LIBRARY
    _run([*nvcc(), "-shared", "--cudart=static", *objects, "-o", fresh])
    shutil.move(fresh, target)


class BuildCuda(BuildLibrary):
    """`python setup.py build_cuda`: the kernels for Blackwell, where they are wanted."""

    description = "compile the CUDA library"
    library = LIBRARY

    def wanted(self) -> bool:
        demanded = os.environ.get("ARC_AO_CUDA") == "1"
        return bool(families()) and (demanded or not missing())

    def make(self, target: Path, work: Path) -> None:
        build_library(target, work, families())

    def run(self) -> None:
        if families() and not self.wanted():
            self.warn(f"arc_ao is installed without CUDA kernels: {missing()}")
        super().run()


def _run(command: list) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":  # python build_cuda.py TARGET: the library alone, for every family
    os.environ.setdefault("ARC_AO_CUDA", "1")
    where = Path(sys.argv[1]).resolve()
    build_library(where, where.parent / "objects", families())
