"""The accuracy record: models x methods x budgets, written to results/accuracy.md.

    python -m benchmarks.accuracy.record --data DIR --work DIR [--peers]
    python -m benchmarks.accuracy.record --data DIR --work DIR --models smollm2 --seeds 1 --no-tasks

Every row is written to --work as soon as it is measured; the same command goes on where an
interrupted one stopped, and several processes may share the folder (--models). A row that fails is
listed with its error and tried again by the next run. The report, accuracy.md and accuracy.json in
--output, is made from the rows alone (--report-only); what was not measured is taken from the last
accuracy.json there, if weights and protocol are the same (report/last.py). DIR is described in
texts.py, real models in real_subjects.py: their packages are downloaded only if they are among
--models. Of a real model, other rows than its usual ones run where --methods names them.
"""

import argparse
import dataclasses
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from arc_ao.env import env_report
from benchmarks.accuracy import peers
from benchmarks.accuracy.clock import Clock
from benchmarks.accuracy.methods import REFERENCE, all_rows, real_rows
from benchmarks.accuracy.plan import chosen, jobs, selected
from benchmarks.accuracy.real_subjects import (
    RealSettings,
    RealSubject,
    load_real,
    locate,
    seconds_per_token,
    task_tokens,
)
from benchmarks.accuracy.report.claims import Claim, claims
from benchmarks.accuracy.report.last import read_record, with_last
from benchmarks.accuracy.report.markdown import build_report, to_json
from benchmarks.accuracy.report.table import NAMES, REAL_NAMES
from benchmarks.accuracy.store import Job, Store, code_commit
from benchmarks.accuracy.subjects import Settings, Subject, directories, load_subject
from benchmarks.accuracy.texts import TASKS, data_checks
from benchmarks.common.checkout import ROOT

RESULTS = ROOT / "benchmarks" / "results"
QWEN = ROOT / "benchmarks" / "models" / "tiny_qwen3"
QUANTIZED_SHARE = 1.6  # time of a quantized eager forward over one in bf16


def run_model_rows(
    name: str,
    directory: Path,
    todo: list[Job],
    store: Store,
    settings: Settings | RealSettings,
    clock: Clock,
) -> None:
    """Load a model once and measure its unfinished rows."""
    try:
        if isinstance(settings, RealSettings):
            subject = load_real(name, directory, settings)
            reference = None  # nothing is kept of it
            print_task_estimate(subject, [job.settings["task"] for job in todo if _is_task(job)])
        else:
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


def print_task_estimate(subject: RealSubject, tasks: list[str]) -> None:
    """How long the lm-eval tasks of these rows take, by one forward of the unquantized model."""
    if not tasks:
        return
    files = {task: subject.settings.data / TASKS / f"{task}.jsonl" for task in set(tasks)}
    tokens = {task: task_tokens(subject.tokenizer, path) for task, path in files.items()}
    seconds = seconds_per_token(subject) * QUANTIZED_SHARE * sum(tokens[task] for task in tasks)
    print(
        f"{subject.name}: {len(tasks)} rows of tasks, {sum(tokens.values()):,} tokens for each "
        f"method, about {seconds / 3600:.1f} CPU hours in all (--no-tasks leaves them out)",
        file=sys.stderr,
        flush=True,
    )


def _is_task(job: Job) -> bool:
    return job.group == "tasks"


def _measure(subject: Subject, job: Job, reference: dict | None, folder: Path) -> dict[str, Any]:
    if _is_task(job):
        row = None if job.method == REFERENCE else _row(job)
        return subject.measure_task(row, job.seed, job.settings["task"])
    if job.group == "reference":
        dtype = str(subject.model.dtype).removeprefix("torch.")
        result = {"metrics": reference or subject.measure_reference(), "dtype": dtype}
        return result | (subject.tasks(subject.model) if job.with_tasks else {})
    if job.group == "peer":
        return peers.measure(subject, job.method, job.seed, folder / "peers" / job.model)
    return subject.measure(_row(job), job.seed, job.with_tasks)


def _row(job: Job) -> Any:
    return (all_rows() | real_rows())[job.method]


def _message(error: Exception) -> str:
    """Type and last line of an error, as the report lists it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="texts, see texts.py")
    parser.add_argument("--smollm2", type=Path, help="folder or GGUF; default: its package")
    parser.add_argument("--qwen-coder", type=Path, help="folder or GGUF; default: its package")
    parser.add_argument("--cache", type=Path, help="of the packages' GGUF files: ARC_AO_CACHE")
    parser.add_argument("--stories", type=Path, help="default: DATA/stories260K_hf")
    parser.add_argument("--qwen", type=Path, default=QWEN)
    parser.add_argument("--work", type=Path, default=Path("accuracy_work"), help="finished rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--methods", nargs="+", help="names of rows, * and ? stand for others")
    parser.add_argument("--seeds", type=int, default=3, help="for the main rows; others have one")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="of each text")
    parser.add_argument(
        "--real-tokens",
        type=int,
        default=RealSettings.tokens,
        help="of each text for real models, in windows of 2,048; 0: the whole text",
    )
    parser.add_argument(
        "--reference-gb",
        type=float,
        default=RealSettings.reference_bytes / 1e9,
        help="real models: room in --work for the unquantized logits, else computed for each row",
    )
    parser.add_argument("--calibration-tokens", type=int, default=Settings.calibration_tokens)
    parser.add_argument("--evaluation-lines", type=int, default=Settings.evaluation_lines)
    parser.add_argument("--task-limit", type=int, default=Settings.task_limit)
    parser.add_argument(
        "--all-tasks", action="store_true", help="tasks for every row; real models: every main row"
    )
    parser.add_argument(
        "--no-tasks", dest="tasks", action="store_false", help="of real models: hours for each row"
    )
    parser.add_argument("--peers", action="store_true", help="run other libraries' rows, too")
    parser.add_argument("--any-commit", action="store_true", help="take rows of other commits, too")
    parser.add_argument(
        "--drop-last", action="store_true", help="take no rows from the last record in --output"
    )
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check", action="store_true", help="exit with 1 unless all claims hold")
    args = parser.parse_args(argv)
    for path in (args.smollm2, args.qwen_coder):
        if path is not None and not path.exists():
            parser.error(f"expected a folder or GGUF file of a real model, found nothing at {path}")
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
    real = RealSettings(
        args.data, args.work, args.real_tokens, reference_bytes=args.reference_gb * 1e9
    )
    found = find_models(args)
    store = Store(args.work, code_commit(), args.any_commit)
    planned = selected(jobs(found, settings, real, args.seeds, args.all_tasks), store, args)
    last = {"rows": []} if args.drop_last else read_record(args.output)
    if not args.report_only:
        protocols = {name: real if name in REAL_NAMES else settings for name in NAMES}
        run(planned, found, store, protocols, args, last["rows"])
    env = env_report()
    header = {
        "versions": env["versions"],
        "cpu": env["cpu"]["model"],
        "threads": args.threads,
        "seeds": args.seeds,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "data"},
        "real_settings": real.evaluated(),
        "data_checks": data_checks(args.data, args.work),
    }
    methods = {REFERENCE, *all_rows(), *real_rows(), *peers.names()}
    rows = [store.load(job) or store.not_run(job) for job in planned]
    rows = with_last(rows, last, header, methods)
    header["absent_models"] = [n for n in NAMES if n not in {row["model"] for row in rows}]
    verdicts = claims(rows)
    write_report(rows, verdicts, header, args.output)
    passed = print_verdicts(verdicts)
    if args.check and not passed:
        raise SystemExit(1)


def find_models(args: argparse.Namespace) -> dict[str, Path | None]:
    """Where each model is, None where it is absent; downloads those of real models that run."""
    folders = {"smollm2": args.smollm2, "qwen-coder": args.qwen_coder}
    wanted = [] if args.report_only else args.models
    found = {n: locate(n, folders[n], args.cache, n in wanted) for n in REAL_NAMES}
    found |= directories(args.stories, args.qwen)
    return {name: found[name] for name in NAMES}


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
    protocols: dict[str, Settings | RealSettings],
    args: argparse.Namespace,
    last: list[dict[str, Any]],
) -> None:
    """Measure what is chosen and not finished; rows of `last` tell how long that takes."""
    todo = [job for job in planned if chosen(job, args) and not store.finished(job)]
    clock = Clock(todo, last + [row for job in planned if (row := store.load(job))])
    left = clock.remaining()
    rest = "" if left is None else f", about {left / 60:.0f} min"
    print(f"{len(todo)} rows to measure{rest}", file=sys.stderr, flush=True)
    for name, directory in found.items():
        mine = [job for job in todo if job.model == name]
        if mine:
            run_model_rows(name, directory, mine, store, protocols[name], clock)


if __name__ == "__main__":
    main()
