"""The tables of README.md and docs/ that show measurements, made from benchmarks/results.

    python docs/result_tables.py            writes them into the pages
    python docs/result_tables.py --check    exits with 1 where a page shows other figures

A page holds a table between `<!-- results: NAME -->` and `<!-- end of results -->`. Gates are the
bounds that a benchmark checks in its own run; those that failed are shown as failed.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED_FILES = ("cpu_gemm_zen5", "cpu_model_zen5", "llama_cpp_zen5", "compiler_zen5")
MARKED = re.compile(r"(<!-- results: (\w+) -->\n)(?:.*?\n)??(<!-- end of results -->)", re.DOTALL)
# Row of the table on the real model: name in demo_llm_zen5.json, name in accuracy.json, and what
# the reader sees.
REAL_MODEL_ROWS = (
    ("bf16", "unquantized", "unquantized, bf16"),
    ("NVFP4, plain", "plain NVFP4", "plain NVFP4, W4A4"),
    ("ARC, paper, 10 %", "ARC (paper) 10 %", "ARCQuant's recipe, 10 %"),
    ("ours, 6 %", "arc_ao 6 %", "default, 6 %"),
    ("ours, 10 %", "arc_ao 10 %", "default, 10 %"),
    ("best, 10 %", "arc_ao best 10 %", '`recipe="best"`, 10 %'),
    (None, "arc_ao tuned 10 %", '`recipe="tuned"`, 10 %'),
    ("W4A16", None, "plain NVFP4, W4A16"),
)
OTHER_MODELS = {
    "shipped": "shipped Llama, 3.7M parameters (planted outlier channels)",
    "qwen3": "Qwen3-type decoder trained for the tests",
    "stories260K": "stories260K, 0.26M parameters",
    "encoder": "all-MiniLM-L6-v2, sentence encoder",
}
OTHER_METHODS = ("ARC (paper) 10 %", "arc_ao 6 %", "arc_ao 10 %", "arc_ao best 10 %")
CPU_LINEAR_COLUMNS = {
    "bf16": "bf16 `F.linear`",
    "int8": "torchao int8 dynamic, compiled",
    "nvfp4": "plain NVFP4",
    "arc": "ARC, 6 %",
}


def load(name: str) -> Any:
    """A committed result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def closed(model: str, method: str) -> dict[str, float]:
    """Share of plain NVFP4's divergence that a method removes, by text, mean over its seeds."""
    plain, found = divergences(model, "plain NVFP4"), divergences(model, method)
    return {text: 1 - found[text] / plain[text] for text in found if text in plain}


def divergences(model: str, method: str) -> dict[str, float]:
    """Mean over seeds of the divergence on every text; empty where it was not measured."""
    rows = [
        row["metrics"]
        for row in load("accuracy")["rows"]
        if (row["model"], row["method"]) == (model, method) and row["metrics"]
    ]
    names = ("mean_kl", "one_minus_cosine")
    return {
        text: mean(row[text][name] for row in rows)
        for text, metrics in (rows[0].items() if rows else ())
        if isinstance(metrics, dict)
        for name in names
        if metrics.get(name) is not None
    }


def percents(shares: dict[str, float]) -> str:
    """Of all texts."""
    return " / ".join(f"{share:.1%}" for share in shares.values()) or "-"


def optional(value: float | None, form: str) -> str:
    """A figure, or "-" where there is none."""
    return "-" if value is None else form.format(value)


def aim_of(method: str | None) -> str:
    """Verdict of the accuracy record on what a method was to reach on the real model."""
    start = f"smollm2: {method} closes at least "
    for claim in load("accuracy")["claims"]:
        if claim["claim"].startswith(start) and claim["acceptance"]:
            return f"{claim['claim'].removeprefix(start).split('%')[0]}%: {claim['verdict']}"
    return "-"


def real_model() -> str:
    """SmolLM2-135M: the demonstration's figures and those of the accuracy record."""
    demo = {row["name"]: row for row in load("demo_llm_zen5")}
    head = ["", "perplexity", "KL a token", "KL closed", "top-1", "bits a weight", "file"]
    head += ["seconds to quantize", "record: closed, WikiText-2 / books", "aim: verdict"]
    rows = []
    for name, method, label in REAL_MODEL_ROWS:
        row = demo.get(name, {})
        size = row.get("file_bytes")
        share = {} if method in (None, "unquantized", "plain NVFP4") else closed("smollm2", method)
        rows.append(
            [
                label,
                optional(row.get("perplexity"), "{:.2f}"),
                optional(row.get("mean_kl"), "{:.4f}"),
                optional(row.get("closed"), "{:.0%}"),
                optional(row.get("top1_agreement"), "{:.0%}"),
                optional(row.get("bits_per_weight"), "{:.2f}"),
                "-" if size is None else f"{size / 1e6:.0f} MB",
                optional(row.get("seconds"), "{:.0f}"),
                percents(share),
                aim_of(method),
            ]
        )
    return table(head, rows)


def other_models() -> str:
    """Divergence closed on the other models of the record."""
    rows = [
        [label, *(percents(closed(model, method)) for method in OTHER_METHODS)]
        for model, label in OTHER_MODELS.items()
    ]
    return table(["KL or 1 - cosine closed", *OTHER_METHODS], rows)


def claims() -> str:
    """Every claim of the accuracy record that counts for acceptance."""
    accepted = [claim for claim in load("accuracy")["claims"] if claim["acceptance"]]
    rows = [[claim["claim"], claim["verdict"], claim["detail"]] for claim in accepted]
    return table(["claim", "verdict", "figures"], rows)


def cpu_linear() -> str:
    """Microseconds of one linear with weights from memory."""
    cells = [cell for cell in load("cpu_gemm_zen5")["cells"] if cell["weights"] == "cold"]
    times = {(cell["rows"], cell["provider"]): cell["microseconds"] for cell in cells}
    rows = []
    for tokens in sorted({cell["rows"] for cell in cells}):
        found = {name: times[tokens, name] for name in CPU_LINEAR_COLUMNS}
        fastest = min(found, key=found.__getitem__)
        rows.append([str(tokens), *(f"{t:,.0f}" for t in found.values())])
        rows[-1] += [f"{found['bf16'] / found['arc']:.1f}x", CPU_LINEAR_COLUMNS[fastest]]
    head = ["tokens", *CPU_LINEAR_COLUMNS.values(), "ARC against bf16", "fastest"]
    return table(head, rows)


def cpu_model() -> str:
    """Tokens a second of a 1B-shape Llama, two runs: against PyTorch, and against llama.cpp."""
    rows = []
    for run, name in (("cpu_model_zen5", "variants"), ("llama_cpp_zen5", "rows")):
        for label, row in load(run)[name].items():
            speeds = (row["prefill_tokens_per_second"], row["decode_tokens_per_second"])
            rows.append([run, label, *(f"{speed:.1f}" for speed in speeds)])
            rows[-1].append(f"{row['stored'] / 1e6:,.0f} MB")
    return table(["run", "", "prompt, tokens/s", "decoding, tokens/s", "stored"], rows)


def speed_in_short() -> str:
    """Of the two runs on the 1B shape, fastest first, so that nobody looks better than measured."""
    lines = []
    for run, name in (("cpu_model_zen5", "variants"), ("llama_cpp_zen5", "rows")):
        found = load(run)
        verdict = "passed" if found["passed"] else "with failed gates"
        for kind, label in (("prefill", "a prompt of 512 tokens"), ("decode", "decoding")):
            speeds = {name: row[f"{kind}_tokens_per_second"] for name, row in found[name].items()}
            ranked = sorted(speeds.items(), key=lambda item: -item[1])
            listed = "; ".join(f"{name} {speed:.1f}" for name, speed in ranked)
            lines.append(f"* {label}, tokens/s (`{run}.json`, {verdict}): {listed}")
    return "\n".join(lines)


def speed_gates() -> str:
    """Every gate of every speed file."""
    rows = [
        [name, gate["name"], _figure(gate["value"]), gate["bound"], gate["verdict"]]
        for name in SPEED_FILES
        for gate in load(name)["acceptance"]
    ]
    return table(["file", "gate", "measured", "bound", "verdict"], rows)


def not_met() -> str:
    """What failed, and what was not measured."""
    rows = []
    for name in SPEED_FILES:
        for gate in load(name)["acceptance"]:
            if gate["verdict"] != "PASS":
                found = f"{_figure(gate['value'])}, bound {gate['bound']}"
                rows.append([f"`{name}.json`", gate["name"], found, gate["verdict"]])
    for claim in load("accuracy")["claims"]:
        if claim["acceptance"] and claim["verdict"] != "PASS":
            rows.append(["`accuracy.json`", claim["claim"], claim["detail"], claim["verdict"]])
    return table(["file", "gate", "figures", "verdict"], rows)


def verdicts() -> str:
    """Whether each speed file passed, and what it was measured with."""
    rows = []
    for name in SPEED_FILES:
        run = load(name)
        passed = "yes" if run["passed"] else "NO"
        load_before = f"{run['load_before']:.1f}"
        rows.append([f"`{name}.json`", run["commit"], load_before, passed])
    return table(["file", "commit measured", "load of the machine before", "passed"], rows)


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


TABLES = {
    function.__name__: function
    for function in (
        real_model,
        other_models,
        claims,
        cpu_linear,
        cpu_model,
        speed_in_short,
        speed_gates,
        not_met,
        verdicts,
    )
}


def with_tables(text: str) -> str:
    """A page with its tables made anew. KeyError: a name that is no table."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def pages() -> list[Path]:
    """README and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Write the tables, or with --check name the pages that differ."""
    differing = [page for page in pages() if with_tables(page.read_text()) != page.read_text()]
    for page in differing:
        print(page.relative_to(ROOT))
        if "--check" not in sys.argv:
            page.write_text(with_tables(page.read_text()))
    return int(bool(differing) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
