"""Peak memory of quantize_: at most the model, one decoder layer and one batch's activations.

    python -m benchmarks.memory.peak                    # Llama of about 1 GB, recipe "balanced"
    python -m benchmarks.memory.peak --recipe auto      # with the search, which takes longer

A fresh process quantizes a tiny model, which loads all code, builds a random-weight Llama in bf16,
runs it once on the calibration batch, then quantizes it. Resident memory is read from /proc
(Linux), its high-water mark reset before each step; where the kernel does not allow that, a thread
samples it.

    activations = peak of the plain forward - rest          rest: RSS with the model built
    bound       = rest + bytes of one decoder layer + activations
    PASS        peak of quantize_ <= bound

Exits with 1 on FAIL. The last line of stdout is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from arc_ao import ARCConfig, quantize_
from arc_ao.env import env_report
from benchmarks.common.checkout import ROOT
from benchmarks.common.memory import MIB, peak_of, settle
from benchmarks.common.models import random_llama

VOCABULARY = 4096


def build_model(hidden: int, intermediate: int, layers: int) -> PreTrainedModel:
    """Random weights; a small vocabulary keeps the logits from counting."""
    return random_llama(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )


def quantize(model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace) -> None:
    config = ARCConfig(budget=args.budget, recipe=args.recipe)
    quantize_(model, config, calibration_data=[ids], progress=sys.stderr.isatty())


def bytes_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build, run, quantize in this process; all figures in bytes."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    ids = torch.randint(VOCABULARY, (1, args.tokens))
    # Threads start and libraries are read here, not in the figures: resident memory counts the
    # pages of code that ran, too.
    quantize(build_model(256, 512, layers=1), ids, args)
    model = build_model(args.hidden, args.intermediate, args.layers)
    model_bytes, layer_bytes = bytes_of(model), bytes_of(model.model.layers[0])

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    forward()
    before_forward = settle()
    activations = peak_of(forward) - before_forward
    rest = settle()
    start = time.perf_counter()
    peak = peak_of(lambda: quantize(model, ids, args))
    bound = rest + layer_bytes + activations
    return {
        "model_bytes": model_bytes,
        "layer_bytes": layer_bytes,
        "activation_bytes": activations,
        "rest_bytes": rest,
        "bound_bytes": bound,
        "peak_bytes": peak,
        "after_bytes": settle(),
        "quantize_seconds": time.perf_counter() - start,
        "passed": peak <= bound,
    }


def print_table(figures: dict[str, Any], title: str) -> None:
    """The figures in MiB and the verdict."""
    table = Table("", title=title)
    table.add_column("MiB", justify="right")
    names = {
        "model_bytes": "model",
        "layer_bytes": "one decoder layer",
        "activation_bytes": "activations of one batch",
        "rest_bytes": "resident before quantize_ (libraries and model)",
        "bound_bytes": "bound: that + one layer + activations",
        "peak_bytes": "peak during quantize_",
        "after_bytes": "resident afterwards",
    }
    for key, name in names.items():
        table.add_row(name, f"{figures[key] / MIB:.1f}")
    Console().print(table)
    Console().print("PASS" if figures["passed"] else "FAIL")


def parser(description: str) -> argparse.ArgumentParser:
    """Options of the model and of the run, which gptq.py shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=512, help="in the one calibration batch")
    parser.add_argument(
        "--recipe", choices=("auto", "best", "balanced", "plain"), default="balanced"
    )
    parser.add_argument("--budget", type=float, default=0.06)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser(__doc__.splitlines()[0]).parse_args(argv)
    return report("peak_memory", "peak memory", __spec__.name, args, argv, measure, print_table)


def report(
    name: str,
    what: str,
    module: str,
    args: argparse.Namespace,
    argv: list[str] | None,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    print_table: Callable[[dict[str, Any], str], None],
) -> int:
    """Measure in a fresh process of `module`, print its figures; exit status 1 where they fail."""
    if args.in_this_process:
        print(json.dumps(measure(args)))
        return 0
    command = [sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)]
    command.append("--in-this-process")
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    figures = json.loads(child.stdout.splitlines()[-1])
    print_table(figures, f"{what}, recipe {args.recipe!r}, budget {args.budget:.0%}")
    arguments = {k: v for k, v in vars(args).items() if k != "in_this_process"}
    header = {"arguments": arguments, "versions": env_report()["versions"], "threads": args.threads}
    print(json.dumps({"benchmark": name, **header, **figures}))
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
