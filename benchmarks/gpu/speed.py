"""Ceilings of the GPU at hand, and microseconds of every provider on every shape.

Bytes of a linear: weight as stored, x and y once. Operations: 2 M N K, residual channels not
counted. Copy bandwidth counts bytes read and written.
"""

import gc
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Sampler, interleaved
from benchmarks.gpu import providers
from benchmarks.gpu.clock import CudaClock, WallClock, clock_for
from benchmarks.gpu.shapes import DRY_ROWS, DRY_SHAPES, ROWS, SHAPES, Shape

ROUNDS = 7
GRAPH_ROWS = 64  # up to which launching would show in the time
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
DRY_COPY_BYTES, DRY_MATMUL_SIZE = 1 << 20, 64
X_COPIES = 4

Timing = dict[str, Any]


def ceilings(device: torch.device, *, small: bool) -> dict[str, float]:
    """Copy bandwidth in GB/s and bf16 matrix rate in TFLOP/s, measured now."""
    clock = clock_for(device)
    size, side = (DRY_COPY_BYTES, DRY_MATMUL_SIZE) if small else (COPY_BYTES, MATMUL_SIZE)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    x = torch.randn(side, side, device=device).bfloat16()
    y = torch.randn(side, side, device=device).bfloat16()
    samplers = {
        "copy": clock.sampler([lambda: target.copy_(source)], graph=False),
        "matmul": clock.sampler([lambda: x @ y], graph=False),
    }
    found = interleaved(samplers, ROUNDS)
    return {
        "copy GB/s": 2 * size / found["copy"].seconds / 1e9,
        "bf16 matmul TFLOP/s": 2 * side**3 / found["matmul"].seconds / 1e12,
    }


def time_shapes(
    device: torch.device,
    measured: dict[str, float],
    in_time: Callable[[], bool],
    *,
    small: bool,
) -> tuple[list[Timing], dict[str, str]]:
    """All timings that fit into the time, and why a provider could not be timed."""
    clock, failed, timings = clock_for(device), {}, []
    names = providers.available()
    for rows in DRY_ROWS if small else ROWS:
        for shape in DRY_SHAPES if small else SHAPES:
            if not in_time():
                return timings, failed
            found = time_case(clock, device, shape, rows, names, failed)
            timings += [figures(t, measured, found) for t in found]
            for timing in found:
                print(f"{rows:5} {shape.model} {shape.layer:8} {timing['provider']:12} "
                      f"{timing['us']:9.1f} us", flush=True)  # fmt: skip
            gc.collect()
    return timings, failed


def time_case(
    clock: CudaClock | WallClock,
    device: torch.device,
    shape: Shape,
    rows: int,
    names: list[str],
    failed: dict[str, str],
) -> list[Timing]:
    """Every provider on one shape, in turns. One that fails is written down in `failed` and left
    out from then on."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator, device=device).bfloat16()
    inputs = [
        torch.randn(rows, shape.k, generator=generator, device=device).bfloat16()
        for _ in range(X_COPIES)
    ]
    samplers: dict[str, Sampler] = {}
    sizes: dict[str, int] = {}
    for name in names:
        if name in failed:
            continue
        try:
            built = providers.build(name, weight)
            samplers[name] = clock.sampler(calls_of(built.linears, inputs), graph=graphs(rows))
            sizes[name] = built.weight_bytes
        except Exception as error:
            failed[name] = f"{shape.model} {shape.layer}, M = {rows}: {error!r}"
    stored = providers.quantized(weight, providers.RESIDUAL_SHARE)
    quantizing = [partial(providers.quantize_input, x, stored) for x in inputs]
    try:
        samplers["quantize"] = clock.sampler(quantizing, graph=graphs(rows))
    except Exception as error:
        failed["quantize"] = repr(error)
    found = interleaved(samplers, ROUNDS)
    return [
        {
            "model": shape.model, "layer": shape.layer, "K": shape.k, "N": shape.n, "M": rows,
            "provider": name, "us": timing.seconds * 1e6, "spread": timing.spread,
            "weight bytes": sizes.get(name, 0), "bf16 bytes": shape.bf16_bytes,
        }
        for name, timing in found.items()
    ]  # fmt: skip


def graphs(rows: int) -> bool:
    """Whether a case is timed in a CUDA graph."""
    return rows <= GRAPH_ROWS


def calls_of(linears: list, inputs: list[Tensor]) -> list[Callable]:
    """One call per copy of the weight, inputs in turn."""
    return [partial(f, x) for f, x in zip(linears, cycle(inputs), strict=False)]


def figures(timing: Timing, measured: dict[str, float], case: list[Timing]) -> Timing:
    """`timing` with its rates, against the ceilings and against bf16 in the same case."""
    rows, k, n = timing["M"], timing["K"], timing["N"]
    seconds = timing["us"] / 1e6
    is_quantize = timing["provider"] == "quantize"
    if is_quantize:  # reads bf16, writes codes and scales of the augmented row
        moved = rows * k * (2 + (1 + providers.RESIDUAL_SHARE) * (0.5 + 1 / 16))
    else:
        moved = timing["weight bytes"] + 2 * rows * (k + n)
    result = timing | {"GB/s": moved / seconds / 1e9}
    result["% of copy"] = 100 * result["GB/s"] / measured["copy GB/s"]
    if not is_quantize:
        result["TFLOP/s"] = 2 * rows * n * k / seconds / 1e12
        result["% of matmul"] = 100 * result["TFLOP/s"] / measured["bf16 matmul TFLOP/s"]
        base = next((t["us"] for t in case if t["provider"] == "bf16"), None)
        result["x bf16"] = base / timing["us"] if base else None
    return result
