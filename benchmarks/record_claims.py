"""What the record shows, computed from its rows.

Acceptance claims decide `--check`; relations are the ones that the papers state. A claim is PASS or
FAIL, or NOT MEASURED where a row that it needs was not run. Rows that failed cannot be compared;
they are counted beside the verdict.

A competitor is a row that is not this project's recipe, and its budget is no larger if neither its
extra bits per weight nor its extra multiply-adds exceed those of our row (a budget that a peer does
not tell counts as no larger).
"""

from typing import Any

from record_methods import BEST, DEFAULT, PLAIN, is_ours
from record_table import Line, closed, lines_by_model, primary

SLACK = {"extra_bits": 0.01, "extra_multiply_adds": 0.005}  # still "no larger"
LARGEST_SHARE = 0.1  # extra channels of the row that is claimed for
CLOSES = (  # model, row, share of plain NVFP4's divergence that it closes at least
    ("shipped", BEST, 0.55),
    ("encoder", BEST, 0.62),
    ("shipped", DEFAULT, 0.40),
    ("encoder", DEFAULT, 0.40),
)
BEATS = ("shipped", "encoder")  # on the others it is a relation
RELATIONS = (  # better row, worse row: the papers', and what every addition should do
    ("ARC (paper) 10 %", PLAIN),
    ("SERQ 10 %", PLAIN),
    ("SERQ 10 %, not flattened", PLAIN),
    ("SVDQuant r32", PLAIN),
    ("ARHQ r32, iterated", "SVDQuant r32"),
    ("smoothing + ARC 10 %", "ARC 10 %"),
    (PLAIN, "Hadamard 16"),
    (PLAIN, "Hadamard 128"),
    ("MXFP4, Hadamard 32 (format only)", "MXFP4 (format only)"),
    (PLAIN, "MXFP4 (format only)"),
    ("GPTQ", "RTN, mse scales"),
    ("ARC 10 % + GPTQ", "ARC 10 %"),
    ("SERQ 10 % + GPTQ", "SERQ 10 %"),
    ("SVDQuant r32 + GPTQ", "SVDQuant r32"),
    ("ARHQ r32 + GPTQ", "ARHQ r32"),
)
Claim = dict[str, Any]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Every claim: its words, "verdict", "detail", and whether acceptance depends on it."""
    models = lines_by_model(rows)
    found = [_closes(models.get(m, {}), m, row, share) for m, row, share in CLOSES]
    names = [*BEATS, *(m for m in models if m not in BEATS)]
    for name in names:
        for who in ("row", "peer"):
            found.append(_beats(models.get(name, {}), name, who))
    for name, lines in models.items():
        found += [_relation(lines, name, better, worse) for better, worse in RELATIONS]
    return found


def _claim(words: str, holds: bool | None, detail: str, acceptance: bool) -> Claim:
    verdict = "NOT MEASURED" if holds is None else "PASS" if holds else "FAIL"
    return {"claim": words, "verdict": verdict, "detail": detail, "acceptance": acceptance}


def _closes(lines: dict[str, Line], model: str, method: str, share: float) -> Claim:
    words = f"{model}: {method} closes at least {share:.0%} of plain NVFP4's divergence"
    line, plain = lines.get(method), lines.get(PLAIN)
    if not (line and plain and line.measured and plain.measured):
        return _claim(words, None, "a row is missing", True)
    shares = {figure: closed(line, plain, figure) for figure in primary(model)}
    channels = line.mean("extra_channels")
    detail = ", ".join(f"{figure} {value:.1%}" for figure, value in shares.items())
    holds = min(shares.values()) >= share and channels <= LARGEST_SHARE
    return _claim(words, holds, f"{detail}; {channels:.1%} extra channels", True)


def _beats(lines: dict[str, Line], model: str, who: str) -> Claim:
    """Our best row against all competitors of a group ("row": everything but peers)."""
    words = f"{model}: {BEST} beats every {'other row' if who == 'row' else 'peer'} "
    words += "at no larger budget"
    acceptance = model in BEATS
    rivals = [line for name, line in lines.items() if _is_rival(name, line, who)]
    best = lines.get(BEST)
    missing = [line.method for line in rivals if not line.measured and not line.errors]
    if not rivals or not (best and best.measured) or missing:
        absent = f"{len(missing)} not run" if missing else "no rows"
        return _claim(words, None, absent, acceptance)
    failed = [line.method for line in rivals if not line.measured]
    inside = [line for line in rivals if line.measured and fits(line, best)]
    if not inside:
        return _claim(words, None, f"{len(failed)} failed, none to compare with", acceptance)
    better = [
        _comparison(line, best, figure)
        for line in inside
        for figure in primary(model)
        if line.mean(figure) <= best.mean(figure)
    ]
    detail = f"{len(inside)} compared" + (f", {len(failed)} failed" if failed else "")
    detail += (
        f"; not beaten: {'; '.join(better)}" if better else f"; {_nearest(inside, best, model)}"
    )
    return _claim(words, not better, detail, acceptance)


def _is_rival(name: str, line: Line, who: str) -> bool:
    if line.group == "reference" or is_ours(name):
        return False
    return (line.group == "peer") == (who == "peer")


def fits(line: Line, limit: Line) -> bool:
    """Whether a row's budget is no larger than that of `limit`."""
    for figure, slack in SLACK.items():
        value = line.mean(figure)
        if value is not None and value > limit.mean(figure) + slack:
            return False
    return True


def _nearest(lines: list[Line], best: Line, model: str) -> str:
    figure = primary(model)[0]
    nearest = min(lines, key=lambda line: line.mean(figure))
    return f"nearest {_comparison(nearest, best, figure)}"


def _comparison(line: Line, best: Line, figure: str) -> str:
    return f"{line.method} with {line.mean(figure):.4f} to {best.mean(figure):.4f} ({figure})"


def _relation(lines: dict[str, Line], model: str, better: str, worse: str) -> Claim:
    words = f"{model}: {better} beats {worse}"
    a, b = lines.get(better), lines.get(worse)
    if not (a and b and a.measured and b.measured):
        return _claim(words, None, "a row is missing or failed", False)
    ratios = {figure: a.mean(figure) / b.mean(figure) for figure in primary(model)}
    detail = ", ".join(f"{figure} {ratio:.2f} of it" for figure, ratio in ratios.items())
    return _claim(words, max(ratios.values()) < 1, detail, False)
