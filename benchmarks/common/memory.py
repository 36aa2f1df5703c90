"""Resident memory of this process, as Linux counts it: now, and at its highest."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arc_ao.memory import release_memory

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SAMPLE_SECONDS = 0.002
MIB = 2**20


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (high-water mark) of this process."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{STATUS} has no {field}; this benchmark needs Linux")


def settle() -> int:
    """Return freed memory to the system, then the resident bytes."""
    gc.collect()
    release_memory()
    return resident_bytes()


def peak_of(run: Callable[[], Any]) -> int:
    """Highest resident bytes while `run` runs; sampled where the kernel does not let the high-water
    mark be reset."""
    try:
        CLEAR_REFS.write_text("5")  # VmHWM = VmRSS
    except OSError:
        return sampled_peak(run)
    run()
    return resident_bytes("VmHWM")


def sampled_peak(run: Callable[[], Any]) -> int:
    """The same from a thread that samples it."""
    seen, done = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            seen.append(max(seen.pop(), resident_bytes()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        done.set()
        sampler.join()
    return max(seen[0], resident_bytes())
