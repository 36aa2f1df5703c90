"""Task scores by EleutherAI's lm-evaluation-harness (`lm_eval`), from local files only.

A task is a JSONL file; its format is told by the keys of its first row:

    {"query", "choices", "gold"}                  multiple choice, gold = index (llm-foundry)
    {"question", "choices", "answer"}             multiple choice, answer = index
    {"context_options", "continuation", "gold"}   which context makes the continuation likelier
    {"context", "continuation"}                   greedy match and perplexity of the continuation
    {"text"}                                      word and byte perplexity of whole documents

or the name of an lm-eval task from a folder of YAML files. Rows become prompts as follows: a
`question`, and a `query` that says "Question:", is followed by "\\nAnswer:" (as in llm-foundry's
own task lists); choices and continuations follow after one space. `lm_eval` is imported when first
used.
"""

import copy
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table
from torch import nn

from arc_ao.eval.perplexity import read_jsonl
from arc_ao.inference import evaluation_mode

Row = dict[str, Any]
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
        task_format, rows = _read_task(path)
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


def _read_task(path: Path) -> tuple["_Format", list[Row]]:
    """The format of a JSONL file and its rows, checked and in lm-eval's form."""
    rows = read_jsonl(path)
    keys = set(rows[0][1])
    task_format = next((f for f in _FORMATS if keys.issuperset(f.keys)), None)
    if task_format is None:
        accepted = " or ".join("{" + ", ".join(f.keys) + "}" for f in _FORMATS)
        raise ValueError(f"{path}: unknown task format: keys {sorted(keys)}, expected {accepted}")
    converted = []
    for line, row in rows:
        try:
            converted.append(task_format.convert(row))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from None
    return task_format, converted


def _string(row: Row, key: str) -> str:
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f"{key}: expected a string with text, got {row.get(key)!r}")
    return row[key]


def _options(row: Row, key: str, gold_key: str) -> tuple[list[str], int]:
    """The strings under `key` and the index of the right one under `gold_key`."""
    options, gold = row.get(key), row.get(gold_key)
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError(f"{key}: expected a list of 2 or more strings, got {options!r}")
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise ValueError(f"{key}: expected strings with text, got {options!r}")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"{gold_key}: expected an index of {key}, got {gold!r}")
    return options, gold


def _query_row(row: Row) -> Row:
    query = _string(row, "query")
    prompt = f"{query.rstrip()}\nAnswer:" if "Question:" in query else query
    choices, gold = _options(row, "choices", "gold")
    return {"prompt": prompt, "choices": choices, "gold": gold}


def _question_row(row: Row) -> Row:
    prompt = f"Question: {_string(row, 'question').strip()}\nAnswer:"
    choices, gold = _options(row, "choices", "answer")
    return {"prompt": prompt, "choices": choices, "gold": gold}


def _schema_row(row: Row) -> Row:
    contexts, gold = _options(row, "context_options", "gold")
    return {"contexts": contexts, "continuation": _string(row, "continuation"), "gold": gold}


def _continuation_row(row: Row) -> Row:
    # lm-eval puts no delimiter before the target of a "loglikelihood" task.
    continuation = " " + _string(row, "continuation").lstrip()
    return {"context": _string(row, "context").rstrip(), "continuation": continuation}


def _text_row(row: Row) -> Row:
    return {"text": _string(row, "text")}


def _metric_list(higher_is_better: bool, **aggregations: str) -> list[dict[str, Any]]:
    return [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}
        for metric, aggregation in aggregations.items()
    ]


@dataclass(frozen=True)
class _Format:
    keys: tuple[str, ...]
    convert: Callable[[Row], Row]  # one row of the file to one of lm-eval; ValueError if bad
    config: dict[str, Any]  # the fields of lm-eval's TaskConfig


_MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": _metric_list(True, acc="mean", acc_norm="mean"),
}
# lm-eval reads a task whose text is an index as one of several contexts for the same target.
_SCHEMA = {
    "output_type": "multiple_choice",
    "doc_to_text": "gold",
    "doc_to_choice": "contexts",
    "doc_to_target": "continuation",
    "metric_list": _metric_list(True, acc="mean"),
}
_CONTINUATION = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": "continuation",
    "target_delimiter": "",
    "metric_list": _metric_list(True, acc="mean") + _metric_list(False, perplexity="perplexity"),
}
_TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "num_fewshot": 0,  # lm-eval leaves a 0 as it is
    "metric_list": _metric_list(
        False,
        word_perplexity="weighted_perplexity",
        byte_perplexity="weighted_perplexity",
        bits_per_byte="bits_per_byte",
    ),
}
_FORMATS = (
    _Format(("query", "choices", "gold"), _query_row, _MULTIPLE_CHOICE),
    _Format(("question", "choices", "answer"), _question_row, _MULTIPLE_CHOICE),
    _Format(("context_options", "continuation", "gold"), _schema_row, _SCHEMA),
    _Format(("context", "continuation"), _continuation_row, _CONTINUATION),
    _Format(("text",), _text_row, _TEXT),
)
