"""Compile csrc/ to `arc_ao/libarc_ao.so` with a C++ compiler alone: no torch, no Python headers.

The library calls torch's stable C interface, whose symbols torch brings when the library is loaded;
a stub of the same name stands in for it while linking. One binary therefore serves every Python and
every torch from 2.11 on. Without a compiler the package installs without the library, and
`arc-ao env` says so; an error of a compiler that is there ends the build.

CXX names the compiler, CXXFLAGS adds flags, ARC_AO_NATIVE=0 leaves the library out.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
LIBRARY = "libarc_ao.so"
# No contraction: codes and scales must have the same bits at every level. The two warnings are
# false alarms of GCC 12 in its own intrinsics.
FLAGS = (
    "-std=c++17 -O3 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-psabi "
    "-Wno-uninitialized -Wno-maybe-uninitialized"
).split()
AVX2 = "-mavx2 -mfma -mf16c".split()
AVX512 = [*AVX2, *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni".split()]
AVX512BF16 = [*AVX512, "-mavx512bf16", "-ffp-contract=fast"]  # attention, which quantizes nothing
AMX = [*AVX512, *"-mamx-tile -mamx-bf16".split()]
# level_NAME.cpp: its flags
LEVELS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": AVX512BF16,
    "amx": AMX,
}
COMMON = [
    "attention_operator.cpp",
    "bf16_linear_operator.cpp",
    "gemm_operator.cpp",
    "quantize_operators.cpp",
    "register_operators.cpp",
    "weight_operators.cpp",
    "cpu/attention.cpp",
    "cpu/dispatch.cpp",
    "cpu/dot_gemm.cpp",
    "cpu/nvfp4_gemm.cpp",
    "cpu/prefill.cpp",
    "cpu/quant_augment.cpp",
]


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None where there is none or it is not wanted."""
    if os.environ.get("ARC_AO_NATIVE") == "0" or not sys.platform.startswith("linux"):
        return None
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        command = shlex.split(candidate or "")
        if command and shutil.which(command[0]):
            return command
    return None


def build_library(cxx: list[str], target: Path, work: Path) -> None:
    """Compile and link csrc/ to `target`; objects go to `work`.

    Raises:
        RuntimeError: an error of the compiler, with its output.
    """
    work.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    levels = {name: flags for name, flags in LEVELS.items() if _accepts(cxx, flags, work)}
    defines = [f"-DARC_AO_{name.upper()}" for name in levels]
    jobs = [(SOURCES / f"cpu/level_{name}.cpp", flags) for name, flags in levels.items()]
    jobs += [(SOURCES / name, defines) for name in COMMON]
    objects = [work / (source.stem + ".o") for source, _ in jobs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda job: _run([*cxx, *FLAGS, *job[0][1], *extra, "-c", job[0][0], "-o", job[1]]),
                zip(jobs, objects, strict=True),
            )
        )
    stub = work / "libtorch_cpu.so"
    empty = work / "empty.cpp"
    empty.write_text("")
    _run([*cxx, "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", empty, "-o", stub])
    link = ["-shared", "-Wl,--no-as-needed", f"-L{work}", "-ltorch_cpu", "-Wl,-z,noexecstack"]
    _run([*cxx, *objects, *link, *extra, "-o", target])


def _accepts(cxx: list[str], flags: list[str], work: Path) -> bool:
    """Whether the compiler knows the flags of a level for the machine it builds for."""
    probe = work / "probe.cpp"
    probe.write_text("#include <immintrin.h>\nint x;\n" if flags else "int x;\n")
    command = [*cxx, *flags, "-c", probe, "-o", work / "probe.o"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")


class BuildLibrary(Command):
    """A library of the package, into the build folder or in place."""

    user_options = [("inplace", "i", "put the library into the source folder")]
    boolean_options = ["inplace"]
    library = ""

    def initialize_options(self) -> None:
        self.inplace = False
        self.build_lib = self.build_temp = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def wanted(self) -> bool:
        """Whether this build makes the library."""
        raise NotImplementedError

    def make(self, target: Path, work: Path) -> None:
        """Build the library to `target`."""
        raise NotImplementedError

    def run(self) -> None:
        if self.wanted():
            in_place = self.inplace or self.editable_mode
            package = (ROOT if in_place else Path(self.build_lib)) / "arc_ao"
            work = Path(self.build_temp) / self.get_command_name()
            self.make(package / self.library, work)

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in sorted(SOURCES.rglob("*")) if p.is_file()]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "arc_ao" / self.library)] if self.wanted() else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildNative(BuildLibrary):
    """`python setup.py build_native`: the operators with their CPU kernels."""

    description = "compile the native operator library"
    library = LIBRARY

    def wanted(self) -> bool:
        return compiler() is not None

    def make(self, target: Path, work: Path) -> None:
        build_library(compiler(), target, work)

    def run(self) -> None:
        if not self.wanted():
            self.warn("no C++ compiler: arc_ao is installed without native CPU kernels")
        super().run()


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None), ("build_cuda", None)]


class PlatformWheel(bdist_wheel):
    """A wheel with the library serves every Python of its platform: py3-none-PLATFORM."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if compiler() else (python, abi, platform)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether installed files depend on the platform."""
        return compiler() is not None


COMMANDS = {"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel}


if __name__ == "__main__":  # python build_native.py TARGET: the library alone, to any place
    if (found := compiler()) is None:
        sys.exit("no C++ compiler")
    target = Path(sys.argv[1]).resolve()
    build_library(found, target, target.parent / "objects")
