"""`arc-ao demo`: quantize the shipped model every way and print what it costs and keeps."""

from pathlib import Path

from rich.console import Console

from arc_ao.calibration.data import text_batches
from arc_ao.config import ARCConfig
from arc_ao.demo_table import WINDOW, DemoRow, Subject, format_rows, save_rows
from arc_ao.eval.perplexity import read_text
from arc_ao.eval.plot import plot_report
from arc_ao.eval.report import layer_report
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import CALIBRATION_TEXT, MODEL

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
TITLE = "Shipped model on held-out text; KL to bf16 in nats per token"
SHOWN = ("ppl", "mean KL", "KL closed", "extra", "bits/w", "file", "tok/s")


def run_demo(output: Path, *, max_tokens: int | None = None, console: Console) -> list[DemoRow]:
    """Quantize and evaluate; write demo.json and layers.png into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(MODEL)
    batches = text_batches(tokenizer, read_text(CALIBRATION_TEXT), window=WINDOW)
    subject = Subject(model, tokenizer, max_tokens, TIMED_TOKENS)
    rows = [subject.reference_row()]
    for row, quantized in subject.quantized_rows(CONFIGS, batches, console):  # noqa: B007
        rows.append(row)
    report = layer_report(quantized, model, batches[:4])
    plot_report(report, output / "layers.png", f"{row.name}: output SQNR per layer, shipped model")
    save_rows(rows, output / "demo.json")
    console.print(format_rows(rows, TITLE, SHOWN))
    console.print(f"Wrote {output / 'demo.json'} and {output / 'layers.png'}")
    return rows
