"""Progress of a record: rows as they finish, and how long the rest will take."""

import sys
from typing import Any

from benchmarks.accuracy.store import Job


class Clock:
    """Prints a line for each finished row.

    Args:
        todo: rows to measure.
        known: rows measured before, this record's or the last one's.
    """

    def __init__(self, todo: list[Job], known: list[dict[str, Any]]) -> None:
        self.todo = list(todo)
        self.seconds: dict[tuple[str, str, str], float] = {}
        for row in known:
            self._take(row)

    def remaining(self) -> float | None:
        """Seconds for what is left, from rows measured so far; None without any."""
        if not self.seconds:
            return None
        return sum(self._expected(job) for job in self.todo)

    def _expected(self, job: Job) -> float:
        task = job.settings.get("task", "")
        known = self.seconds.get((job.model, job.method, task))
        if known is not None:
            return known
        alike = [s for (m, _, t), s in self.seconds.items() if (m, t) == (job.model, task)]
        alike = alike or [s for (m, _, _), s in self.seconds.items() if m == job.model]
        alike = alike or list(self.seconds.values())
        return sum(alike) / len(alike)

    def _take(self, row: dict[str, Any]) -> None:
        if "seconds_total" in row and row["group"] != "reference":  # measured with the model
            key = row["model"], row["method"], row.get("task", "")
            self.seconds[key] = row["seconds_total"]

    def done(self, row: dict[str, Any]) -> None:
        """Take a finished row off the list."""
        self.todo = [job for job in self.todo if job.key != row["key"]]
        self._take(row)
        text = row["error"] or f"{row['seconds_total']:.0f} s"
        left = self.remaining()
        rest = "" if left is None else f", about {left / 60:.0f} min"
        name = f"{row['model']}, {row['method']}, {row.get('task') or 'seed ' + str(row['seed'])}"
        print(f"{name}: {text}; {len(self.todo)} rows left{rest}", file=sys.stderr, flush=True)
