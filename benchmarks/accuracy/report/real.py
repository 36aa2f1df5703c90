"""What the report says of real models alone: where they come from, and their tasks."""

from benchmarks.accuracy.report.table import Line

GRID = """
Windows of 2,048 tokens (WikiText-2 test as in the literature; books: another kind of text than the
calibration's), calibrated on the package's mixed text. The weights are those of a GGUF file in a
registry package: they **lie on a {bits}-bit grid already**, which NVFP4 rounds once more, and the
unquantized row is of them. Activations, outliers and text are those of a real model.
"""
ABOUT = {
    "smollm2": "SmolLM2-135M-Instruct (Llama, 30 blocks; GGUF of Q4_1, embedding Q8_0)."
    + GRID.format(bits=4),
    "qwen-coder": "Qwen2.5-Coder-0.5B-Instruct (Qwen2, 24 blocks; GGUF of Q4_K_M, mostly Q5_0)."
    + GRID.format(bits="4 to 5"),
}


def table(headings: tuple[str, ...], body: list[list[str]], text: int = 1) -> str:
    """A markdown table; the first `text` columns are words, the others are figures."""
    rule = ["---" if i < text else "---:" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(headings), rule, *body])


def task_table(lines: dict[str, Line]) -> str:
    """Accuracy on every task with its standard error, and the mean of lines that have all tasks."""
    found = [line for line in lines.values() if line.tasks]
    names = sorted({name for line in found for name in line.tasks})
    counts = {name: line.tasks[name]["n"] for line in found for name in names if name in line.tasks}
    body = [[line.method, *(_cell(line, name) for name in names), _mean(line, names)]
            for line in found]  # fmt: skip
    words = (
        f"lm-eval, local files in full ({', '.join(f'{n} {counts[n]:.0f}' for n in names)} rows), "
        'percent right; "+-" is the standard error, of the choice of rows: differences between '
        "lines, which answer the same rows, vary less."
    )
    return words + "\n\n" + table(("", *names, "mean"), body)


def _cell(line: Line, name: str) -> str:
    if name not in line.tasks:
        return "not measured"
    return _percent(line.tasks[name]["accuracy"], line.tasks[name]["standard_error"])


def _mean(line: Line, names: list[str]) -> str:
    if not line.tasks.keys() >= set(names):
        return "-"
    mean = sum(line.tasks[n]["accuracy"] for n in names) / len(names)
    error = sum(line.tasks[n]["standard_error"] ** 2 for n in names) ** 0.5 / len(names)
    return _percent(mean, error)


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} +- {100 * error:.1f}"
