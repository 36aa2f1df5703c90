"""The family of W4A4 methods on single linears: output SQNR, and what each one costs.

    python -m benchmarks.layers.methods --imatrix Qwen3-4B.imatrix.dat --shipped --check
    python -m benchmarks.layers.methods --encoder minilm --text wiki.test.tokens --record FILE.json

All methods share one NVFP4 quantizer (1x16 weight blocks, one outer scale a token), one choice of
block scales (--weight-scale) and the same draws; SQNR is in dB over evaluation tokens. Problems are
CONSTRUCTED from the channel profiles of importance matrices, or the real linears of a model on a
text (problems.py). Every linear is a model of its own, so each has the budget of its row.
"one SVD" is a single decomposition after the scales that ARHQ has: the SVDQuant that the ARHQ paper
compares to. SVDQuant itself iterates, with the branch in its search of scales, and is stronger;
"ARHQ, iterated" does the same with ARHQ's decomposition.
Costs count what is added to plain NVFP4 (arc_ao/cost.py) at the shape measured; the low-rank ones
fall with out_features. W4A16 rows round weights only. MXFP4 and int4 rows are the formats alone
(formats.py).

--check tests the relations that the papers claim (relations.py). --record keeps the JSON
document, and as .md beside it the tables. The last line of stdout is that document.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from arc_ao import (
    ARCConfig,
    ARHQConfig,
    NVFP4Config,
    SERQConfig,
    SVDQuantConfig,
    quantize_,
)
from arc_ao.calibration.data import text_batches
from arc_ao.cost import extra_cost
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.shipped import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL
from benchmarks.accuracy.embeddings import model_directory, select_lines, tokenize
from benchmarks.common.checkout import commit
from benchmarks.common.headers import run_header
from benchmarks.layers.formats import format_rows
from benchmarks.layers.imatrix import read_imatrix
from benchmarks.layers.problems import BERT_KINDS, LLAMA_KINDS, Problem, constructed, of_model
from benchmarks.layers.relations import headings, markdown, relations, sentence, table_rows
from benchmarks.layers.sqnr import KINDS, sqnr_db

BUDGET = 0.1
Row = dict[str, Any]


def configs(weight_scale: str, channels: int) -> dict[str, ARCConfig]:
    """Config of every NVFP4 row for so many channels. ours: the default, which chooses its own
    block scales."""
    ws = {"weight_scale": weight_scale}
    fixed = ws | {"recipe": "balanced", "budget": BUDGET}
    salient = max(1, round(BUDGET * channels / BLOCK_SIZE)) * BLOCK_SIZE
    published = {"num_weight_channels": salient, "selection": "threshold"}
    w4a16 = ws | {"activation": "bf16"}
    return {
        "plain": NVFP4Config(**ws),
        "SERQ 10 %": SERQConfig(budget=BUDGET, **ws),
        "SERQ 10 %, published": SERQConfig(**published, **ws),
        "SERQ 10 %, not sorted": SERQConfig(budget=BUDGET, channel_order="none", **ws),
        "SERQ 10 %, not flattened": SERQConfig(budget=BUDGET, smooth="none", **ws),
        "ARC 10 %": ARCConfig(exchange_rate=0.0, **fixed),
        "smoothing + ARC 10 %": ARCConfig(exchange_rate=0.0, smooth="search", **fixed),
        "both residuals 10 %": ARCConfig(**fixed),
        "ours 10 %": ARCConfig(budget=BUDGET),
        "smoothing": ARCConfig(budget=0.0, recipe="balanced", smooth="search", **ws),
        "AWQ": ARCConfig(budget=0.0, recipe="balanced", smooth="awq", **ws),
        "AWQ + both residuals 10 %": ARCConfig(smooth="awq", **fixed),
        "plain, W4A16": NVFP4Config(**w4a16),
        "AWQ, W4A16": NVFP4Config(smooth="awq", **w4a16),
        "SVDQuant r32": SVDQuantConfig(rank=32, **ws),
        "SVDQuant r128": SVDQuantConfig(rank=128, **ws),
        "one SVD r32": SVDQuantConfig(rank=32, branch_iterations=0, **ws),
        "one SVD r128": SVDQuantConfig(rank=128, branch_iterations=0, **ws),
        "ARHQ r32": ARHQConfig(rank=32, **ws),
        "ARHQ r128": ARHQConfig(rank=128, **ws),
        "ARHQ r32, iterated": ARHQConfig(rank=32, branch_iterations=100, **ws),
        "ARHQ r128, iterated": ARHQConfig(rank=128, branch_iterations=100, **ws),
        "one SVD r128, raw": SVDQuantConfig(rank=128, branch_iterations=0, smooth="none", **ws),
        "ARHQ r128, raw": ARHQConfig(rank=128, smooth="none", **ws),
        "Hadamard 16": NVFP4Config(rotation=16, **ws),
        "Hadamard 128": NVFP4Config(rotation=128, **ws),
    }


@torch.no_grad()
def nvfp4_row(problem: Problem, config: ARCConfig) -> Row:
    """Quantize a linear, and compare its output."""
    linear = nn.Linear(*reversed(problem.weight.shape), bias=False)
    linear.weight = nn.Parameter(problem.weight.clone())
    model = nn.Sequential(linear)
    start = time.perf_counter()
    quantize_(model, config, calibration_data=[problem.calibration], progress=False)
    seconds = time.perf_counter() - start
    x = problem.evaluation
    cost = extra_cost([model[0].weight])
    return {
        "sqnr_db": sqnr_db(x @ problem.weight.t(), model(x)),
        "extra_bits": cost.bits_per_weight,
        "extra_multiply_adds": cost.multiply_adds,
        "quantize_seconds": seconds,
    }


def measure(problem: Problem, weight_scale: str) -> dict[str, Row]:
    """Every row on one problem."""
    rows = {}
    for name, config in configs(weight_scale, problem.weight.shape[1]).items():
        rows[name] = nvfp4_row(problem, config)
        print(f"  {name}: {rows[name]['sqnr_db']:.2f} dB", file=sys.stderr, flush=True)
    return rows | format_rows(problem, BUDGET)


def print_table(by_kind: dict[str, list[dict[str, Row]]], title: str) -> None:
    """Rows by kind of layer, and what they cost on the mean."""
    table = Table(title=title)
    for heading in headings(by_kind):
        table.add_column(heading, justify="right" if heading else "left")
    for row in table_rows(by_kind):
        table.add_row(*row)
    Console(width=110).print(table)


def shipped_problems(every: int, tokens: int) -> list[Problem]:
    """Linears of the shipped Llama on its own texts."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    texts = [path.read_text() for path in (CALIBRATION_TEXT, HELDOUT_TEXT)]
    data = [text_batches(tokenizer, text, max_tokens=tokens) for text in texts]
    run = [lambda batches=batches: [model(b) for b in batches] for batches in data]
    return of_model(model, LLAMA_KINDS, tuple(run), every)


def encoder_problems(name: str, text: Path, every: int, tokens: int) -> list[Problem]:
    """Linears of an encoder on lines of a text, at most `tokens` tokens of each split."""
    directory = model_directory(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    lines = select_lines(text.read_text(encoding="utf-8"), 64, 128)
    batches = [tokenize(tokenizer, part)[: max(1, tokens // 2048)] for part in lines]
    run = [lambda some=some: [model(**b) for b in some] for some in batches]
    return of_model(model, BERT_KINDS, tuple(run), every)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imatrix", type=Path, action="append", default=[])
    parser.add_argument("--shipped", action="store_true", help="the shipped model's linears")
    parser.add_argument("--encoder", help="'minilm' or a model directory; needs --text")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--every", type=int, default=18, help="take every n-th constructed layer")
    parser.add_argument(
        "--every-real", type=int, default=2, help="take every n-th layer of a model"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="for calibration and evaluation")
    parser.add_argument("--out-features", type=int, default=512)
    parser.add_argument("--max-channels", type=int, help="of constructed problems; default: all")
    parser.add_argument("--weights", choices=("gaussian", "balanced"), default="gaussian")
    parser.add_argument("--common", type=float, default=0.0, help="variance in common factors")
    parser.add_argument("--weight-scale", choices=("amax", "mse"), default="amax")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="write the document to this .json, and a .md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a relation fails")
    args = parser.parse_args(argv)
    if not (args.imatrix or args.shipped or args.encoder):
        parser.error("nothing to measure: pass --imatrix FILE, --shipped or --encoder")
    if args.encoder and (args.text is None or not args.text.is_file()):
        parser.error(f"--encoder needs --text, a UTF-8 text file with long lines; got {args.text}")
    return args


def sources(args: argparse.Namespace) -> dict[str, list[Problem]]:
    """Title -> problems."""
    found = {}
    for path in args.imatrix:
        problems = constructed(
            read_imatrix(path),
            kinds=args.kinds,
            every=args.every,
            tokens=args.tokens,
            out_features=args.out_features,
            max_channels=args.max_channels,
            weights=args.weights,
            common=args.common,
            generator=torch.Generator().manual_seed(args.seed),
        )
        found[f"{path.name} (constructed)"] = list(problems)
    if args.shipped:
        found["shipped Llama"] = shipped_problems(args.every_real, args.tokens)
    if args.encoder:
        found["encoder"] = encoder_problems(args.encoder, args.text, args.every_real, args.tokens)
    return {t: [p for p in problems if p.kind in args.kinds] for t, problems in found.items()}


def measure_all(problems: list[Problem], title: str, weight_scale: str) -> dict[str, Any]:
    """Shapes, rows and relations of the problems of one source, which are printed."""
    by_kind: dict[str, list[dict[str, Row]]] = {}
    shapes: dict[str, list[list[int]]] = {}
    for i, problem in enumerate(problems):
        print(f"{title}: linear {i + 1} of {len(problems)}", file=sys.stderr)
        by_kind.setdefault(problem.kind, []).append(measure(problem, weight_scale))
        shapes.setdefault(problem.kind, []).append(list(problem.weight.shape))
    print_table(by_kind, f"{title}: output SQNR in dB; cost over plain NVFP4")
    found = relations([rows for measured in by_kind.values() for rows in measured])
    for claim, relation in found.items():
        print(sentence(claim, relation))
    return {"shapes": shapes, "relations": found, "kinds": by_kind}


def without_folders(value: Any) -> Any:
    """File names instead of paths, which mean nothing on another machine; lists item by item."""
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, Path) or "/" in str(value) else value


def header(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """What was run, on which commit and versions."""
    command = ["python", "-m", __spec__.name, *(without_folders(a) for a in argv)]
    found = {"benchmark": "layer_methods", "commit": commit(), "command": shlex.join(command)}
    arguments = {name: without_folders(value) for name, value in vars(args).items()}
    return found | run_header(args) | {"arguments": arguments}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    document = header(args, sys.argv[1:] if argv is None else argv)
    document |= {"passed": True, "results": {}}
    for title, problems in sources(args).items():
        found = measure_all(problems, title, args.weight_scale)
        document["results"][title] = found
        document["passed"] &= all(r["holds"] for r in found["relations"].values())
        if args.record is not None:  # after every source
            args.record.write_text(json.dumps(document, indent=1, default=str) + "\n")
            args.record.with_suffix(".md").write_text(markdown(document))
    print(f"{'PASS' if document['passed'] else 'FAIL'}: relations of the papers")
    print(json.dumps(document, default=str))
    if args.check and not document["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
