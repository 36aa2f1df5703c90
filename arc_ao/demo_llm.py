"""`arc-ao demo-llm`: the same comparison on a real model, fetched from its registry package.

SmolLM2-135M-Instruct (real_models.py), whose weights come from a 4-bit GGUF file: bf16 here is that
file dequantized, and all rows share its rounding.
"""

import textwrap
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from arc_ao.calibration.data import text_batches
from arc_ao.config import ARCConfig
from arc_ao.demo_table import WINDOW, DemoRow, Subject, format_rows, save_rows
from arc_ao.eval.perplexity import read_text
from arc_ao.eval.plot import plot_report
from arc_ao.eval.report import layer_report
from arc_ao.inference import evaluation_mode
from arc_ao.integrations.huggingface import load_model
from arc_ao.real_models import REAL_MODELS, SMOLLM2, fetch_model
from arc_ao.shipped import MIXED_TEXT
from arc_ao.summary import SOURCE

CALIBRATION_TOKENS = 16_384  # 10 for each input channel of the widest linear
HELDOUT_TOKENS = 8192
TIMED_TOKENS = 1536
NEW_TOKENS = 48
TEXT_WIDTH, TEXT_LINES = 96, 2
QUESTION = "Why is the sky blue?"
CONFIGS = {
    "NVFP4, plain": ARCConfig(budget=0.0, recipe="plain"),
    "ARC, paper, 10 %": ARCConfig(budget=0.10, recipe="paper"),
    "ours, 6 %": ARCConfig(budget=0.06),
    "ours, 10 %": ARCConfig(budget=0.10),
    "best, 10 %": ARCConfig(budget=0.10, recipe="best"),
    "W4A16": ARCConfig(activation="bf16", budget=0.0, recipe="balanced"),
}
PLOTTED = "best, 10 %"
SHOWN = ("ppl", "mean KL", "KL closed", "top-1", "bits/w", "file", "quantize", "tok/s")


def run_demo_llm(
    output: Path,
    *,
    cache: Path | None = None,
    max_tokens: int = HELDOUT_TOKENS,
    console: Console,
) -> list[DemoRow]:
    """Fetch, quantize, evaluate, generate; write demo_llm.json and layers_llm.png into `output`.

    Args:
        cache: folder of the downloaded file, see `real_models.cache_folder`.
        max_tokens: held-out tokens to score.
    """
    output.mkdir(parents=True, exist_ok=True)
    title = REAL_MODELS[SMOLLM2].title
    console.print(f"[bold]{title}[/bold], {REAL_MODELS[SMOLLM2].megabytes} MB unless cached")
    model, tokenizer = load_model(fetch_model(SMOLLM2, cache))
    console.print(getattr(model, SOURCE))
    text = read_text(MIXED_TEXT)
    batches = text_batches(tokenizer, text, window=WINDOW, max_tokens=CALIBRATION_TOKENS)
    subject = Subject(model, tokenizer, max_tokens, TIMED_TOKENS)
    rows = [subject.reference_row()]
    rows[0].text = answer(model, tokenizer)
    for row, quantized in subject.quantized_rows(CONFIGS, batches, console):
        row.text = answer(quantized, tokenizer)
        rows.append(row)
        if row.name == PLOTTED:
            report = layer_report(quantized, model, batches[:1])
            plot_report(report, output / "layers_llm.png", f"{row.name}: {title}")
    save_rows(rows, output / "demo_llm.json")
    console.print(format_rows(rows, f"{title} on held-out text; KL to bf16 per token", SHOWN))
    _print_answers(rows, console)
    console.print(f"Wrote {output / 'demo_llm.json'} and {output / 'layers_llm.png'}")
    return rows


def answer(model: nn.Module, tokenizer: Any) -> str:
    """What the model answers to QUESTION, through the chat template, the likeliest token each."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with evaluation_mode(model), torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)  # [1, T]
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def first_lines(text: str) -> list[str]:
    """The first TEXT_LINES lines of a text, its own line breaks left out."""
    return textwrap.wrap(" ".join(text.split()), TEXT_WIDTH)[:TEXT_LINES]


def _print_answers(rows: list[DemoRow], console: Console) -> None:
    console.print(f"\n[bold]{QUESTION}[/bold]")
    for row in rows:
        console.print(row.name, style="bold")
        for line in first_lines(row.text):
            console.print(f"  {line}", markup=False, highlight=False)
