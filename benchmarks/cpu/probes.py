"""Measured ceilings of this machine: read bandwidth and multiply-add rates, from probes.cpp.

    python -m benchmarks.cpu.probes --threads 2

The probes are compiled with the C++ compiler at first use, for the instruction sets that this
machine has.
"""

import argparse
import ctypes
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from arc_ao.env import env_report

SOURCE = Path(__file__).parent / "probes.cpp"
FLAGS = "-std=c++17 -O3 -shared -fPIC -pthread -Wno-uninitialized -Wno-maybe-uninitialized".split()
FLAGS_OF = {  # instruction set that the CPU reports -> flags
    "avx2": "-mavx2 -mfma",
    "avx512f": "-mavx512f -mavx512bw -mavx512vl",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
    "amx_bf16": "-mamx-tile -mamx-bf16 -mamx-int8",
}
CEILINGS = ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "fp32_fma")
PREFETCH_BYTES = (0, 1024, 2048, 4096, 8192)
SECONDS = 0.05


@cache
def load() -> ctypes.CDLL:
    """The probes, compiled to a temporary file.

    Raises:
        SystemExit: without a C++ compiler.
    """
    command = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(command[0]) is None:
        raise SystemExit(
            f"the probes need a C++ compiler; {command[0]} is not there (CXX names it)"
        )
    sets = env_report()["cpu"]["instruction_sets"]
    groups = [text.split() for name, text in FLAGS_OF.items() if sets.get(name) is True]
    flags = [flag for group in groups if _accepts(command, group) for flag in group]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "probes.so"
        subprocess.run([*command, *FLAGS, *flags, str(SOURCE), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    library.arc_probe_read.restype = ctypes.c_double
    library.arc_probe_read.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64
    ]  # fmt: skip
    for name in CEILINGS:
        function = getattr(library, f"arc_probe_{name}")
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]
    return library


def _accepts(command: list[str], flags: list[str]) -> bool:
    """Whether this compiler knows the flags."""
    nothing = [*command, *flags, "-x", "c++", "-E", os.devnull]
    return subprocess.run(nothing, capture_output=True).returncode == 0


def ceilings() -> list[str]:
    """Those of CEILINGS that this machine has."""
    return [name for name in CEILINGS if rate(name, 1, 1e-4)]


def rate(name: str, threads: int, seconds: float = SECONDS) -> float:
    """Operations per second from registers, measured over `seconds`; 0 where it cannot run."""
    return getattr(load(), f"arc_probe_{name}")(threads, seconds)


def read_seconds(data: Tensor, threads: int, ahead: int) -> float:
    """Seconds to read the bytes of `data` once, prefetching `ahead` bytes."""
    return load().arc_probe_read(data.data_ptr(), data.nbytes, threads, ahead)


def best_prefetch(data: Tensor, threads: int) -> int:
    """The prefetch distance that reads `data` fastest, in bytes."""
    times = {ahead: [] for ahead in PREFETCH_BYTES}
    for _ in range(3):
        for ahead, seconds in times.items():
            seconds.append(read_seconds(data, threads, ahead))
    return min(times, key=lambda ahead: min(times[ahead]))


def random_bytes(size: int) -> Tensor:
    """uint8 [size]"""
    return torch.randint(256, (size,), dtype=torch.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--footprint-mib", type=int, default=1024)
    args = parser.parse_args(argv)
    data = random_bytes(args.footprint_mib * 2**20)
    ahead = best_prefetch(data, args.threads)
    speed = data.nbytes / min(read_seconds(data, args.threads, ahead) for _ in range(3))
    print(f"read {args.footprint_mib} MiB: {speed / 1e9:.1f} GB/s, prefetching {ahead} bytes")
    rates = {name: max(rate(name, args.threads) for _ in range(3)) for name in ceilings()}
    for name, value in rates.items():
        print(f"{name}: {value / 1e12:.2f} TFLOP/s")
    print(json.dumps({"threads": args.threads, "read": speed, "prefetch": ahead, **rates}))


if __name__ == "__main__":
    main()
