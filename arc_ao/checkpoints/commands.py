"""Commands on NVFP4 checkpoints of any library: export, import, check, compare."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arc_ao.cli_arguments import add_command, add_trust, at_least, console
from arc_ao.output_folder import check_output

FORMATS = ("compressed-tensors", "modelopt", "gguf")


def add_commands(commands: Any) -> None:
    """Add the four commands."""
    export = add_command(commands, "export", _export, "write a form that other engines load")
    export.add_argument("model", type=Path, help="model directory, quantized with --exportable")
    export.add_argument("-o", "--output", type=Path, required=True, help="new directory")
    export.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    export.add_argument(
        "--calib",
        type=Path,
        help="text for the scales of inputs, which gguf does not have; default: a shipped text",
    )
    export.add_argument("--calib-tokens", type=at_least(2), default=16_384, metavar="N")
    add_trust(export)
    importing = add_command(
        commands, "import", _import, "read an NVFP4 checkpoint of another library"
    )
    importing.add_argument("checkpoint", type=Path, help="compressed-tensors or ModelOpt directory")
    importing.add_argument("-o", "--output", type=Path, required=True, help="new directory")
    importing.add_argument(
        "--no-residuals", action="store_true", help="the base of our own export alone"
    )
    importing.add_argument(
        "--activation-scale",
        choices=("token", "static"),
        help="outer scales of activations; default: as the checkpoint has it",
    )
    check = add_command(commands, "check", _check, "what is wrong with an NVFP4 checkpoint")
    check.add_argument("checkpoint", type=Path, help="compressed-tensors or ModelOpt directory")
    check.add_argument(
        "--tp",
        type=_ranks,
        default=(1,),
        metavar="1,2,4",
        help="numbers of ranks that must be able to share the layers",
    )
    check.add_argument("--json", type=Path, help="write the complaints here")
    compare = add_command(commands, "compare", _compare, "two NVFP4 checkpoints, layer by layer")
    compare.add_argument("a", type=Path, help="compressed-tensors or ModelOpt directory")
    compare.add_argument("b", type=Path, help="another one of the same model")
    compare.add_argument("--json", type=Path, help="write the rows here")


def _ranks(text: str) -> tuple[int, ...]:
    """Numbers between commas."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _export(args: argparse.Namespace) -> None:
    from arc_ao.calibration.data import text_batches
    from arc_ao.checkpoints import gguf
    from arc_ao.checkpoints.export import export_checkpoint
    from arc_ao.eval.perplexity import read_text
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.shipped import MIXED_TEXT
    from arc_ao.text_models import calibration_window

    check_output(args.output)
    model, tokenizer = load_model(args.model, trust_remote_code=args.trust_remote_code)
    batches = None
    if args.format != gguf.METHOD:
        text = read_text(args.calib or MIXED_TEXT)
        window = calibration_window(model)
        batches = text_batches(tokenizer, text, window=window, max_tokens=args.calib_tokens)
    export_checkpoint(
        model, args.output, args.format, tokenizer=tokenizer, calibration_data=batches
    )
    print(f"wrote {args.output}")


def _import(args: argparse.Namespace) -> None:
    from arc_ao.checkpoints.model_files import load_tokenizer
    from arc_ao.checkpoints.read import import_checkpoint
    from arc_ao.integrations.huggingface import save_pretrained
    from arc_ao.summary import SUMMARY, QuantizationSummary

    check_output(args.output)
    tokenizer = load_tokenizer(args.checkpoint)
    model = import_checkpoint(
        args.checkpoint,
        residuals=not args.no_residuals,
        activation_scale=args.activation_scale,
    )
    save_pretrained(model, args.output, tokenizer)
    summary = QuantizationSummary(**getattr(model, SUMMARY))
    print(summary)
    for name, reason in summary.skipped.items():
        print(f"{name}: {reason}")
    print(f"wrote {args.output}")


def _check(args: argparse.Namespace) -> None:
    """Exit status 1 where there is a complaint."""
    from arc_ao.checkpoints.linter import check_checkpoint, format_complaints

    complaints = check_checkpoint(args.checkpoint, args.tp)
    if args.json:
        rows = [complaint.to_dict() for complaint in complaints]
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    if complaints:
        print(format_complaints(complaints))
        sys.exit(1)
    print(f"{args.checkpoint}: no complaints")


def _compare(args: argparse.Namespace) -> None:
    from arc_ao.checkpoints.compare import compare_checkpoints, format_comparison

    comparison = compare_checkpoints(args.a, args.b)
    console().print(format_comparison(comparison))
    if args.json:
        args.json.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
