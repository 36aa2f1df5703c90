"""What the commands of `arc-ao` share: their options, and where they print."""

import argparse
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """Parser of a command that `run` carries out."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    return parser


def add_trust(parser: argparse.ArgumentParser) -> None:
    """--trust-remote-code, of commands that load a model."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files of the model directory, for models that transformers lacks",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Parser of whole numbers of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return value

    return parse


def console() -> Any:
    """Wide enough for our tables, also where the output is a file."""
    from rich.console import Console

    return Console(width=max(100, Console().width))
