"""Seconds of GPU work: CUDA events around a graph of calls (small M) or around plain calls."""

import time
from collections.abc import Callable

import torch

SAMPLE_SECONDS = 0.01
MAX_CALLS = 400
WARM_UPS = 2

Call = Callable[[], object]


class WallClock:
    """For machines without a GPU: dry runs only."""

    def sampler(self, calls: list[Call], *, graph: bool) -> Callable[[], float]:
        """Samples mean seconds of one call over one turn through `calls`."""
        calls[0]()

        def sample() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return sample


class CudaClock:
    """CUDA events on the current stream."""

    def sampler(self, calls: list[Call], *, graph: bool) -> Callable[[], float]:
        """Samples mean seconds of one call over turns through `calls` of about SAMPLE_SECONDS.

        Args:
            calls: each works on other memory, so that no turn finds its weights in L2.
            graph: replay a CUDA graph of one turn, so that launching costs the GPU no time.
        """
        for _ in range(WARM_UPS):
            for call in calls:
                call()
        turn = _captured(calls) if graph else lambda: [call() for call in calls]
        turn()
        once = min(_seconds(turn, 1) for _ in range(2))
        turns = max(1, min(MAX_CALLS // len(calls), round(SAMPLE_SECONDS / once)))
        return lambda: _seconds(turn, turns) / len(calls)


def _seconds(run: Call, times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def _captured(calls: list[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def clock_for(device: torch.device) -> WallClock | CudaClock:
    return CudaClock() if device.type == "cuda" else WallClock()
