"""Task formats of local JSONL files, told by the keys of the first row.

    {"query", "choices", "gold"}                  multiple choice, gold = index (llm-foundry)
    {"question", "choices", "answer"}             multiple choice, answer = index
    {"context_options", "continuation", "gold"}   which context makes the continuation likelier
    {"context", "continuation"}                   greedy match and perplexity of the continuation
    {"text"}                                      word and byte perplexity of whole documents

Rows become prompts as follows: a `question`, and a `query` that says "Question:", is followed by
"\\nAnswer:" (as in llm-foundry's own task lists); choices and continuations follow after one space.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arc_ao.eval.perplexity import read_jsonl

Row = dict[str, Any]


def read_task(path: Path) -> tuple["TaskFormat", list[Row]]:
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
class TaskFormat:
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
    TaskFormat(("query", "choices", "gold"), _query_row, _MULTIPLE_CHOICE),
    TaskFormat(("question", "choices", "answer"), _question_row, _MULTIPLE_CHOICE),
    TaskFormat(("context_options", "continuation", "gold"), _schema_row, _SCHEMA),
    TaskFormat(("context", "continuation"), _continuation_row, _CONTINUATION),
    TaskFormat(("text",), _text_row, _TEXT),
)
