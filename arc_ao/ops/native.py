"""The native operator library: loaded once, its CPU level read and capped.

ARC_AO_CPU_LEVEL=eager leaves the library alone (every operator runs its eager meaning);
portable, avx2, avx512 or amx caps the instruction sets that its kernels use.
ARC_AO_LIBRARY=PATH loads another build of the library, such as one with sanitizers.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

LIBRARY_VARIABLE = "ARC_AO_LIBRARY"
LIBRARY = Path(
    os.environ.get(LIBRARY_VARIABLE) or Path(__file__).parent.parent / "libarc_ao.so"
).absolute()
LEVEL_VARIABLE = "ARC_AO_CPU_LEVEL"
LEVELS = ("portable", "avx2", "avx512", "amx")  # from least to most; each includes those before it


def reason_absent() -> str | None:
    """Why the native kernels do not run, or None where they do."""
    level = os.environ.get(LEVEL_VARIABLE)
    if level == "eager":
        return f"{LEVEL_VARIABLE}=eager"
    if level and level not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE}: expected one of {('eager', *LEVELS)}, got {level!r}")
    if not LIBRARY.exists():
        if os.environ.get(LIBRARY_VARIABLE):
            raise ValueError(f"{LIBRARY_VARIABLE}: there is no file {LIBRARY}")
        return "the package was built without a C++ compiler; install g++ and arc_ao again"
    return None


@cache
def load() -> ctypes.CDLL | None:
    """The library, its operators registered; None where it is absent or switched off."""
    if reason_absent() is not None:
        return None
    torch.ops.load_library(LIBRARY)
    library = ctypes.CDLL(str(LIBRARY))
    library.arc_ao_cpu_level.restype = ctypes.c_char_p
    library.arc_ao_cpu_features.restype = ctypes.c_char_p
    return library


def cpu_level() -> str:
    """The level that runs: "eager" or one of LEVELS."""
    library = load()
    return "eager" if library is None else library.arc_ao_cpu_level().decode()


def cpu_features() -> str:
    """Every level and, where it cannot run, why."""
    library = load()
    return "" if library is None else library.arc_ao_cpu_features().decode()


def pairs_are_fast() -> bool:
    """Whether our kernels for bf16 beat PyTorch's own: AVX-512 BF16 without tile registers."""
    library = load()
    return library is not None and bool(library.arc_ao_pairs_are_fast())


def available_levels() -> list[str]:
    """Levels that this machine and this build can run."""
    return [] if load() is None else [f for f in cpu_features().split(", ") if f in LEVELS]


@contextmanager
def capped_at(level: str) -> Iterator[None]:
    """Inside, kernels use no more than `level`; of one process, so not for concurrent use.

    Raises:
        ValueError: a level that is unknown or that cannot run here, saying what can.
    """
    if level not in available_levels():
        raise ValueError(f"level: expected one of {available_levels()}, got {level!r}")
    before = cpu_level()
    load().arc_ao_set_cpu_level(level.encode())
    try:
        yield
    finally:
        load().arc_ao_set_cpu_level(before.encode())
