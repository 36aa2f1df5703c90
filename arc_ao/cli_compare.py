"""The commands that look at models: eval, report, explain."""

import argparse
import json
from pathlib import Path
from typing import Any

from arc_ao.cli_arguments import add_command, add_trust, at_least, console
from arc_ao.cli_report import report_page, require_original_or_html


def add_eval(commands: Any) -> None:
    """Add the command."""
    evaluate = add_command(commands, "eval", _eval, "perplexity, KL, lm-eval tasks")
    evaluate.add_argument(
        "model", type=Path, help="model directory, quantized or not, or GGUF file"
    )
    evaluate.add_argument("--original", type=Path, help="model to compare with, or GGUF file")
    evaluate.add_argument("--text", type=Path, help="text file; default: the shipped held-out text")
    evaluate.add_argument("--window", type=at_least(2), help="tokens per window")
    evaluate.add_argument("--max-tokens", type=at_least(2))
    evaluate.add_argument(
        "--tasks", nargs="+", default=[], help="local JSONL files, or lm-eval task names"
    )
    evaluate.add_argument("--include-path", help="folder with lm-eval YAML tasks")
    evaluate.add_argument("--limit", type=at_least(1), help="documents per task")
    evaluate.add_argument("--num-fewshot", type=at_least(0), default=0)
    evaluate.add_argument("--json", type=Path, help="write the figures here")
    add_trust(evaluate)


def add_report(commands: Any) -> None:
    """Add the command."""
    report = add_command(commands, "report", _report, "output SQNR, blocks and bits per layer")
    report.add_argument("model", type=Path, help="quantized model directory")
    report.add_argument(
        "against", type=Path, nargs="?", help="with --html: another one of the same original"
    )
    report.add_argument("--original", type=Path, help="the model before, or GGUF file")
    report.add_argument("--text", type=Path, help="text file; default: shipped texts")
    report.add_argument("--tokens", type=at_least(2), default=2048, help="for the layers (2048)")
    report.add_argument(
        "--html", type=Path, help="write one page here: outliers, SQNR, budget, quality, samples"
    )
    report.add_argument(
        "--quality-tokens",
        type=at_least(2),
        default=4096,
        metavar="N",
        help="with --html, for perplexity and KL (4096)",
    )
    report.add_argument(
        "--json", type=Path, help="write the rows here; with --html all that the page shows"
    )
    report.add_argument("--plot", type=Path, help="write a PNG here")
    add_trust(report)


def add_explain(commands: Any) -> None:
    """Add the command."""
    explain = add_command(commands, "explain", _explain, "what the compiler made of a model")
    explain.add_argument("model", type=Path, help="quantized model directory")
    explain.add_argument(
        "--tokens", type=at_least(1), default=32, help="length of the compiled input"
    )
    explain.add_argument("--graph", type=Path, help="write the graph after the passes here")
    explain.add_argument("--svg", type=Path, help="draw the flow between the large operators here")
    add_trust(explain)


def _eval(args: argparse.Namespace) -> None:
    from arc_ao.calibration.data import text_batches
    from arc_ao.eval.perplexity import evaluate_text, read_text
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.shipped import HELDOUT_TEXT
    from arc_ao.text_models import TRIED_TOKENS, require_causal, require_text_input

    text = read_text(args.text or HELDOUT_TEXT)
    trust = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer = load_model(args.model, **trust)
    require_causal(model)
    require_text_input(model, text_batches(tokenizer, text, max_tokens=TRIED_TOKENS))
    reference = None
    if args.original:
        reference, _ = load_model(args.original, with_tokenizer=False, **trust)
    figures: dict[str, Any] = {}
    if args.text or not args.tasks:
        metrics = evaluate_text(
            model,
            tokenizer,
            text,
            reference=reference,
            window=args.window,
            max_tokens=args.max_tokens,
        )
        figures["text"] = metrics.to_dict()
        for name, value in figures["text"].items():
            print(f"{name:14s} {'-' if value is None else value}")
    if args.tasks:
        from arc_ao.integrations.lm_eval import evaluate, format_results

        figures["lm_eval"] = evaluate(
            model,
            tokenizer,
            args.tasks,
            reference=reference,
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
        )
        console().print(format_results(figures["lm_eval"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _report(args: argparse.Namespace) -> None:
    require_original_or_html(args)
    if args.html:
        report_page(args)
        return
    from arc_ao.calibration.data import text_batches
    from arc_ao.eval.perplexity import read_text
    from arc_ao.eval.plot import plot_report
    from arc_ao.eval.report import format_report, layer_report, save_report
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.shipped import MIXED_TEXT
    from arc_ao.text_models import require_text_input

    text = read_text(args.text or MIXED_TEXT)
    trust = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer = load_model(args.model, **trust)
    original, _ = load_model(args.original, with_tokenizer=False, **trust)
    batches = text_batches(tokenizer, text, max_tokens=args.tokens)
    require_text_input(original, batches)
    rows = layer_report(model, original, batches)
    console().print(format_report(rows))
    if args.json:
        save_report(rows, args.json)
    if args.plot:
        plot_report(rows, args.plot)


def _explain(args: argparse.Namespace) -> None:
    import torch

    from arc_ao.inspect.explain import explain
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.text_models import require_text_input

    trust = args.trust_remote_code
    model, _ = load_model(args.model, with_tokenizer=False, trust_remote_code=trust)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
    ids = torch.arange(args.tokens)[None] % vocabulary
    require_text_input(model, [ids])
    explanation = explain(model, ids)
    print(explanation)
    if args.graph:
        args.graph.write_text(explanation.text)
    if args.svg:
        explanation.save_svg(args.svg)
