"""Rows of the accuracy record on disk: one JSON file for each, so that a run can stop and go on.

A row is identified by model (and its weights), method (and its settings), seed and what was
evaluated; the commit of the code that measured it is written beside. Processes may share a folder
as long as they work on different rows.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.checkout import commit

# What a row depends on; the report is made of rows that exist, and these commands are others.
MEASURING = ("arc_ao", "csrc", "benchmarks/accuracy", "benchmarks/peers")
NOT_MEASURING = ("report", "encoder.py", "budget_search.py", "model_bits.py")


@dataclass(frozen=True)
class Job:
    """One row to measure.

    Attributes:
        group: "reference", "main", "other", "optional", "peer" or "tasks".
        settings: JSON of everything that the figures depend on.
    """

    model: str
    method: str
    seed: int
    group: str
    settings: dict[str, Any] = field(hash=False)
    with_tasks: bool = False

    @property
    def key(self) -> str:
        """Identity of the row, 12 hexadecimal digits."""
        document = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(document.encode()).hexdigest()[:12]


class Store:
    """Finished rows of a folder.

    Args:
        commit: of the code that measures now.
        any_commit: also take rows that other commits measured.
    """

    def __init__(self, folder: Path, commit: str, any_commit: bool = False) -> None:
        self.folder, self.commit, self.any_commit = folder, commit, any_commit
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, job: Job) -> Path:
        """File of a row."""
        words = re.sub(r"[^a-z0-9]+", "_", f"{job.model} {job.method} s{job.seed}".lower())
        return self.folder / f"{words.strip('_')}-{job.key}.json"

    def load(self, job: Job) -> dict[str, Any] | None:
        """The row, None where it was not measured (by this commit)."""
        path = self.path(job)
        if not path.is_file():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        return row if self.any_commit or row["commit"] == self.commit else None

    def finished(self, job: Job) -> bool:
        """Whether a row need not run; one that failed runs again."""
        row = self.load(job)
        return row is not None and row["error"] is None

    def not_run(self, job: Job) -> dict[str, Any]:
        """What the report gets for a row that was not measured."""
        return {**_identity(job), "commit": None, "error": None}

    def save(self, job: Job, result: dict[str, Any], error: str | None) -> dict[str, Any]:
        """Write a row, whole or not at all."""
        row = {**_identity(job), "commit": self.commit, "error": error, **result}
        path = self.path(job)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(row, indent=1, default=str) + "\n", encoding="utf-8")
        temporary.replace(path)
        return row


def _identity(job: Job) -> dict[str, Any]:
    return {k: v for k, v in asdict(job).items() if k != "with_tasks"} | {"key": job.key}


def code_commit() -> str:
    """The last commit that touched what measures; "+changes" if files differ from it."""
    others = [f":(exclude)benchmarks/accuracy/{name}" for name in NOT_MEASURING]
    return commit([*MEASURING, *others])
