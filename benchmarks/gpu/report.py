"""What a run of gpu_suite.py leaves: one JSON document and the same as markdown tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.acceptance import Line

COLUMNS = (
    "model", "layer", "K", "N", "M", "provider", "us", "spread", "GB/s", "TFLOP/s", "% of copy",
    "% of matmul", "x bf16",
)  # fmt: skip
BIG_WEIGHT = 100e6  # bytes in bf16, from which decoding has to reach memory speed
DECODE_ROWS = (1, 4, 16)


def write_report(document: dict[str, Any], folder: Path) -> list[Path]:
    """gpu_suite.json and gpu_suite.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "gpu_suite.json", folder / "gpu_suite.md"]
    files[0].write_text(json.dumps(document, indent=1))
    files[1].write_text(markdown(document))
    return files


def markdown(document: dict[str, Any]) -> str:
    """The document for readers."""
    machine, ceilings = document["machine"], document["ceilings"]
    checks = document["checks"]
    passed = sum(check["verdict"] == "PASS" for check in checks)
    lines = ["# GPU suite", ""]
    if document["dry_run"]:
        lines += ["**Dry run on a CPU: no figure below says anything about a GPU.**", ""]
    lines += [f"* {name}: {value}" for name, value in machine.items()]
    lines += [f"* measured {name}: {value:.4g}" for name, value in ceilings.items()]
    lines += [f"* {name}: {text}" for name, text in document["notes"].items()]
    lines += ["", "## Acceptance", "", *table(("verdict", "line", "value", "bound"), [
        (line["verdict"], line["name"], _number(line["value"]), line["bound"])
        for line in document["acceptance"]
    ])]  # fmt: skip
    lines += ["", f"## Correctness: {passed} of {len(checks)} passed", ""]
    rows = [(c["verdict"], c["name"], c["skipped"] or _last_line(c["error"])) for c in checks]
    lines += table(("verdict", "case", "reason"), rows)
    lines += ["", "## Speed", "", *table(COLUMNS, _speed_rows(document["timings"]))]
    return "\n".join(lines) + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a markdown table."""
    header = list(header)
    body = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _speed_rows(timings: list[dict[str, Any]]) -> list[list[str]]:
    order = sorted(timings, key=lambda t: (t["model"], t["layer"], t["M"], t["provider"]))
    return [
        [*(str(t[c]) for c in COLUMNS[:6]), *(_number(t.get(c)) for c in COLUMNS[6:])]
        for t in order
    ]


def acceptance(document: dict[str, Any]) -> list[Line]:
    """The suite's acceptance lines: the worst case of each, None where nothing was measured."""
    checks = document["checks"]
    timings = [] if document["dry_run"] else document["timings"]
    failed = sum(check["verdict"] == "FAIL" for check in checks)
    big = [t for t in timings if t["provider"] == "nvfp4" and t["bf16 bytes"] >= BIG_WEIGHT]
    decode = [t for t in big if t["M"] in DECODE_ROWS]
    price = [ratio for ratio in map(_arc_price(timings), timings) if ratio is not None]
    quantize = [t for t in timings if t["provider"] == "quantize" and t["M"] == 4096]

    def worst(rows: list[dict[str, Any]], column: str) -> float | None:
        return min((t[column] for t in rows if t.get(column) is not None), default=None)

    def at(rows: int) -> list[dict[str, Any]]:
        return [t for t in timings if t["provider"] == "nvfp4" and t["M"] == rows]

    return [
        Line("correctness cases that failed", failed if checks else None, at_most=0),
        Line("M = 1..16, 100 MB and more: % of copy", worst(decode, "% of copy"), at_least=75),
        Line("M = 1..16, 100 MB and more: x bf16", worst(decode, "x bf16"), at_least=2.8),
        Line("M = 64: x bf16", worst(at(64), "x bf16"), at_least=1.5),
        Line("M = 4096: x bf16", worst(at(4096), "x bf16"), at_least=0.9),
        Line("quantize, M = 4096: % of copy", worst(quantize, "% of copy"), at_least=60),
        Line("arc over nvfp4, any M", max(price, default=None), at_most=1.08),
    ]


def _arc_price(timings: list[dict[str, Any]]):
    """Of a timing of "arc": how much longer than "nvfp4" in the same case."""
    case = ("model", "layer", "M")
    plain = {tuple(t[c] for c in case): t["us"] for t in timings if t["provider"] == "nvfp4"}

    def price(timing: dict[str, Any]) -> float | None:
        base = plain.get(tuple(timing[c] for c in case))
        return timing["us"] / base if timing["provider"] == "arc" and base else None

    return price
