"""Time and peak memory of GPTQ, block by block: the model, two layers and one block's Hessians.

    python -m benchmarks.memory.gptq                    # random-weight Llama of about 1 GB
    python -m benchmarks.memory.gptq --layers 4         # a smaller one

Measured like peak.py, whose options it shares, in a fresh process:

    Hessians = 4 bytes * sum of in_features^2 over the inputs of one block (q/k/v, o, gate/up, down)
    bound    = rest + 2 decoder layers + Hessians + activations of one batch + hidden states
    PASS     peak of quantize_ <= bound

Hidden states are those of all calibration tokens between two blocks, tokens * hidden * 2 bytes.
Exits with 1 on FAIL. The last line of stdout is one JSON document.
"""

import argparse
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from arc_ao import ARCConfig, quantize_
from benchmarks.common.memory import MIB, peak_of, settle
from benchmarks.memory import peak
from benchmarks.memory.peak import VOCABULARY, build_model, bytes_of

ROWS = {
    "model_bytes": "model",
    "layer_bytes": "one decoder layer",
    "hessian_bytes": "Hessians of one block",
    "activation_bytes": "activations of one batch",
    "hidden_bytes": "hidden states of all tokens",
    "rest_bytes": "resident before quantize_ (libraries and model)",
    "bound_bytes": "bound: that + 2 layers + Hessians + activations + hidden states",
    "peak_bytes": "peak during quantize_",
    "after_bytes": "resident afterwards",
}


def quantize(model: torch.nn.Module, batches: list[torch.Tensor], args: argparse.Namespace) -> None:
    config = ARCConfig(budget=args.budget, recipe=args.recipe, rounding="gptq")
    quantize_(model, config, calibration_data=batches, progress=sys.stderr.isatty())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build, run, quantize in this process; all figures in bytes."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    batches = [torch.randint(VOCABULARY, (1, args.tokens)) for _ in range(args.batches)]
    quantize(build_model(256, 512, layers=1), batches[:1], args)  # reads all code
    model = build_model(args.hidden, args.intermediate, args.layers)

    def forward() -> None:
        with torch.no_grad():
            model(batches[0], use_cache=False)

    forward()
    before_forward = settle()
    figures = {
        "model_bytes": bytes_of(model),
        "layer_bytes": bytes_of(model.model.layers[0]),
        "hessian_bytes": 4 * (3 * args.hidden**2 + args.intermediate**2),
        "activation_bytes": peak_of(forward) - before_forward,
        "hidden_bytes": 2 * args.hidden * args.tokens * args.batches,
        "rest_bytes": settle(),
    }
    once = ("rest_bytes", "hessian_bytes", "activation_bytes", "hidden_bytes")
    bound = 2 * figures["layer_bytes"] + sum(figures[name] for name in once)
    start = time.perf_counter()
    highest = peak_of(lambda: quantize(model, batches, args))
    seconds = time.perf_counter() - start
    passed = {"quantize_seconds": seconds, "passed": highest <= bound}
    return figures | {"bound_bytes": bound, "peak_bytes": highest, "after_bytes": settle()} | passed


def print_table(figures: dict[str, Any], title: str) -> None:
    """The figures in MiB, the time and the verdict."""
    table = Table("", title=title)
    table.add_column("MiB", justify="right")
    for key, name in ROWS.items():
        table.add_row(name, f"{figures[key] / MIB:.1f}")
    console = Console(width=100)
    console.print(table)
    verdict = "PASS" if figures["passed"] else "FAIL"
    console.print(f"{verdict}, {figures['quantize_seconds']:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = peak.parser(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args(argv)
    title = "peak memory of GPTQ"
    return peak.report("gptq_memory", title, __spec__.name, args, argv, measure, print_table)


if __name__ == "__main__":
    sys.exit(main())
