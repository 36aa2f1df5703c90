"""The accuracy record: models x methods x budgets, written by `accuracy.py --all`.

    python benchmarks/accuracy.py --all --data DIR --work DIR [--peers]

Every row is written to --work as soon as it is measured; the same command goes on where an
interrupted one stopped, and several processes may share the folder (--models). A row that fails is
listed with its error and tried again by the next run. The report, accuracy.md and accuracy.json in
--output, is made from the rows alone (--report-only). DIR is described in record_data.py.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import record_peers
import torch
from record_claims import Claim, claims
from record_clock import Clock
from record_data import data_checks
from record_methods import all_rows, describe, is_seeded, quantized_rows
from record_models import NAMES, Settings, Subject, directories, identity, load_subject
from record_report import build_report, to_json
from record_store import Job, Store, code_commit

from arc_ao.env import env_report

REFERENCE = "unquantized"
RESULTS = Path(__file__).parent / "results"
QWEN = Path(__file__).parent / "models" / "tiny_qwen3"


def jobs(
    found: dict[str, Path | None], settings: Settings, seeds: int, all_tasks: bool = False
) -> list[Job]:
    """Every row of every model whose files are there, reference first."""
    evaluated = {k: v for k, v in dataclasses.asdict(settings).items() if k != "data"}
    planned = []
    for name, directory in found.items():
        if directory is None:
            continue
        shared = {"weights": identity(directory), **evaluated}
        planned.append(Job(name, REFERENCE, 0, "reference", shared, name != "encoder"))
        for method, row in all_rows().items():
            main = method in quantized_rows()
            tasks = name != "encoder" and (main or all_tasks)
            config = shared | {"config": describe(row)}
            for seed in range(seeds if main and is_seeded(row) else 1):
                group = "main" if main else "other"
                planned.append(Job(name, method, seed, group, config, tasks and seed == 0))
        for method in record_peers.names():
            planned.append(Job(name, method, 0, "peer", shared))
    return planned


def chosen(job: Job, args: argparse.Namespace) -> bool:
    """Whether the filters let a row run."""
    if job.model not in args.models or (job.group == "peer" and not args.peers):
        return False
    patterns = args.methods
    return not patterns or any(fnmatch.fnmatchcase(job.method, p) for p in patterns)


def run_model_rows(
    name: str, directory: Path, todo: list[Job], store: Store, settings: Settings, clock: Clock
) -> None:
    """Load a model once and measure its unfinished rows."""
    try:
        subject = load_subject(name, directory, settings)
        reference = subject.measure_reference()
    except Exception as error:
        traceback.print_exc()
        for job in todo:
            clock.done(store.save(job, {}, _message(error)))
        return
    for job in todo:
        start = time.perf_counter()
        try:
            result, problem = _measure(subject, job, reference, store.folder), None
        except Exception as error:  # a row's failure is its result
            traceback.print_exc()
            result, problem = {}, _message(error)
        result["seconds_total"] = time.perf_counter() - start
        clock.done(store.save(job, result, problem))


def _measure(subject: Subject, job: Job, reference: dict, folder: Path) -> dict[str, Any]:
    if job.group == "reference":
        dtype = str(subject.model.dtype).removeprefix("torch.")
        result = {"metrics": reference, "dtype": dtype}
        return result | (subject.tasks(subject.model) if job.with_tasks else {})
    if job.group == "peer":
        return record_peers.measure(subject, job.method, job.seed, folder / "peers" / job.model)
    return subject.measure(all_rows()[job.method], job.seed, job.with_tasks)


def _message(error: Exception) -> str:
    """Type and last line of an error, as the report lists it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="accuracy.py --all", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="texts, see record_data.py")
    parser.add_argument("--stories", type=Path, help="default: DATA/stories260K_hf")
    parser.add_argument("--qwen", type=Path, default=QWEN)
    parser.add_argument("--work", type=Path, default=Path("accuracy_work"), help="finished rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--methods", nargs="+", help="names of rows, * and ? stand for others")
    parser.add_argument("--seeds", type=int, default=3, help="for the main rows; others have one")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="of each text")
    parser.add_argument("--calibration-tokens", type=int, default=Settings.calibration_tokens)
    parser.add_argument("--evaluation-lines", type=int, default=Settings.evaluation_lines)
    parser.add_argument("--task-limit", type=int, default=Settings.task_limit)
    parser.add_argument("--all-tasks", action="store_true", help="tasks for every row")
    parser.add_argument("--peers", action="store_true", help="run other libraries' rows, too")
    parser.add_argument("--any-commit", action="store_true", help="take rows of other commits, too")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all claims hold")
    args = parser.parse_args(argv)
    args.stories = args.stories or args.data / "stories260K_hf"
    if not args.data.is_dir():
        parser.error(f"--data: expected a folder of texts, got {args.data}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    settings = Settings(
        args.data,
        args.tokens,
        calibration_tokens=args.calibration_tokens,
        task_limit=args.task_limit,
        evaluation_lines=args.evaluation_lines,
    )
    found = directories(args.stories, args.qwen)
    store = Store(args.work, code_commit(), args.any_commit)
    planned = jobs(found, settings, args.seeds, args.all_tasks)
    if not args.report_only:
        run(planned, found, store, settings, args)
    rows = [store.load(job) or store.not_run(job) for job in planned]
    env = env_report()
    header = {
        "versions": env["versions"],
        "cpu": env["cpu"]["model"],
        "threads": args.threads,
        "seeds": args.seeds,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "data"},
        "absent_models": [name for name in NAMES if found[name] is None],
        "data_checks": data_checks(args.data, args.work),
    }
    verdicts = claims(rows)
    write_report(rows, verdicts, header, args.output)
    passed = print_verdicts(verdicts)
    if args.check and not passed:
        raise SystemExit(1)


def write_report(
    rows: list[dict[str, Any]], verdicts: list[Claim], header: dict[str, Any], output: Path
) -> None:
    """accuracy.md and accuracy.json."""
    markdown, document = build_report(rows, verdicts, header)
    output.mkdir(parents=True, exist_ok=True)
    (output / "accuracy.md").write_text(markdown, encoding="utf-8")
    (output / "accuracy.json").write_text(to_json(document), encoding="utf-8")


def print_verdicts(verdicts: list[Claim]) -> bool:
    """Print the claims; whether all that acceptance depends on hold."""
    wanted = [claim for claim in verdicts if claim["acceptance"]]
    for claim in wanted:
        print(f"{claim['verdict']}: {claim['claim']} ({claim['detail']})")
    found = [claim["verdict"] for claim in verdicts if not claim["acceptance"]]
    print(
        f"relations: {found.count('PASS')} hold, {found.count('FAIL')} do not, "
        f"{found.count('NOT MEASURED')} not measured"
    )
    return all(claim["verdict"] == "PASS" for claim in wanted)


def run(
    planned: list[Job],
    found: dict[str, Path | None],
    store: Store,
    settings: Settings,
    args: argparse.Namespace,
) -> None:
    """Measure what is chosen and not finished."""
    todo = [job for job in planned if chosen(job, args) and not store.finished(job)]
    known = _last_record(args.output) + [row for job in planned if (row := store.load(job))]
    timed = [row for row in known if "seconds_total" in row and row["group"] != "reference"]
    clock = Clock(todo, {(r["model"], r["method"]): r["seconds_total"] for r in timed})
    left = clock.remaining()
    rest = "" if left is None else f", about {left / 60:.0f} min"
    print(f"{len(todo)} rows to measure{rest}", file=sys.stderr, flush=True)
    for name, directory in found.items():
        mine = [job for job in todo if job.model == name]
        if mine:
            run_model_rows(name, directory, mine, store, settings, clock)


def _last_record(output: Path) -> list[dict[str, Any]]:
    """Rows of the record that will be replaced: they tell how long rows take."""
    path = output / "accuracy.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
