"""What the speed benchmarks share: interleaved medians, the machine, acceptance lines.

Providers are timed in turns, so that a neighbour's load or a drifting clock meets all of them:

    one round = one sample of everything        sample = several calls, about SAMPLE_SECONDS
    reported  = median over the rounds          spread = (max - min) / median
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arc_ao.env import env_report

SAMPLE_SECONDS = 0.02
MAX_CALLS = 200  # in a sample

Sampler = Callable[[], float]  # takes one sample: seconds of one call


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the rounds: median, least, and how far apart they were."""

    seconds: float
    best: float
    spread: float


def interleaved(samplers: dict[str, Sampler], rounds: int) -> dict[str, Timing]:
    """Sample everything in turns, `rounds` times."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: summarize(values) for name, values in samples.items()}


def sampler(run: Callable[[], Any], *, warm: bool) -> Sampler:
    """Samples `run`, whose calls are counted here; `warm` puts an untimed call before each sample.

    A cold run has to use other memory in each call.
    """
    calls = _calls_per_sample(run)

    def sample() -> float:
        if warm:
            run()
        return _seconds_per_call(run, calls)

    return sample


def summarize(samples: list[float]) -> Timing:
    """Median, least and spread of seconds."""
    median = statistics.median(samples)
    return Timing(median, min(samples), (max(samples) - min(samples)) / median)


def _calls_per_sample(run: Callable[[], Any]) -> int:
    run()
    once = min(_seconds_per_call(run, 1) for _ in range(2))
    return max(1, min(MAX_CALLS, round(SAMPLE_SECONDS / once)))


def _seconds_per_call(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def machine_header(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat a run, and on what it ran."""
    report = env_report()
    cpu = report["cpu"] | {"threads": torch.get_num_threads()}
    backends = {name: op["backend"] for name, op in report["ops"].items()}
    return {
        "arguments": arguments,
        "versions": report["versions"],
        "cpu": cpu,
        "ops": backends,
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }


def print_header(header: dict[str, Any]) -> None:
    """The machine in four lines."""
    cpu, versions = header["cpu"], header["versions"]
    sets = [name for name, present in cpu["instruction_sets"].items() if present is True]
    print(f"{cpu['model']}, {cpu['threads']} of {cpu['cores']} cores: {', '.join(sets)}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"arc_ao operators: {header['ops']['arc::nvfp4_gemm']}; commit {header['commit']}")
    print(f"load average before: {header['load_before']:.2f} (busy cores spoil every figure)")


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Line:
    """One acceptance line: `value` has to be at least or at most `bound`.

    `value` None: not measured in this run, or impossible here; `missing` says which.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    missing: str = "not measured"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.missing
        low = self.at_least is not None and self.value < self.at_least
        high = self.at_most is not None and self.value > self.at_most
        return "FAIL" if low or high else "PASS"

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "verdict": self.verdict,
        }


def print_lines(lines: Iterable[Line]) -> None:
    """One row per acceptance line, the verdict first."""
    from rich.console import Console  # here: the GPU suite runs where torch may be all there is

    for line in lines:
        value = "" if line.value is None else f"{line.value:.3g}"
        text = f"{line.verdict:12} {line.name:58} {value:>7} (expected {line.bound})"
        Console(width=120, highlight=False, markup=False).print(text)


def all_passed(lines: Iterable[Line]) -> bool:
    """True unless a line failed; what was not measured does not fail."""
    return all(line.verdict != "FAIL" for line in lines)


def conclude(document: dict[str, Any], lines: list[Line], check: bool) -> int:
    """Print the acceptance lines, then the document with them as the last line of stdout; the exit
    code, 1 where one of them failed and `check` asks for it."""
    print_lines(lines)
    passed = all_passed(lines)
    documents = [line.document() for line in lines]
    print(json.dumps(document | {"acceptance": documents, "passed": passed}))
    return 1 if check and not passed else 0
