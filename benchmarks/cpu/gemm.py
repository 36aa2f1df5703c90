"""Linears on the CPU: NVFP4 and ARC against bf16, fp32 and int8, by rows of x.

    python -m benchmarks.cpu.gemm --threads 2     # 4096 -> 14336, M = 1 to 1024
    python -m benchmarks.cpu.gemm --check         # exit code 1 if an acceptance line fails
    python -m benchmarks.cpu.gemm --level avx2 --providers bf16 nvfp4

Our results are checked against a float64 product first. Then all providers (cpu/providers.py) are
timed in turns. "warm" multiplies with one weight again and again, "cold" with as many copies in
turn as fill the footprint, as the layers of a model do.

    GB/s        bytes of the weight as stored / time
    TFLOP/s     2 M N K / time, K with the residual channels
    % of        cold, M <= 16: the bandwidth of reading as much memory ("read"); M > 16: the rate
                of multiply-adds from registers, by the instructions named (probes.py). Both are
                measured in the same rounds.

Acceptance lines are of "nvfp4" where they name no other. The last line of stdout is one JSON
document.
"""

import argparse
import contextlib
import sys
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from arc_ao.formats.nvfp4 import BLOCK_SCALES
from arc_ao.ops import native, quant_augment
from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.timing import Sampler, Timing, interleaved, sampler
from benchmarks.cpu import probes
from benchmarks.cpu import providers as cpu_providers
from benchmarks.cpu.providers import PROVIDERS, Provider

OURS = ("nvfp4", "arc")
MEMORY_BOUND_ROWS = 16  # up to here the bandwidth is the ceiling
QUANTIZE_ROWS = 512
BLOCK_BYTES = 32  # of bf16
READ, AMX = "read", "amx_bf16"  # names of ceilings
GIGA, TERA = 1e9, 1e12

Cell = dict[str, Any]  # one line of the table


def measure_rows(
    rows: int, warm: bool, providers: dict[str, Provider], data: Tensor, args: argparse.Namespace
) -> list[Cell]:
    """One cell per provider, with the ceilings measured in the same rounds."""
    x = torch.randn(rows, args.in_features)
    samplers = {n: sampler(p.runner(x, warm=warm), warm=warm) for n, p in providers.items()}
    ceiling_of = ceilings_for(rows, warm, list(providers))
    measured = {name for name in ceiling_of.values() if name}
    if rows > MEMORY_BOUND_ROWS and AMX in probes.ceilings():
        measured.add(AMX)  # of an acceptance line, also where a lower level is compared
    for name in sorted(measured):
        samplers[name] = _probe(name, data, args.threads)
    timings = interleaved(samplers, args.rounds)
    rates = {name: 1 / timings[name].seconds for name in sorted(measured)}
    cells = []
    for name, provider in providers.items():
        work = 2 * rows * args.out_features * provider.channels
        figures = make_cell(timings[name], provider, work, ceiling_of[name], rates)
        figures["over_bf16"] = None
        if "bf16" in timings:
            figures["over_bf16"] = timings["bf16"].seconds / timings[name].seconds
        weights = "warm" if warm else "cold"
        cells.append({"rows": rows, "weights": weights, "provider": name, **figures})
    return cells


def make_cell(
    timing: Timing, provider: Provider, work: int, ceiling: str | None, rates: dict[str, float]
) -> Cell:
    """Figures of one provider; `work` in operations, `rates` of the ceilings per second."""
    done = provider.weight_bytes if ceiling == READ else work
    return {
        "microseconds": timing.seconds * 1e6,
        "best_microseconds": timing.best * 1e6,
        "spread": timing.spread,
        "gb_per_second": provider.weight_bytes / timing.seconds / GIGA,
        "tflops": work / timing.seconds / TERA,
        "ceiling": ceiling,
        "of_ceiling": done / timing.seconds / rates[ceiling] if ceiling else None,
        "ceilings": rates,
    }


def ceilings_for(rows: int, warm: bool, providers: list[str]) -> dict[str, str | None]:
    """Name of the ceiling of each provider; none for few rows and a weight in the cache."""
    if rows <= MEMORY_BOUND_ROWS:
        return dict.fromkeys(providers, None if warm else READ)
    available = probes.ceilings()
    return {name: cpu_providers.ceiling_of(name, available) for name in providers}


def _probe(name: str, data: Tensor, threads: int) -> Sampler:
    """Samples the seconds of one byte read or of one operation."""
    if name != READ:
        return lambda: 1 / probes.rate(name, threads)
    ahead = probes.best_prefetch(data, threads)
    return lambda: probes.read_seconds(data, threads, ahead) / data.nbytes


def quantize_speed(args: argparse.Namespace) -> dict[str, float]:
    """GB/s of bf16 input that one thread quantizes, without residual channels, by how block scales
    are chosen; 32 over it is nanoseconds a block."""
    x = torch.randn(QUANTIZE_ROWS, args.in_features).bfloat16()
    none = torch.empty(0, dtype=torch.int32)
    runs = {
        method: partial(quant_augment, x, none, none, None, "token", block_scale=method)
        for method in BLOCK_SCALES
    }
    torch.set_num_threads(1)
    timings = interleaved({m: sampler(run, warm=True) for m, run in runs.items()}, args.rounds)
    torch.set_num_threads(args.threads)
    return {method: x.nbytes / timing.seconds / GIGA for method, timing in timings.items()}


def find(cells: list[Cell], provider: str, rows: int, weights: str) -> Cell | None:
    wanted = (provider, rows, weights)
    return next((c for c in cells if (c["provider"], c["rows"], c["weights"]) == wanted), None)


def speedup(cells: list[Cell], over: tuple, ours: tuple) -> float | None:
    """Time of `over` over that of `ours`, each (provider, rows, weights)."""
    first, second = find(cells, *over), find(cells, *ours)
    return first["microseconds"] / second["microseconds"] if first and second else None


def acceptance(cells: list[Cell], quantize_gb_per_second: dict[str, float]) -> list[Line]:
    """What the kernels are to reach."""
    first = find(cells, "nvfp4", 1, "cold")
    lines = [
        Line("M=1 cold, of read bandwidth", first and first["of_ceiling"], at_least=0.85),
        _speedup_line(cells, "bf16", 1, "cold", 3.0),
        _speedup_line(cells, "bf16", 1, "warm", 4.0),
        _speedup_line(cells, "int8", 1, "warm", 1.0),
    ]
    for rows in (4, 8):
        value = speedup(cells, ("nvfp4", rows, "cold"), ("nvfp4", 1, "cold"))
        lines.append(Line(f"M={rows} cold, time over M=1", value, at_most=1.5))
    for rows, bound in ((16, 3.0), (128, 2.0), (1024, 1.5)):
        lines.append(_speedup_line(cells, "bf16", rows, "cold", bound))
    lines.append(_amx_line(cells))
    for rows in (1, 16, 1024):
        value = speedup(cells, ("arc", rows, "cold"), ("nvfp4", rows, "cold"))
        lines.append(Line(f"M={rows} cold, ARC's time over plain NVFP4's", value, at_most=1.08))
    name = "quantizing, GB/s of bf16 input per thread"
    return [*lines, Line(name, quantize_gb_per_second["amax"], at_least=4.0)]


def _speedup_line(cells: list[Cell], over: str, rows: int, weights: str, bound: float) -> Line:
    value = speedup(cells, (over, rows, weights), ("nvfp4", rows, weights))
    return Line(f"M={rows} {weights}, speedup over {over}", value, at_least=bound)


def _amx_line(cells: list[Cell]) -> Line:
    found = find(cells, "nvfp4", 1024, "cold")
    rate = found and found["ceilings"].get(AMX)
    value = found["tflops"] * TERA / rate if rate else None
    missing = "needs AMX" if found else "not measured"
    return Line("M=1024 cold, of the AMX bf16 ceiling", value, at_least=0.5, missing=missing)


def print_table(cells: list[Cell], title: str) -> None:
    """One line per cell."""
    table = Table(title=title)
    for heading in ("M", "weights", "provider"):
        table.add_column(heading)
    for heading in ("us", "best us", "spread", "GB/s", "TFLOP/s", "% of ceiling", "x bf16"):
        table.add_column(heading, justify="right")
    before = None
    for cell in cells:
        group = (cell["rows"], cell["weights"])
        if before not in (None, group):
            table.add_section()
        fraction, over = cell["of_ceiling"], cell["over_bf16"]
        table.add_row(
            *(("", "") if group == before else map(str, group)),
            cell["provider"],
            f"{cell['microseconds']:.0f}",
            f"{cell['best_microseconds']:.0f}",
            f"{cell['spread']:.0%}",
            f"{cell['gb_per_second']:.1f}",
            f"{cell['tflops']:.3f}",
            "" if fraction is None else f"{fraction:.0%} {cell['ceiling']}",
            "" if over is None else f"{over:.2f}",
        )
        before = group
    Console(width=110).print(table)


def print_ceilings(cells: list[Cell]) -> None:
    """The best that the probes measured next to the providers."""
    best: dict[str, float] = {}
    for cell in cells:
        for name, rate in cell["ceilings"].items():
            best[name] = max(rate, best.get(name, 0.0))
    for name, rate in best.items():
        unit = f"{rate / GIGA:.1f} GB/s" if name == READ else f"{rate / TERA:.2f} TFLOP/s"
        print(f"ceiling {name}: {unit}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=14336)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 128, 1024])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--level", choices=native.LEVELS, help="cap of our kernels")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--footprint-mib", type=int, default=1024, help="of cold weights, each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a line fails")
    return parser.parse_args(argv)


def check_ours(providers: dict[str, Provider], args: argparse.Namespace) -> dict[str, Any]:
    """Results of both of ours, by rows of x, against float64."""
    checked = {}
    for name in OURS:
        if name in providers:
            weight = providers[name].weights[0]
            by_rows = {
                rows: cpu_providers.check(weight, torch.randn(rows, args.in_features).bfloat16())
                for rows in args.rows
            }
            share = min(result["rounded_exactly"] for result in by_rows.values())
            print(f"checked {name}: {share:.3%} of the elements are the exact value rounded")
            checked[name] = by_rows
    return checked


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build, check, then time."""
    footprint = args.footprint_mib * 2**20
    weight = (torch.randn(args.out_features, args.in_features) / args.in_features**0.5).bfloat16()
    providers = {name: cpu_providers.build(name, weight, footprint) for name in args.providers}
    checked = check_ours(providers, args)
    data = probes.random_bytes(footprint)
    cells = []
    for rows in args.rows:
        print(f"timing M={rows}", file=sys.stderr)
        torch._dynamo.reset()  # every number of rows is compiled for itself
        for warm in (False, True):
            cells += measure_rows(rows, warm, providers, data, args)
    return {
        "stored": {n: [p.weight_bytes, len(p.weights), p.channels] for n, p in providers.items()},
        "checked": checked,
        "cells": cells,
        "quantize_gb_per_second": quantize_speed(args),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    with native.capped_at(args.level) if args.level else contextlib.nullcontext():
        header = machine_header(vars(args))
        print_header(header)
        results = measure(args)
    shape = f"{args.in_features} -> {args.out_features}, {args.threads} threads"
    print_table(results["cells"], shape)
    print_ceilings(results["cells"])
    for method, rate in results["quantize_gb_per_second"].items():
        print(
            f"quantizing, {method}: {rate:.2f} GB/s, {BLOCK_BYTES / rate:.1f} ns a block, 1 thread"
        )
    lines = acceptance(results["cells"], results["quantize_gb_per_second"])
    return conclude({"benchmark": "bench_cpu_gemm", **header, **results}, lines, args.check)


if __name__ == "__main__":
    sys.exit(main())
