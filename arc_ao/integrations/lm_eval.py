"""Task scores by EleutherAI's lm-evaluation-harness (`lm_eval`), from local files only.

Tasks are JSONL files in the formats of `jsonl_tasks`, or names of lm-eval tasks in a folder of YAML
files. `lm_eval` is imported when first used.
"""

import copy
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table
from torch import nn

from arc_ao.inference import evaluation_mode
from arc_ao.integrations.jsonl_tasks import read_task

Metrics = dict[str, dict[str, float]]  # task -> metric -> value

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_REMARKING_LOGGERS = ("lm_eval.api.task", "lm_eval.evaluator", "lm_eval.models.huggingface")
_REMARKS = (  # what lm-eval says of every model and task that is handed over in memory
    "Custom kwargs can be passed",
    "Overwriting default num_fewshot",
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    reference: nn.Module | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 4,
    max_length: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run lm-eval on a Hugging Face causal language model, and on its reference side by side.

    model, reference: models in memory, on their device; their train/eval mode is restored.
    tasks: JSONL files, and names of tasks in the YAML files under `include_path`.
    num_fewshot: solved examples before each question, drawn from the other rows of the file.
    limit: use the first `limit` rows of each task.
    max_length: tokens per input, by default that of the model's configuration.
    progress: show lm-eval's progress bars; otherwise what it writes to standard error is dropped
        (log handlers that are set up already keep their stream).

    Returns {"tasks": {task: {metric: value}}, "reference": the same or None, "n": {task: rows}}.
    Unless set already, the variables of `OFFLINE_VARIABLES` are set to 1 for this process: a YAML
    task that names a dataset on the Hugging Face hub needs HF_DATASETS_OFFLINE=0. lm-eval reseeds
    the random generators of Python, NumPy and torch. Under torchrun only local rank 0 has results.

    Raises ImportError without `lm_eval`; ValueError for a task that is neither a file nor a known
    name, a file in no known format (see `local_tasks`) or with no more than `num_fewshot` rows, or
    a tokenizer without BOS and EOS token.
    """
    lm_eval = _import_lm_eval()
    manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
    specs = _task_specs(tasks, manager.all_tasks, num_fewshot)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected a BOS or EOS token, lm-eval starts documents with it")

    def run(lm: nn.Module) -> dict[str, Any]:
        with _lent_to_lm_eval(lm), nullcontext() if progress else redirect_stderr(io.StringIO()):
            harness_model = lm_eval.models.huggingface.HFLM(
                pretrained=lm,
                tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a padding token
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
            )
            results = lm_eval.simple_evaluate(
                model=harness_model,
                tasks=specs,
                task_manager=manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        return results or {"results": {}, "n-samples": {}}  # None where the local rank is not 0

    reference_metrics = None if reference is None else _metrics(run(reference))
    results = run(model)
    return {
        "tasks": _metrics(results),
        "reference": reference_metrics,
        "n": {name: count["effective"] for name, count in results["n-samples"].items()},
    }


def local_tasks(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """lm-eval task configurations (for `simple_evaluate(tasks=...)`) of JSONL files.

    A task is named by its file without the suffix. Raises ImportError without `datasets`;
    ValueError naming the file, and the line if there is one, for a format that is not accepted, a
    bad row, or two files of the same name.
    """
    _import_lm_eval()  # sets the offline variables first
    import datasets

    tasks: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if path.stem in tasks:
            raise ValueError(f"{path}: another task is named {path.stem!r} already")
        task_format, rows = read_task(path)
        data = {"test": datasets.Dataset.from_list(rows)}
        tasks[path.stem] = {
            "task": path.stem,
            "custom_dataset": lambda data=data, **metadata: data,
            "test_split": "test",
            "fewshot_split": "test",  # lm-eval leaves out the row that is asked
            "metadata": {"version": 1.0},
            **copy.deepcopy(task_format.config),
        }
    return list(tasks.values())


def format_results(result: dict[str, Any]) -> Table:
    """A table of the result of `evaluate`: task, metric, reference, quantized, difference."""
    table = Table("task", "metric")
    for column in ("reference", "quantized", "difference"):
        table.add_column(column, justify="right")
    for task, metrics in result["tasks"].items():
        for metric, value in metrics.items():
            cells = ["-", _number(value), "-"]
            if result["reference"] is not None:
                reference = result["reference"][task][metric]
                cells = [_number(reference), _number(value), _number(value - reference, sign="+")]
            table.add_row(task, metric, *cells)
    return table


def _import_lm_eval() -> ModuleType:
    for name in OFFLINE_VARIABLES:  # `datasets` reads them when it is imported
        os.environ.setdefault(name, "1")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError("task evaluation needs lm-eval: pip install arc-ao[eval]") from error
    return lm_eval


@contextmanager
def _lent_to_lm_eval(model: nn.Module) -> Iterator[None]:
    """Protect the model from lm-eval, and the user from its remarks on models in memory.

    HFLM calls `model.tie_weights()`, which would put the floating point embedding back in the place
    of a quantized output layer. Weights that are tied in memory stay tied without the call.
    """
    loggers = [logging.getLogger(name) for name in _REMARKING_LOGGERS]
    model.tie_weights = lambda *args, **kwargs: None
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        with evaluation_mode(model):
            yield
    finally:
        del model.tie_weights
        for logger in loggers:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(remark in record.getMessage() for remark in _REMARKS)


def _task_specs(
    tasks: Sequence[str | Path], known: Sequence[str], num_fewshot: int
) -> list[str | dict[str, Any]]:
    """lm-eval's specification of each task, in order: a registered name or a configuration."""
    if not tasks:
        raise ValueError("tasks: expected at least one")
    for task in tasks:
        if str(task) not in known and not Path(task).is_file():
            raise ValueError(
                f"tasks: {str(task)!r} is neither a file nor a task in include_path "
                f"({', '.join(known) or 'no tasks there'})"
            )
    files = [task for task in tasks if str(task) not in known]
    configs = dict(zip(files, local_tasks(files), strict=True))
    for path, config in configs.items():
        rows = len(config["custom_dataset"]()["test"])
        if rows <= config.get("num_fewshot", num_fewshot):
            raise ValueError(f"num_fewshot: expected less than the {rows} rows of {path}")
    return [configs.get(task, str(task)) for task in tasks]


def _metrics(results: dict[str, Any]) -> Metrics:
    """{task: {metric: value}} from lm-eval's {task: {"metric,filter": value, ...}}."""
    metrics: Metrics = {}
    for task, values in results["results"].items():
        metrics[task] = {}
        for key, value in values.items():
            name, comma, filter_name = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(value, (int, float)):
                metrics[task][name if filter_name == "none" else key] = float(value)
    return metrics


def _number(value: float, sign: str = "") -> str:
    return format(value, f"{sign}.4f" if abs(value) < 1e5 else f"{sign}.4g")
