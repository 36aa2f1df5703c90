"""What both demos share: one model measured under several configs, and the table of it."""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from arc_ao.calibration.data import text_batches
from arc_ao.config import ARCConfig
from arc_ao.eval.perplexity import evaluate_text, read_text
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.integrations.huggingface import save_pretrained
from arc_ao.quantize import quantize_
from arc_ao.shipped import HELDOUT_TEXT

WINDOW = 512
REMEMBERED_BYTES = 2**30


@dataclass
class DemoRow:
    """One row of a demo's table; None where a column does not apply."""

    name: str
    perplexity: float
    mean_kl: float | None
    closed: float | None  # share of plain NVFP4's KL that is gone
    top1_agreement: float | None  # share of tokens whose likeliest follower is bf16's
    extra_channels: float | None
    bits_per_weight: float
    file_bytes: int  # of the safetensors files
    seconds: float | None  # to quantize
    tokens_per_second: float  # of a prompt of WINDOW tokens
    text: str = ""  # what the model answers to a demo's question


COLUMNS: dict[str, Callable[[DemoRow], str]] = {
    "ppl": lambda row: f"{row.perplexity:.3f}",
    "mean KL": lambda row: _optional(row.mean_kl, ".5f"),
    "KL closed": lambda row: _optional(row.closed, ".1%"),
    "top-1": lambda row: _optional(row.top1_agreement, ".1%"),
    "extra": lambda row: _optional(row.extra_channels, ".1%"),
    "bits/w": lambda row: f"{row.bits_per_weight:.2f}",
    "file": lambda row: f"{row.file_bytes / 1e6:.{2 if row.file_bytes < 10e6 else 1}f}MB",
    "quantize": lambda row: "-" if row.seconds is None else f"{row.seconds:.0f}s",
    "tok/s": lambda row: f"{row.tokens_per_second:.0f}",
}


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


class RememberedLogits(nn.Module):
    """A model that is asked for the logits of the same ids again and again, and computes them once.

    Of the first batches alone: REMEMBERED_BYTES of logits are kept, 2 * vocabulary a token in bf16.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.known, self.free_bytes = model, {}, REMEMBERED_BYTES

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """input_ids [B, T] -> logits [B, T, vocabulary]."""
        key = tuple(input_ids.shape), input_ids.cpu().numpy().tobytes()
        logits = self.known.get(key)
        if logits is None:
            logits = self.model(input_ids).logits
            if logits.nbytes <= self.free_bytes:
                self.known[key] = logits
                self.free_bytes -= logits.nbytes
        return CausalLMOutput(logits=logits)


class Subject:
    """A model in bf16, its tokenizer, and the held-out text that every row is measured on.

    Args:
        max_tokens: held-out tokens to score, by windows of WINDOW.
        timed_tokens: held-out tokens whose forward is timed.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, max_tokens: int | None, timed_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.reference = RememberedLogits(model)
        self.text = read_text(HELDOUT_TEXT)
        self.timed = text_batches(tokenizer, self.text, window=WINDOW, max_tokens=timed_tokens)

    def reference_row(self) -> DemoRow:
        """The row of the model itself."""
        metrics = evaluate_text(
            self.reference, self.tokenizer, self.text, window=WINDOW, max_tokens=self.max_tokens
        )
        size = saved_bytes(self.model.save_pretrained)
        rate = tokens_per_second(self.model, self.timed)
        return DemoRow("bf16", metrics.perplexity, None, None, None, None, 16.0, size, None, rate)

    def quantized_rows(
        self, configs: dict[str, ARCConfig], batches: list[Tensor], console: Console
    ) -> Iterator[tuple[DemoRow, nn.Module]]:
        """Row and quantized model of one config after the other; the first is plain NVFP4."""
        plain_kl = None
        for name, config in configs.items():
            console.print(f"[bold]{name}[/bold]")
            quantized = copy.deepcopy(self.model)
            start = time.perf_counter()
            summary = quantize_(quantized, config, calibration_data=batches)
            seconds = time.perf_counter() - start
            console.print(f"  {summary}", soft_wrap=True)
            _print_trials(summary.trials[0], console)
            row = self._row(name, quantized, summary, plain_kl, seconds)
            plain_kl = row.mean_kl if plain_kl is None else plain_kl
            yield row, quantized

    def _row(
        self, name: str, quantized: nn.Module, summary: Any, plain_kl: float | None, seconds: float
    ) -> DemoRow:
        metrics = evaluate_text(
            quantized,
            self.tokenizer,
            self.text,
            reference=self.reference,
            window=WINDOW,
            max_tokens=self.max_tokens,
        )
        return DemoRow(
            name,
            metrics.perplexity,
            metrics.mean_kl,
            1 - metrics.mean_kl / (metrics.mean_kl if plain_kl is None else plain_kl),
            metrics.top1_agreement,
            summary.extra_channels,
            summary.bits_per_weight,
            saved_bytes(lambda folder: save_pretrained(quantized, folder)),
            seconds,
            tokens_per_second(quantized, self.timed),
        )


def tokens_per_second(model: nn.Module, batches: list[Tensor]) -> float:
    """Rate of the model's forward alone: the median batch, after one that does not count."""
    seconds = []
    with evaluation_mode(model):
        for batch in (batches[0], *batches):
            start = time.perf_counter()
            run_model(model, batch)
            seconds.append((time.perf_counter() - start) / batch.numel())
    return 1 / statistics.median(seconds[1:])


def saved_bytes(save: Callable[[Path], Any]) -> int:
    """Size of the weights that save(folder) writes; they are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def _print_trials(trials: list[dict[str, Any]], console: Console) -> None:
    if trials:
        won, rest = trials[0], len(trials) - 1
        fields = ", ".join(f"{k} {v}" for k, v in won.items() if k != "divergence")
        console.print(f"  measured {rest + 1} candidates, chose {fields}", soft_wrap=True)


def format_rows(rows: list[DemoRow], title: str, columns: tuple[str, ...]) -> Table:
    """Table of the named COLUMNS."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *(COLUMNS[column](row) for column in columns))
    return table


def save_rows(rows: list[DemoRow], path: Path) -> None:
    """Write the rows as JSON."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
