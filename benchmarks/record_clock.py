"""Progress of a record: rows as they finish, and how long the rest will take."""

import sys
from typing import Any

from record_store import Job


class Clock:
    """Prints a line for each finished row.

    Args:
        todo: rows to measure.
        seconds: of rows measured before, by model and method.
    """

    def __init__(self, todo: list[Job], seconds: dict[tuple[str, str], float]) -> None:
        self.todo, self.seconds = list(todo), dict(seconds)

    def remaining(self) -> float | None:
        """Seconds for what is left, from rows measured so far; None without any."""
        if not self.seconds:
            return None
        return sum(self._expected(job) for job in self.todo)

    def _expected(self, job: Job) -> float:
        known = self.seconds.get((job.model, job.method))
        if known is not None:
            return known
        alike = [s for (model, _), s in self.seconds.items() if model == job.model]
        alike = alike or list(self.seconds.values())
        return sum(alike) / len(alike)

    def done(self, row: dict[str, Any]) -> None:
        """Take a finished row off the list."""
        self.todo = [job for job in self.todo if job.key != row["key"]]
        if "seconds_total" in row and row["group"] != "reference":  # measured with the model
            self.seconds[row["model"], row["method"]] = row["seconds_total"]
        text = row["error"] or f"{row['seconds_total']:.0f} s"
        left = self.remaining()
        rest = "" if left is None else f", about {left / 60:.0f} min"
        name = f"{row['model']}, {row['method']}, seed {row['seed']}"
        print(f"{name}: {text}; {len(self.todo)} rows left{rest}", file=sys.stderr, flush=True)
