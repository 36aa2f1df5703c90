"""What quantizing takes, stage by stage, against one bf16 forward over the calibration tokens.

    python -m benchmarks.cpu.quantize_time                       # random Llamas: 8, 16, 32 layers
    python -m benchmarks.cpu.quantize_time --model DIR|GGUF ...  # those and real models
    python -m benchmarks.cpu.quantize_time --recipes auto best --json FILE --check

Real models calibrate on the shipped text with as many tokens as `arc-ao quantize` takes, the random
ones on random tokens. The forward is timed over all of them, half before and half after the call.
Acceptance: the default in at most 30 forwards, "best" in 80; time per layer at 32 layers within
20 % of that at 8; the time left that the progress bar shows within 30 % of what was left, at the
ends of stages between a tenth and nine tenths of the call. The last line of stdout is JSON.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.data import (
    num_tokens,
    text_batches,
    wanted_tokens,
)
from arc_ao.eval.perplexity import read_text
from arc_ao.flow.expected_cost import expected_costs
from arc_ao.flow.targets import collect_targets
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import MIXED_TEXT
from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.models import random_llama

LAYERS = (8, 16, 32)
WINDOW = 512
RANDOM_TOKENS = 4096
VOCABULARY = 8192
MOST_FORWARDS = {"auto": 30.0, "best": 80.0}


def small_llama(layers: int) -> nn.Module:
    """Random weights, of the proportions of small models."""
    torch.manual_seed(0)
    return random_llama(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


def random_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (RANDOM_TOKENS // WINDOW, 1, WINDOW)
    return list(torch.randint(VOCABULARY, shape, generator=generator))


def real_model(path: Path) -> tuple[nn.Module, list[Tensor]]:
    """A model and the most calibration batches that `arc-ao quantize` takes for it."""
    model, tokenizer = load_model(path)
    tokens = max(tokens_of(recipe, model) for recipe in MOST_FORWARDS)
    return model, text_batches(tokenizer, read_text(MIXED_TEXT), window=WINDOW, max_tokens=tokens)


def tokens_of(recipe: str, model: nn.Module) -> int:
    """Calibration tokens that `arc-ao quantize` takes for a recipe: whole windows."""
    config = ARCConfig(recipe=recipe)
    linears = collect_targets(model, config).modules.values()
    return wanted_tokens(config, max(linear.in_features for linear in linears), WINDOW)[0]


def seconds_of_forwards(model: nn.Module, batches: list[Tensor]) -> float:
    start = time.perf_counter()
    with evaluation_mode(model):
        for batch in batches:
            run_model(model, batch)
    return time.perf_counter() - start


def measure(
    name: str, model: nn.Module, batches: list[Tensor], recipe: str, budget: float
) -> dict[str, Any]:
    """One call of quantize_ on a copy of the model, between two halves of the forward."""
    run_model(model, batches[0])
    half = len(batches) // 2
    forward = seconds_of_forwards(model, batches[:half])
    quantized, config = copy.deepcopy(model), ARCConfig(recipe=recipe, budget=budget)
    start = time.perf_counter()
    summary = quantize_(quantized, config, calibration_data=batches, progress=sys.stderr.isatty())
    total = time.perf_counter() - start
    forward += seconds_of_forwards(model, batches[half:])
    tokens = sum(num_tokens(batch) for batch in batches)
    return {
        "model": name,
        "recipe": recipe,
        "tokens": tokens,
        "layers": model.config.num_hidden_layers,
        "forward_seconds": forward,
        "stages": summary.seconds,
        "seconds": total,
        "forwards": total / forward,
        "bar_error": bar_error(summary.seconds, expected_costs([config], tokens, len(batches))),
    }


def bar_error(seconds: dict[str, float], expected: dict[str, float]) -> float:
    """Largest |time left as the bar has it / true time left - 1| at the ends of stages that come
    after a tenth and before nine tenths of the whole."""
    total, cost = sum(seconds.values()), sum(expected.values())
    elapsed, done, worst = 0.0, 0.0, 0.0
    for name, spent in seconds.items():
        elapsed, done = elapsed + spent, done + expected.get(name, 0.0)
        if 0.1 * total < elapsed < 0.9 * total and done > 0:
            said = elapsed * (cost - done) / done
            worst = max(worst, abs(said / (total - elapsed) - 1))
    return worst


def format_row(row: dict[str, Any]) -> Table:
    title = f"{row['model']}, recipe {row['recipe']}, {row['tokens']} calibration tokens"
    table = Table("stage", title=title)
    for column in ("seconds", "forwards"):
        table.add_column(column, justify="right")
    stages = row["stages"] | {"whole call": row["seconds"], "(one forward)": row["forward_seconds"]}
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / row['forward_seconds']:.2f}")
    return table


def lines_of(rows: list[dict[str, Any]]) -> list[Line]:
    lines = []
    for row in rows:
        what = f"{row['model']}, {row['recipe']}"
        bound = MOST_FORWARDS[row["recipe"]]
        lines.append(Line(f"{what}: forwards", row["forwards"], at_most=bound))
        lines.append(Line(f"{what}: error of the time left", row["bar_error"], at_most=0.3))
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        by_layers = {
            row["layers"]: row["seconds"] / row["layers"]
            for row in rows
            if row["recipe"] == recipe and row["model"].startswith("random")
        }
        if {8, 32} <= by_layers.keys():
            ratio = by_layers[32] / by_layers[8]
            lines.append(Line(f"{recipe}: time per layer, 32 layers over 8", ratio, at_most=1.2))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, nargs="+", default=[], help="folders or GGUF files")
    parser.add_argument("--layers", type=int, nargs="*", default=list(LAYERS))
    parser.add_argument("--recipes", nargs="+", default=["auto", "best"], choices=MOST_FORWARDS)
    parser.add_argument("--budget", type=float, default=0.06)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a line fails")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header = machine_header(
        {k: str(v) for k, v in vars(args).items() if k not in ("model", "json")}
    )
    print_header(header)
    console, rows = Console(width=100), []
    subjects = [(path.name, lambda p=path: real_model(p)) for path in args.model]
    for layers in args.layers:
        name = f"random Llama of {layers} layers"
        subjects.append((name, lambda n=layers: (small_llama(n), random_batches())))
    for name, build in subjects:
        model, batches = build()
        for recipe in args.recipes:
            taken = batches[: tokens_of(recipe, model) // WINDOW]
            rows.append(measure(name, model, taken, recipe, args.budget))
            console.print(format_row(rows[-1]))
    document = {"header": header, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return conclude(document, lines_of(rows), args.check)


if __name__ == "__main__":
    sys.exit(main())
