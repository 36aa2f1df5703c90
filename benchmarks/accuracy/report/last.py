"""Rows of the last record: a partial run keeps what it does not measure anew.

A method on a model is either measured by this run or taken whole, with all its seeds, from
accuracy.json, and only if weights and protocol are the same. Each line of the report names the
commits that measured it.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report.table import REAL_NAMES

Row = dict[str, Any]


def read_record(output: Path) -> dict[str, Any]:
    """accuracy.json in a folder; {"rows": []} where there is none."""
    path = output / "accuracy.json"
    if not path.is_file():
        return {"rows": []}
    return json.loads(path.read_text(encoding="utf-8"))


def with_last(
    rows: list[Row], last: dict[str, Any], header: dict[str, Any], methods: set[str]
) -> list[Row]:
    """Rows of this run, measured or not, with those of the last record that they lack.

    Args:
        header: of this run: "settings" and "real_settings" tell its protocol.
        methods: that the record knows; other rows are kept only for models that are absent now.
    """
    measured = {_line(row) for row in rows if row["commit"]}
    weights = {row["model"]: row["settings"]["weights"] for row in rows}
    kept: dict[tuple[str, str], list[Row]] = {}
    for row in last["rows"]:
        present = row["model"] in weights
        known = row["method"] in methods and row["weights"] == weights.get(row["model"])
        same = _protocol(row, last) == _protocol(row, header)
        if _line(row) not in measured and same and (known or not present):
            kept.setdefault(_line(row), []).append(row)
    found = [row for row in rows if _line(row) not in kept]
    return found + [row for line in kept.values() for row in line]


def _line(row: Row) -> tuple[str, str]:
    return row["model"], row["method"]


def _protocol(row: Row, header: dict[str, Any]) -> Any:
    return header.get("real_settings" if row["model"] in REAL_NAMES else "settings")
