"""`arc-ao demo`: quantize the shipped model every way and print what it costs and keeps."""

import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arc_ao.calibration.data import text_batches
from arc_ao.config import ARCConfig
from arc_ao.eval.perplexity import evaluate_text, read_text
from arc_ao.eval.plot import plot_report
from arc_ao.eval.report import layer_report
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.integrations.huggingface import load_model, save_pretrained
from arc_ao.quantize import quantize_
from arc_ao.shipped import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL

WINDOW = 512
TIMED_TOKENS = 4096
CONFIGS = {
    "NVFP4, plain": ARCConfig(budget=0.0, recipe="plain"),
    "ARC, paper, 6 %": ARCConfig(budget=0.06, recipe="paper"),
    "ARC, paper, 10 %": ARCConfig(budget=0.10, recipe="paper"),
    "ours, 6 %": ARCConfig(budget=0.06),
    "ours, 10 %": ARCConfig(budget=0.10),
    "best, 6 %": ARCConfig(budget=0.06, recipe="best"),
    "best, 10 %": ARCConfig(budget=0.10, recipe="best"),
}


@dataclass
class DemoRow:
    """One row of the demo's table; None where a column does not apply."""

    name: str
    perplexity: float
    mean_kl: float | None
    closed: float | None  # share of plain NVFP4's KL that is gone
    extra_channels: float | None
    bits_per_weight: float
    file_bytes: int
    tokens_per_second: float


def run_demo(output: Path, *, max_tokens: int | None = None, console: Console) -> list[DemoRow]:
    """Quantize, evaluate, save; write demo.json and layers.png into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(MODEL)
    text = read_text(HELDOUT_TEXT)
    batches = text_batches(tokenizer, read_text(CALIBRATION_TEXT), window=WINDOW)
    evaluation = {"window": WINDOW, "max_tokens": max_tokens}
    timed = text_batches(tokenizer, text, window=WINDOW, max_tokens=TIMED_TOKENS)
    rows = [_reference_row(model, tokenizer, text, evaluation, timed)]
    for name, config in CONFIGS.items():
        console.print(f"[bold]{name}[/bold]")
        quantized = copy.deepcopy(model)
        summary = quantize_(quantized, config, calibration_data=batches)
        console.print(f"  {summary}", soft_wrap=True)
        _print_trials(summary.trials[0], console)
        plain_kl = next((row.mean_kl for row in rows if row.mean_kl is not None), None)
        data = (model, tokenizer, text, evaluation, timed)
        rows.append(_row(name, quantized, *data, summary, plain_kl, output))
    report = layer_report(quantized, model, batches[:4])
    plot_report(report, output / "layers.png", f"{name}: output SQNR per layer, shipped model")
    (output / "demo.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    console.print(format_rows(rows))
    console.print(f"Wrote {output / 'demo.json'} and {output / 'layers.png'}")
    return rows


def _reference_row(
    model: nn.Module, tokenizer: Any, text: str, evaluation: dict, timed: list[Tensor]
) -> DemoRow:
    metrics = evaluate_text(model, tokenizer, text, **evaluation)
    size = (MODEL / "model.safetensors").stat().st_size
    rate = tokens_per_second(model, timed)
    return DemoRow("bf16", metrics.perplexity, None, None, None, 16.0, size, rate)


def tokens_per_second(model: nn.Module, batches: list[Tensor]) -> float:
    """Rate of the model's forward alone: the median batch, after one that does not count."""
    seconds = []
    with evaluation_mode(model):
        for batch in (batches[0], *batches):
            start = time.perf_counter()
            run_model(model, batch)
            seconds.append((time.perf_counter() - start) / batch.numel())
    return 1 / statistics.median(seconds[1:])


def _row(
    name: str,
    quantized: nn.Module,
    model: nn.Module,
    tokenizer: Any,
    text: str,
    evaluation: dict,
    timed: list[Tensor],
    summary: Any,
    plain_kl: float | None,
    output: Path,
) -> DemoRow:
    metrics = evaluate_text(quantized, tokenizer, text, reference=model, **evaluation)
    plain = metrics.mean_kl if plain_kl is None else plain_kl
    return DemoRow(
        name,
        metrics.perplexity,
        metrics.mean_kl,
        1 - metrics.mean_kl / plain,
        summary.extra_channels,
        summary.bits_per_weight,
        _saved_bytes(quantized, tokenizer, output / "models" / _folder(name)),
        tokens_per_second(quantized, timed),
    )


def _saved_bytes(model: nn.Module, tokenizer: Any, directory: Path) -> int:
    """Save the model, replacing an earlier demo's, and return the size of its weights."""
    for file in directory.glob("*") if directory.is_dir() else ():
        file.unlink()
    save_pretrained(model, directory, tokenizer)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_").lower()


def _print_trials(trials: list[dict[str, Any]], console: Console) -> None:
    if trials:
        won, rest = trials[0], len(trials) - 1
        fields = ", ".join(f"{k} {v}" for k, v in won.items() if k != "divergence")
        console.print(f"  measured {rest + 1} candidates, chose {fields}", soft_wrap=True)


def format_rows(rows: list[DemoRow]) -> Table:
    """The demo's table."""
    table = Table(title="Shipped model on held-out text; KL to bf16 in nats per token")
    columns = "ppl|mean KL|KL closed|extra|bits/w|file|tok/s"
    table.add_column("", no_wrap=True)
    for column in columns.split("|"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.3f}",
            "-" if row.mean_kl is None else f"{row.mean_kl:.5f}",
            "-" if row.closed is None else f"{row.closed:.1%}",
            "-" if row.extra_channels is None else f"{row.extra_channels:.1%}",
            f"{row.bits_per_weight:.2f}",
            f"{row.file_bytes / 1e6:.2f}MB",
            f"{row.tokens_per_second:.0f}",
        )
    return table
