"""Which rows the record has: every one of every model whose files are there, and the filters."""

import argparse
import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.accuracy import peers
from benchmarks.accuracy.methods import (
    BEST,
    DEFAULT,
    PLAIN,
    REFERENCE,
    TUNED,
    all_rows,
    describe,
    is_seeded,
    quantized_rows,
    real_main_rows,
    real_rows,
)
from benchmarks.accuracy.real_subjects import RealSettings, task_names
from benchmarks.accuracy.report.table import REAL_NAMES
from benchmarks.accuracy.store import Job, Store
from benchmarks.accuracy.subjects import Settings, identity

REAL_TASK_ROWS = (REFERENCE, PLAIN, DEFAULT, BEST, TUNED)  # hours each


def jobs(
    found: dict[str, Path | None],
    settings: Settings,
    real: RealSettings,
    seeds: int,
    all_tasks: bool = False,
) -> list[Job]:
    """Every row of every model whose files are there, reference first; those of real models that
    run only if they are asked for are in group "optional"."""
    planned = []
    for name, path in found.items():
        if path is None:
            continue
        if name in REAL_NAMES:
            planned += _real_jobs(name, path, real, seeds, all_tasks)
        else:
            planned += _small_jobs(name, path, settings, seeds, all_tasks)
    return planned


def _small_jobs(
    name: str, path: Path, settings: Settings, seeds: int, all_tasks: bool
) -> list[Job]:
    evaluated = {k: v for k, v in dataclasses.asdict(settings).items() if k != "data"}
    shared = {"weights": identity(path), **evaluated}
    planned = [Job(name, REFERENCE, 0, "reference", shared, name != "encoder")]
    for method, row in all_rows().items():
        main = method in quantized_rows()
        tasks = name != "encoder" and (main or all_tasks)
        config = shared | {"config": describe(row)}
        for seed in range(seeds if main and is_seeded(row) else 1):
            group = "main" if main else "other"
            planned.append(Job(name, method, seed, group, config, tasks and seed == 0))
    return planned + [Job(name, method, 0, "peer", shared) for method in peers.names()]


def _real_jobs(
    name: str, path: Path, settings: RealSettings, seeds: int, all_tasks: bool
) -> list[Job]:
    """Tasks, which take longer than all else, are rows of their own, behind the first seed."""
    shared: dict[str, Any] = {"weights": identity(path), **settings.evaluated()}
    tasks = task_names(settings.data)
    planned = [Job(name, REFERENCE, 0, "reference", shared)]
    planned += [_task_job(planned[0], task) for task in tasks]
    usual = real_rows()
    for method, row in (usual | all_rows()).items():
        main = method in real_main_rows()
        group = "main" if main else "other" if method in usual else "optional"
        config = shared | {"config": describe(row)}
        for seed in range(seeds if main and is_seeded(row) else 1):
            planned.append(Job(name, method, seed, group, config))
            if seed == 0 and (method in REAL_TASK_ROWS or (main and all_tasks)):
                planned += [_task_job(planned[-1], task) for task in tasks]
    return planned + [Job(name, method, 0, "peer", shared) for method in peers.names()]


def _task_job(job: Job, task: str) -> Job:
    """The row of one lm-eval task, in full, for the model of another row."""
    kept = ("weights", "calibration_window", "calibration_text", "config")
    settings = {k: v for k, v in job.settings.items() if k in kept}
    return dataclasses.replace(job, group="tasks", settings=settings | {"task": task})


def selected(planned: list[Job], store: Store, args: argparse.Namespace) -> list[Job]:
    """Without the optional rows that were neither asked for nor measured."""
    return [
        job
        for job in planned
        if job.group != "optional" or store.load(job) or (args.methods and chosen(job, args))
    ]


def chosen(job: Job, args: argparse.Namespace) -> bool:
    """Whether the filters let a row run."""
    if job.model not in args.models or (job.group == "peer" and not args.peers):
        return False
    if job.group == "tasks" and not args.tasks:
        return False
    patterns = args.methods
    return not patterns or any(fnmatch.fnmatchcase(job.method, p) for p in patterns)
