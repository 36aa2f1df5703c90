"""Interleaved medians of seconds.

Providers are timed in turns, so that a neighbour's load or a drifting clock meets all of them:

    one round = one sample of everything        sample = several calls, about SAMPLE_SECONDS
    reported  = median over the rounds          spread = (max - min) / median
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
