"""`arc-ao report --html`: one page about a quantized model, or two of one original."""

import argparse
from typing import Any

from arc_ao.cli_arguments import console


def require_original_or_html(args: argparse.Namespace) -> None:
    """Refuse what only a page can show.

    Raises:
        ValueError: no --original, or a second model, without --html.
    """
    if args.html is None and args.original is None:
        raise ValueError(
            "expected --original, the model before: SQNR compares with it; only a page (--html) "
            "has something to show without"
        )
    if args.html is None and args.against is not None:
        raise ValueError(
            f"expected --html with a second model, {args.against}: both are compared on a page"
        )


def report_page(args: argparse.Namespace) -> None:
    """Measure, print the layers, and write the page and the files asked for beside it."""
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.report_page.data import save_data
    from arc_ao.report_page.page import write_page

    data = _report_data(args)
    for folder in filter(None, (args.model, args.against)):
        trust = args.trust_remote_code
        model, _ = load_model(folder, with_tokenizer=False, trust_remote_code=trust)
        rows = data.add(folder, model)
        del model  # before the next one is loaded
        _show_rows(args, rows, first=folder == args.model)
    found = data.to_dict()
    write_page(found, args.html)
    if args.json:
        save_data(found, args.json)
    print(f"wrote {args.html}")


def _report_data(args: argparse.Namespace) -> Any:
    """What will be measured, and on which texts."""
    from arc_ao.checkpoints.model_files import load_tokenizer
    from arc_ao.eval.perplexity import read_text
    from arc_ao.integrations.huggingface import load_model
    from arc_ao.report_page.data import ReportData, Text
    from arc_ao.shipped import HELDOUT_TEXT, MIXED_TEXT

    trust = args.trust_remote_code
    original = None
    if args.original:
        original, _ = load_model(args.original, with_tokenizer=False, trust_remote_code=trust)
    layers, quality = args.text or MIXED_TEXT, args.text or HELDOUT_TEXT
    return ReportData(
        load_tokenizer(args.model, trust),
        Text(layers.name, read_text(layers), args.tokens),
        Text(quality.name, read_text(quality), args.quality_tokens),
        original=original,
        original_path=args.original or "",
    )


def _show_rows(args: argparse.Namespace, rows: list[Any], *, first: bool) -> None:
    from arc_ao.eval.plot import plot_report
    from arc_ao.eval.report import format_report

    if rows:
        console().print(format_report(rows))
    if rows and args.plot and first:
        plot_report(rows, args.plot)
