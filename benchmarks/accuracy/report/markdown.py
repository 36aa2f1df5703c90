"""The record as markdown and JSON, from its rows and claims alone."""

import json
from collections.abc import Callable
from typing import Any

from benchmarks.accuracy.methods import PLAIN
from benchmarks.accuracy.metrics import KINDS
from benchmarks.accuracy.report.real import ABOUT, table, task_table
from benchmarks.accuracy.report.table import NAMES, REAL_NAMES, Line, closed, lines_by_model

COST_COLUMNS = ("extra channels", "bits/weight", "multiply-adds")
SQNR_COLUMNS = tuple(f"{kind} dB" for kind in KINDS)
COLUMNS = {
    "real": tuple(f"{c} {t}" for t in ("wiki", "books") for c in ("ppl", "KL", "closed", "top-1")),
    "decoder": ("ppl wiki", "KL wiki", "closed", "ppl books", "KL books", "closed", *SQNR_COLUMNS),
    "encoder": ("1 - cosine", "closed", "STS-B", *SQNR_COLUMNS),
}

EXPLANATION = """\
Made by `python -m benchmarks.accuracy.record --data DIR` from the rows in `accuracy.json`.

Every row is the mean over its seeds, which draw other calibration data; "+-" is half of largest
less smallest. Costs are over plain NVFP4 (`arc_ao/cost.py`): extra channels over in_features, extra
stored bits per weight, extra multiply-adds per token. "closed" is the share of plain NVFP4's
divergence (KL per token in nats, 1 - cosine) that a row removes. "top-1" is the share of tokens
whose likeliest follower is the unquantized model's. SQNR is of linears' outputs, mean by kind.
"STS-B" is Spearman's correlation times 100. "CPU s" is the time to quantize, of all threads
together; "commit" is that of the code which measured the row.
"""


def build_report(
    rows: list[dict[str, Any]], verdicts: list[dict[str, Any]], header: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Markdown and the JSON document of a record.

    Args:
        rows: measured, failed (with "error") and planned ones that were not run.
        verdicts: of `claims.claims`.
        header: versions, settings, absent models.
    """
    models = lines_by_model(rows)
    parts = ["# Accuracy record", EXPLANATION, _header(rows, header), "## Claims"]
    parts.append(_claims([c for c in verdicts if c["acceptance"]]))
    absent = dict.fromkeys(header["absent_models"], "Absent: its files were not found.")
    for name in NAMES:
        if name in models:
            parts.append(_model(name, models[name]))
        elif name in absent:
            parts.append(f"## {name}\n\n{absent[name]}")
    parts += ["## Relations", _claims([c for c in verdicts if not c["acceptance"]])]
    measured = [_stored(row) for row in rows if row["commit"] is not None]
    document = {"benchmark": "accuracy record", **header, "claims": verdicts, "rows": measured}
    return "\n\n".join(part.strip() for part in parts) + "\n", document


def to_json(document: dict[str, Any]) -> str:
    """Text of the document with one line for each of its rows."""
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    rest = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)
    return rest.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n'


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the settings that the header has; "applied" holds its configs."""
    if "settings" not in row:
        return row  # of the last record
    weights = {"weights": row["settings"]["weights"]}
    return {k: v for k, v in row.items() if k != "settings"} | weights


def _header(rows: list[dict[str, Any]], header: dict[str, Any]) -> str:
    commits = sorted({row["commit"] for row in rows if row["commit"]})
    facts = {
        "commit": ", ".join(commits) or "no row measured",
        "versions": ", ".join(f"{name} {v}" for name, v in header["versions"].items() if v),
        "machine": f"{header['cpu']}, {header['threads']} threads",
        "seeds": f"{header['seeds']} for the main rows, 1 for the others",
    }
    for kind, key in (("real models", "real_settings"), ("other models", "settings")):
        facts |= {f"{kind}: {k.replace('_', ' ')}": str(v) for k, v in header[key].items()}
    facts |= {name: str(count) for name, count in header["data_checks"].items()}
    return table(("", "run"), [[name, value] for name, value in facts.items()], text=2)


def _claims(verdicts: list[dict[str, Any]]) -> str:
    body = [[c["claim"], c["verdict"], c["detail"]] for c in verdicts]
    return table(("claim", "verdict", "figures"), body, text=3)


def _model(name: str, lines: dict[str, Line]) -> str:
    plain = lines.get(PLAIN)
    kind = _kind(name)
    headings = ("", *COST_COLUMNS, *COLUMNS[kind], "seeds", "CPU s", "commit")
    body = [
        [
            line.method,
            *_costs(line),
            *CELLS[kind](line, plain),
            str(max(map(len, line.values.values()))),
            _figure(line, "cpu_seconds", "{:.0f}"),
            ", ".join(sorted(line.commits)),
        ]
        for line in lines.values()
        if line.measured
    ]
    parts = [f"## {name}", ABOUT.get(name, ""), table(headings, body)]
    if any(line.tasks for line in lines.values()):
        parts.append(task_table(lines) if kind == "real" else _tasks(lines))
    elif kind == "real":
        parts.append("lm-eval tasks: not measured.")
    parts += [_errors(lines), _not_run(lines)]
    return "\n\n".join(part.strip() for part in parts if part)


def _kind(name: str) -> str:
    return "real" if name in REAL_NAMES else "encoder" if name == "encoder" else "decoder"


def _costs(line: Line) -> list[str]:
    if line.group == "reference":
        return ["-", "-", "-"]
    return [
        _figure(line, "extra_channels", "{:.1%}"),
        _figure(line, "extra_bits", "{:+.2f}"),
        _figure(line, "extra_multiply_adds", "{:+.1%}"),
    ]


def _decoder_cells(line: Line, plain: Line | None) -> list[str]:
    cells = []
    for text in ("wikitext2", "books"):
        figure = f"{text}/mean_kl"
        cells += [_figure(line, f"{text}/perplexity", "{:.2f}"), _spread(line, figure)]
        cells.append(_share(closed(line, plain, figure)))
    return cells + _sqnr(line)


def _real_cells(line: Line, plain: Line | None) -> list[str]:
    cells = []
    for text in ("wikitext2", "books"):
        figure = f"{text}/mean_kl"
        cells += [_figure(line, f"{text}/perplexity", "{:.2f}"), _spread(line, figure)]
        cells.append(_share(closed(line, plain, figure)))
        cells.append(_figure(line, f"{text}/top1", "{:.1%}"))
    return cells


def _encoder_cells(line: Line, plain: Line | None) -> list[str]:
    figure = "wiki lines/one_minus_cosine"
    share = _share(closed(line, plain, figure))
    score = _figure(line, "STS-B/sts_spearman", "{:.2f}")
    return [_spread(line, figure), share, score, *_sqnr(line)]


def _sqnr(line: Line) -> list[str]:
    return [_figure(line, f"sqnr/{kind}", "{:.2f}") for kind in KINDS]


CELLS: dict[str, Callable[[Line, Line | None], list[str]]] = {
    "real": _real_cells,
    "decoder": _decoder_cells,
    "encoder": _encoder_cells,
}


def _figure(line: Line, name: str, form: str) -> str:
    value = line.mean(name)
    return "-" if value is None else form.format(value)


def _spread(line: Line, name: str) -> str:
    value, half = line.mean(name), line.half_range(name)
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if half is None else f" +- {half:.4f}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _tasks(lines: dict[str, Line]) -> str:
    """Accuracies with the standard error of each mean; chance is 20 to 50 %."""
    found = [line for line in lines.values() if line.tasks]
    names = list(found[0].tasks)
    body = []
    for line in found:
        cells = [f"{100 * line.tasks[n]['accuracy']:.1f}" for n in names]
        mean = sum(line.tasks[n]["accuracy"] for n in names) / len(names)
        error = sum(line.tasks[n]["standard_error"] ** 2 for n in names) ** 0.5 / len(names)
        body.append([line.method, *cells, f"{100 * mean:.1f} +- {100 * error:.1f}"])
    counts = ", ".join(f"{n} {found[0].tasks[n]['n']:.0f}" for n in names)
    words = (
        f"lm-eval, local files, percent right of the first rows ({counts}); "
        '"+-" is the standard error of the mean. Models of this size are near chance here.'
    )
    return words + "\n\n" + table(("", *names, "mean"), body)


def _errors(lines: dict[str, Line]) -> str:
    body = [f"* {line.method}: {error}" for line in lines.values() for error in line.errors]
    return "Failed:\n\n" + "\n".join(body) if body else ""


def _not_run(lines: dict[str, Line]) -> str:
    names = [line.method for line in lines.values() if not line.measured and not line.errors]
    return f"Not run: {'; '.join(names)}." if names else ""
