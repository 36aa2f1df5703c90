"""A mix of choices per layer against one recipe for all, at no more bits and multiply-adds.

    python -m benchmarks.accuracy.budget_search                        # shipped model, dev
    python -m benchmarks.accuracy.budget_search --part heldout
    python -m benchmarks.accuracy.budget_search --model minilm --text wiki.valid.tokens

Rows: plain NVFP4, `ARCConfig` at 10 % by recipe, with and without measured layer weights, and
`BudgetConfig(extra_bits=...)`, rounded to nearest and by GPTQ. The divergence is the mean KL per
token of the shipped model, or 1 - cosine of sentence embeddings (encoder.py) of an encoder;
"closed" is the share of plain NVFP4's that is gone.

The shipped model is calibrated on the first 16,384 tokens of the shipped calibration text. Its dev
part is the rest of that text, on which nothing is calibrated and by which defaults are chosen;
"heldout" is the first 32,768 tokens of the shipped held-out book. An encoder's dev and held-out
parts are two texts. The last line of stdout is one JSON document.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from arc_ao import ARCConfig, BudgetConfig, quantize_
from arc_ao.calibration.data import text_batches
from arc_ao.eval.perplexity import read_text
from arc_ao.inference import run_model
from arc_ao.integrations.huggingface import load_model
from arc_ao.outputs.divergence import output_divergence
from arc_ao.shipped import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL
from benchmarks.accuracy.embeddings import (
    embed,
    is_encoder_linear,
    mean_cosine_distance,
    model_directory,
    select_lines,
    tokenize,
)
from benchmarks.common.headers import run_header

CALIBRATION_TOKENS, HELDOUT_TOKENS, WINDOW = 16_384, 32_768, 512
LINES = (64, 128)  # calibration and evaluation lines of an encoder's text
PLAIN = "plain NVFP4"


def rows(extra_bits: list[float], budget: float) -> dict[str, ARCConfig]:
    """Configs by the name of their row."""
    found = {
        PLAIN: ARCConfig(budget=0.0, recipe="plain"),
        "auto": ARCConfig(budget=budget),
        "auto, equal layer weights": ARCConfig(budget=budget, layer_weights="equal"),
        "best": ARCConfig(budget=budget, recipe="best"),
    }
    for bits in extra_bits:
        for rounding in ("nearest", "gptq"):
            found[f"mix, {bits:g} bits, {rounding}"] = BudgetConfig(
                extra_bits=bits, budget=budget, rounding=rounding
            )
    return found


def language_model(part: str) -> tuple[nn.Module, list, Callable[[nn.Module], float], Any]:
    """Shipped model, calibration batches, its divergence on a part, and no filter."""
    model, tokenizer = load_model(MODEL)
    windows = text_batches(tokenizer, read_text(CALIBRATION_TEXT), max_tokens=sys.maxsize // 16)
    calibrated = CALIBRATION_TOKENS // WINDOW
    calibration, evaluation = windows[:calibrated], windows[calibrated:]
    if part == "heldout":
        text = read_text(HELDOUT_TEXT)
        evaluation = text_batches(tokenizer, text, max_tokens=HELDOUT_TOKENS)
    references = [run_model(model, batch) for batch in evaluation]

    def divergence(quantized: nn.Module) -> float:
        pairs = zip(references, evaluation, strict=True)
        found = [output_divergence(r, run_model(quantized, batch)) for r, batch in pairs]
        return sum(found) / len(found)

    return model, calibration, divergence, None


def encoder(name: str, text: Path) -> tuple[nn.Module, list, Callable[[nn.Module], float], Any]:
    """Encoder, calibration batches, 1 - cosine on lines of the same text, linears that count."""
    directory = model_directory(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    lines = select_lines(text.read_text(encoding="utf-8"), *LINES)
    calibration, evaluation = (tokenize(tokenizer, part) for part in lines)
    reference = embed(model, evaluation)
    divergence = lambda quantized: mean_cosine_distance(reference, embed(quantized, evaluation))
    return model, calibration, divergence, is_encoder_linear


def measure(
    model: nn.Module, config: ARCConfig, calibration: list, divergence: Callable, filter_fn: Any
) -> dict[str, Any]:
    """Quantize a copy and measure it."""
    quantized, start = copy.deepcopy(model), time.perf_counter()
    summary = quantize_(
        quantized,
        config,
        calibration_data=calibration,
        filter_fn=filter_fn,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    return {
        "divergence": divergence(quantized),
        "extra_channels": summary.extra_channels,
        "extra_multiply_adds": summary.extra_multiply_adds,
        "extra_bits": summary.extra_bits,
        "seconds": seconds,
        "trials": summary.trials[0],
        "choices": summary.choices,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shipped", help="'shipped', 'minilm' or an encoder")
    parser.add_argument("--part", choices=("dev", "heldout"), default="dev")
    parser.add_argument("--text", type=Path, help="text of an encoder, such as wiki.valid.tokens")
    parser.add_argument("--extra-bits", type=float, nargs="+", default=[0.14, 0.25])
    parser.add_argument("--budget", type=float, default=0.10, help="extra multiply-adds (0.10)")
    parser.add_argument("--rows", nargs="+", help="only rows whose names contain one of these")
    args = parser.parse_args(argv)
    if (args.model == "shipped") != (args.text is None):
        parser.error("--text goes with an encoder, and an encoder needs it")
    case = language_model(args.part) if args.text is None else encoder(args.model, args.text)
    found: dict[str, dict[str, Any]] = {}
    for name, config in rows(args.extra_bits, args.budget).items():
        if name != PLAIN and args.rows and not any(part in name for part in args.rows):
            continue
        row = found[name] = measure(case[0], config, *case[1:])
        row["closed"] = 1 - row["divergence"] / found[PLAIN]["divergence"]
        print(
            f"{name:30s} {row['divergence']:.5f}  {row['closed']:6.1%} closed  "
            f"{row['extra_multiply_adds']:6.1%} multiply-adds  {row['extra_bits']:+.3f} bits  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    print(json.dumps({"benchmark": "budget_search", **run_header(args), "rows": found}))


if __name__ == "__main__":
    main()
