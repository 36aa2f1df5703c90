"""Acceptance lines: a measured value, its bound and the verdict."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """One acceptance line: `value` has to be at least or at most `bound`.

    `value` None: not measured in this run, or impossible here; `missing` says which.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    missing: str = "not measured"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.missing
        low = self.at_least is not None and self.value < self.at_least
        high = self.at_most is not None and self.value > self.at_most
        return "FAIL" if low or high else "PASS"

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "bound": self.bound,
            "verdict": self.verdict,
        }


def print_lines(lines: Iterable[Line]) -> None:
    """One row per acceptance line, the verdict first."""
    from rich.console import Console  # here: the GPU suite runs where torch may be all there is

    for line in lines:
        value = "" if line.value is None else f"{line.value:.3g}"
        text = f"{line.verdict:12} {line.name:58} {value:>7} (expected {line.bound})"
        Console(width=120, highlight=False, markup=False).print(text)


def all_passed(lines: Iterable[Line]) -> bool:
    """True unless a line failed; what was not measured does not fail."""
    return all(line.verdict != "FAIL" for line in lines)


def conclude(document: dict[str, Any], lines: list[Line], check: bool) -> int:
    """Print the acceptance lines, then the document with them as the last line of stdout; the exit
    code, 1 where one of them failed and `check` asks for it."""
    print_lines(lines)
    passed = all_passed(lines)
    documents = [line.document() for line in lines]
    print(json.dumps(document | {"acceptance": documents, "passed": passed}))
    return 1 if check and not passed else 0
