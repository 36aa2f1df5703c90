"""Time of from_pretrained on a quantized checkpoint, beside the bf16 one of the same model.

    python -m benchmarks.cpu.load_time          # random Llamas of 56, 224 and 560 small linears
    python -m benchmarks.cpu.load_time --check  # exits with 1 above --bound (3) times the bf16 load

The linears are small, so that what is timed is the work for each of them and not reading bytes. The
two loads are taken in turns, least of --rounds. The last line of stdout is one JSON document.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from arc_ao import ARCConfig, quantize_
from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.timing import Timing, interleaved

LAYER_LINEARS = 7
# Both kinds of residual channels, so that every linear has all of its tensors.
CONFIG = ARCConfig(recipe="balanced", num_act_channels=16, num_weight_channels=16)


def build(linears: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=linears // LAYER_LINEARS,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@contextmanager
def checkpoints(linears: int) -> Iterator[dict[str, str]]:
    """Folders with one model, unquantized and quantized."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / name) for name in ("bf16", "arc_ao")}
        model = build(linears)
        model.save_pretrained(paths["bf16"])
        batch = torch.arange(64).view(1, 64)
        quantize_(model, CONFIG, calibration_data=[batch], progress=False)
        model.save_pretrained(paths["arc_ao"])
        yield paths


def seconds_to_load(path: str) -> float:
    start = time.perf_counter()
    LlamaForCausalLM.from_pretrained(path, dtype="auto")
    return time.perf_counter() - start


def measure(linears: int, rounds: int) -> dict[str, Timing]:
    with checkpoints(linears) as paths:
        samplers = {name: lambda path=path: seconds_to_load(path) for name, path in paths.items()}
        interleaved(samplers, 1)  # reads all code
        return interleaved(samplers, rounds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linears", type=int, nargs="+", default=[56, 224, 560])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bound", type=float, default=3.0)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    header = machine_header(vars(args))
    print_header(header)
    print(f"{'linears':>8}{'bf16 s':>10}{'arc_ao s':>10}{'ratio':>8}")
    lines, seconds = [], {}
    for linears in args.linears:
        best = {name: timing.best for name, timing in measure(linears, args.rounds).items()}
        ratio = best["arc_ao"] / best["bf16"]
        print(f"{linears:8}{best['bf16']:10.3f}{best['arc_ao']:10.3f}{ratio:8.2f}")
        seconds[linears] = best
        name = f"load of {linears} quantized linears over that in bf16"
        lines.append(Line(name, ratio, at_most=args.bound))
    return conclude({"benchmark": "load_time", **header, "seconds": seconds}, lines, args.check)


if __name__ == "__main__":
    sys.exit(main())
