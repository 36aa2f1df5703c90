"""What the record shows, computed from its rows.

Acceptance claims decide `--check`; relations are the ones that the papers state. A claim is PASS or
FAIL, or NOT MEASURED where a row that it needs was not run. Rows that failed cannot be compared;
they are counted beside the verdict.

A competitor is a row that is not this project's recipe, and its budget is no larger if neither its
extra bits per weight nor its extra multiply-adds exceed those of our row (a budget that a peer does
not tell counts as no larger).
"""

from typing import Any

from benchmarks.accuracy.methods import BEST, PAPER, PLAIN, REFERENCE, is_ours
from benchmarks.accuracy.report.gates import (
    BEATS_PEERS,
    BEATS_ROWS,
    CLOSES,
    LARGEST_SHARE,
    NO_RIVALS,
    PAPER_CLOSES,
    PERPLEXITY,
    RELATIONS,
    SHARE_SLACK,
    Closes,
    PerplexityRatio,
)
from benchmarks.accuracy.report.table import NAMES, Line, closed, lines_by_model, paired, primary

SLACK = {"extra_bits": 0.01, "extra_multiply_adds": 0.005}  # still "no larger"
LARGEST = 0.1
Claim = dict[str, Any]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Every claim: its words, "verdict", "detail", and whether acceptance depends on it."""
    models = lines_by_model(rows)
    found = []
    for gate in CLOSES:
        found += _closes(models.get(gate.model, {}), gate)
    found += [_perplexity(models.get(gate.model, {}), gate) for gate in PERPLEXITY]
    gated = {"row": BEATS_ROWS, "peer": BEATS_PEERS}
    for name in NAMES:
        for who, names in gated.items():
            if name in names or name in models:
                found.append(_beats(models.get(name, {}), name, who, name in names))
    for name, lines in models.items():
        found += [
            _relation(lines, name, better, worse)
            for better, worse in RELATIONS
            if better in lines and worse in lines
        ]
        found.append(_paper_closes(lines, name))
    return found


def _claim(words: str, holds: bool | None, detail: str, acceptance: bool) -> Claim:
    verdict = "NOT MEASURED" if holds is None else "PASS" if holds else "FAIL"
    return {"claim": words, "verdict": verdict, "detail": detail, "acceptance": acceptance}


def _closes(lines: dict[str, Line], gate: Closes) -> list[Claim]:
    """The shares of a gate, and how far books may lie below WikiText-2."""
    limits = " and ".join(
        f"{share:.1%}".replace(".0%", "%") + (f" ({figure})" if len(gate.shares) > 1 else "")
        for figure, share in gate.shares.items()
    )
    start = f"{gate.model}: {gate.method}"
    words = [f"{start} closes at least {limits} of plain NVFP4's divergence"]
    if gate.books_within is not None:
        words.append(f"{start} closes on books at most {gate.books_within:.0%} less than on wiki")
    line, plain = lines.get(gate.method), lines.get(PLAIN)
    if not (line and plain and line.measured and plain.measured):
        return [_claim(text, None, "a row is missing", True) for text in words]
    shares = {figure: closed(line, plain, figure) for figure in primary(gate.model)}
    channels = line.mean("extra_channels")
    detail = ", ".join(f"{figure} {value:.1%}" for figure, value in shares.items())
    small = channels <= LARGEST_SHARE.get(gate.method, LARGEST) + SHARE_SLACK
    holds = small and all(shares[figure] >= share for figure, share in gate.shares.items())
    verdicts = [_claim(words[0], holds, f"{detail}; {channels:.1%} extra channels", True)]
    if gate.books_within is not None:
        wiki, books = shares.values()
        verdicts.append(_claim(words[1], books >= wiki - gate.books_within, detail, True))
    return verdicts


def _perplexity(lines: dict[str, Line], gate: PerplexityRatio) -> Claim:
    words = f"{gate.model}: {gate.method} has at most {gate.ratio} times the unquantized model's "
    words += "perplexity (wikitext2)"
    values = [
        lines[name].mean("wikitext2/perplexity") if name in lines else None
        for name in (gate.method, REFERENCE)
    ]
    if None in values:
        return _claim(words, None, "a row is missing", True)
    ratio = values[0] / values[1]
    detail = f"{values[0]:.2f} to {values[1]:.2f}, {ratio:.3f} times"
    return _claim(words, ratio <= gate.ratio, detail, True)


def _paper_closes(lines: dict[str, Line], model: str) -> Claim:
    """What the small models show of the published recipe, as a relation."""
    words = f"{model}: {PAPER} closes at least {PAPER_CLOSES:.0%} of plain NVFP4's divergence"
    line, plain = lines.get(PAPER), lines.get(PLAIN)
    if not (line and plain and line.measured and plain.measured):
        return _claim(words, None, "a row is missing or failed", False)
    shares = {figure: closed(line, plain, figure) for figure in primary(model)}
    detail = ", ".join(f"{figure} {share:.1%}" for figure, share in shares.items())
    return _claim(words, min(shares.values()) >= PAPER_CLOSES, detail, False)


def _beats(lines: dict[str, Line], model: str, who: str, acceptance: bool) -> Claim:
    """Our best row against all competitors of a group ("row": everything but peers)."""
    words = f"{model}: {BEST} beats every {'other row' if who == 'row' else 'peer'} "
    words += "at no larger budget"
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
    if line.group == "reference" or is_ours(name) or name in NO_RIVALS:
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
    words = f"{line.method} with {line.mean(figure):.4f} to {best.mean(figure):.4f} ({figure}"
    return words + _difference(line, best, figure) + ")"


def _difference(a: Line, b: Line, figure: str) -> str:
    """Of window KLs, with its standard error, where both lines have them."""
    found = paired(a, b, figure.partition("/")[0])
    return "" if found is None else f", paired {found[0]:+.4f} +- {found[1]:.4f}"


def _relation(lines: dict[str, Line], model: str, better: str, worse: str) -> Claim:
    words = f"{model}: {better} beats {worse}"
    a, b = lines.get(better), lines.get(worse)
    if not (a and b and a.measured and b.measured):
        return _claim(words, None, "a row is missing or failed", False)
    ratios = {figure: a.mean(figure) / b.mean(figure) for figure in primary(model)}
    detail = ", ".join(
        f"{figure} {ratio:.2f} of it" + _difference(a, b, figure)
        for figure, ratio in ratios.items()
    )
    return _claim(words, max(ratios.values()) < 1, detail, False)
