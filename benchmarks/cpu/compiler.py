"""What the compiler flows make of a Llama with the shapes of a 1B model: counts, sizes, seconds.

    python -m benchmarks.cpu.compiler            # 4 layers of 2048/8192, 32/8 heads
    python -m benchmarks.cpu.compiler --check    # exit code 1 if an acceptance line fails

Weights are random. Counted per decoder block are the quantizations of inputs, those fused with what
makes the input, and the products, in the eager flow under backend "arc" and in the graph flow.
Compile times are of cold caches, plain torch.compile and backend "arc" taking turns; the passes
alone are timed on an exported decoder of many small layers. The last line of stdout is one JSON
document.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import arc_ao
from arc_ao.inspect.explain import Explanation
from arc_ao.passes import arc, run_passes
from arc_ao.summary import model_bytes
from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.models import random_llama

PLAN = arc_ao.ARCConfig(budget=0.06, recipe="balanced", weight_scale="amax")
LENGTH = 32
PACKAGE_FACTOR, PACKAGE_BYTES = 1.1, 5_000_000
RUN_PACKAGE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ids, expected = torch.load(sys.argv[3])
print(torch.equal(torch._inductor.aoti_load_package(sys.argv[2])(ids), expected))
print("arc_ao" in sys.modules)
"""


class Logits(nn.Module):
    """input_ids [B, T] -> logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def build(args: argparse.Namespace, **changes: int) -> Logits:
    """Random weights in bf16."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden}
    sizes |= {"num_hidden_layers": args.layers, "vocab_size": 32000}
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 256}
    return Logits(random_llama(**sizes | heads | changes).requires_grad_(False))


def tokens(length: int) -> Tensor:
    return torch.arange(length)[None] * 37 % 509


def quantized(model: Logits) -> Logits:
    arc_ao.quantize_(model, PLAN, calibration_data=[tokens(LENGTH)], progress=False)
    return model


def graph_flow(model: Logits) -> nn.Module:
    """Export, observe, calibrate, convert."""
    prepared = arc_ao.prepare_arc(torch.export.export(model, (tokens(LENGTH),)), PLAN)
    prepared(tokens(LENGTH))
    return arc_ao.convert_arc(prepared)


def count_lines(found: Explanation, flow: str, layers: int) -> list[Line]:
    """Per decoder block."""
    breaks = sum(found.graph_breaks.values()) + found.graphs - 1
    products = found.operators["nvfp4_gemm"] / layers
    return [
        Line(f"{flow}: quantizations a block", found.quantizations / layers, at_most=4),
        Line(f"{flow}: of them fused", found.fused / layers, at_least=3),
        Line(f"{flow}: products a block", products, at_most=7),
        Line(f"{flow}: graph breaks", breaks, at_most=0),
    ]


def recompilations(model: Logits) -> int:
    """Graphs compiled for ten more lengths, after two."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=arc, fullgraph=True)
    for length in (LENGTH, LENGTH + 1):
        compiled(tokens(length))
    before = counters["stats"]["unique_graphs"]
    for length in range(40, 140, 10):
        compiled(tokens(length))
    return counters["stats"]["unique_graphs"] - before


def compile_seconds(model: Logits, rounds: int) -> dict[str, float]:
    """Median seconds of the first call, caches cold; none where there is no round."""
    seconds: dict[str, list[float]] = {"inductor": [], "arc": []}
    for _ in range(rounds):
        for name, backend in (("inductor", "inductor"), ("arc", arc)):
            torch._dynamo.reset()
            with fresh_cache():
                start = time.perf_counter()
                torch.compile(model, backend=backend, fullgraph=True)(tokens(LENGTH))
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items() if values}


def pass_seconds(layers: int = 32) -> float:
    """The passes on a decomposed decoder of many layers."""
    sizes = {"num_hidden_layers": layers, "intermediate_size": 512, "vocab_size": 512}
    small = build(argparse.Namespace(layers=layers, hidden=256), **sizes)
    program = torch.export.export(quantized(small), (tokens(LENGTH),)).run_decompositions()
    start = time.perf_counter()
    run_passes(program.graph)
    return time.perf_counter() - start


def package(model: Logits) -> dict[str, Any]:
    """Bytes of a package against those of the weights, and whether a bare process agrees."""
    with tempfile.TemporaryDirectory() as folder:
        path, io = Path(folder) / "model.pt2", Path(folder) / "io.pt"
        arc_ao.export_package(model, (tokens(LENGTH),), path)
        runner = torch._inductor.aoti_load_package(str(path))
        torch.save((tokens(LENGTH), runner(tokens(LENGTH))), io)
        program = [sys.executable, "-c", RUN_PACKAGE]
        command = [*program, str(arc_ao.library_path()), str(path), str(io)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        same = done.stdout.split() == ["True", "False"]
        allowed = PACKAGE_FACTOR * model_bytes(model) + PACKAGE_BYTES
        return {"bytes": path.stat().st_size, "allowed": allowed, "same_logits": same}


@torch.no_grad()
def measure(args: argparse.Namespace) -> tuple[list[Line], dict[str, Any]]:
    model = build(args)
    converted = graph_flow(copy.deepcopy(model))
    lines = count_lines(arc_ao.explain(converted, tokens(LENGTH)), "graph flow", args.layers)
    del converted
    found = arc_ao.explain(quantized(model), tokens(LENGTH))
    lines += count_lines(found, 'backend "arc"', args.layers)
    lines.append(Line("recompilations for ten more lengths", recompilations(model), at_most=0))
    packed = package(model)
    size = packed["bytes"] / packed["allowed"]
    lines.append(Line("package, of 1.1 times the weights + 5 MB", size, at_most=1))
    lines.append(Line("bare process reproduces the logits", packed["same_logits"], at_least=1))
    seconds = compile_seconds(model, args.rounds) | {"passes": pass_seconds()}
    ratio = seconds["arc"] / seconds["inductor"] if args.rounds else None
    lines.append(Line('compile time, backend "arc" over plain', ratio, at_most=1.2))
    lines.append(Line("seconds of the passes, 32 layers", seconds["passes"], at_most=10))
    return lines, {"seconds": seconds, "package": packed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--rounds", type=int, default=3, help="of compile times; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a line fails")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    header = machine_header(vars(args))
    print_header(header)
    lines, figures = measure(args)
    return conclude({"benchmark": "bench_compiler", **header, **figures}, lines, args.check)


if __name__ == "__main__":
    sys.exit(main())
