"""Rows of the record put together: one line for each model and method, over its seeds."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

REAL_NAMES = ("smollm2", "qwen-coder")  # of real_models.py; what the record leads with
NAMES = (*REAL_NAMES, "encoder", "shipped", "stories260K", "qwen3")
PRIMARY = {  # what a method is judged by: divergence from the unquantized model
    "decoder": ("wikitext2/mean_kl", "books/mean_kl"),
    "encoder": ("wiki lines/one_minus_cosine",),
}
COSTS = ("extra_channels", "extra_bits", "extra_multiply_adds")


def primary(model: str) -> tuple[str, ...]:
    """Names of the divergences of a model."""
    return PRIMARY["encoder" if model == "encoder" else "decoder"]


@dataclass
class Line:
    """A method on a model.

    Attributes:
        values: figure -> one value a seed; "text/metric", "sqnr/kind", the costs, "cpu_seconds".
        windows: figure -> one list a seed, with a value for each evaluation window.
        commits: of the code that measured the rows.
        tasks: lm-eval task -> accuracy, standard error and number of rows.
        errors: of seeds that failed.
    """

    method: str
    group: str
    values: dict[str, list[float]] = field(default_factory=dict)
    windows: dict[str, list[list[float]]] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether any seed was measured."""
        return bool(self.values)

    def mean(self, figure: str) -> float | None:
        """Over seeds; None where it was not measured."""
        found = self.values.get(figure)
        return statistics.fmean(found) if found else None

    def half_range(self, figure: str) -> float | None:
        """Half of largest less smallest over seeds; None for less than two."""
        found = self.values.get(figure, [])
        return (max(found) - min(found)) / 2 if len(found) > 1 else None

    def add(self, row: dict[str, Any]) -> None:
        """Take one more seed."""
        if row["error"]:
            self.errors.append(f"seed {row['seed']}: {row['error']}")
            return
        if row["commit"]:
            self.commits.add(row["commit"])
        figures = {f"sqnr/{kind}": value for kind, value in row.get("sqnr_db", {}).items()}
        for text, metrics in row.get("metrics", {}).items():
            figures |= {f"{text}/{name}": value for name, value in metrics.items()}
        figures |= {k: row.get("cost", {}).get(k) for k in COSTS}
        figures["cpu_seconds"] = row.get("cpu_seconds")
        for name, value in figures.items():
            if isinstance(value, list):
                self.windows.setdefault(name, []).append(value)
            elif value is not None:
                self.values.setdefault(name, []).append(value)
        self.tasks |= row.get("tasks", {})


def lines_by_model(rows: list[dict[str, Any]]) -> dict[str, dict[str, Line]]:
    """Model -> method -> its line, in the order of the rows."""
    found: dict[str, dict[str, Line]] = {}
    for row in rows:
        lines = found.setdefault(row["model"], {})
        lines.setdefault(row["method"], Line(row["method"], row["group"])).add(row)
    return found


def closed(line: Line, plain: Line | None, figure: str) -> float | None:
    """Share of plain NVFP4's divergence that a method removes, of means over seeds."""
    value = line.mean(figure)
    base = plain.mean(figure) if plain else None
    return None if value is None or not base else 1 - value / base


def paired(a: Line, b: Line, text: str) -> tuple[float, float] | None:
    """Mean KL of `a` less that of `b` on the same windows of a text, and its standard error.

    Seeds are averaged first: the error is that of the choice of text. None where either kept no
    windows, other ones, or less than two.
    """
    figure = f"{text}/window_kl"
    means = [
        [statistics.fmean(window) for window in zip(*seeds, strict=True)]
        for line in (a, b)
        if (seeds := line.windows.get(figure))
    ]
    if len(means) < 2 or len(means[0]) != len(means[1]) or len(means[0]) < 2:
        return None
    differences = [x - y for x, y in zip(*means, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error
