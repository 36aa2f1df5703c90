"""Text that a program writes for the calibration text: worked mathematics, tables and records,
short questions and answers, phrases in several languages. The same text on every run.

Facts, phrases and words come from the tables in parts/; everything else is computed, so
the answers are right.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from fractions import Fraction
from math import gcd, isqrt
from pathlib import Path
from random import Random
from typing import Any

PARTS = Path(__file__).parent / "parts"


class Draw:
    """Integers from a seed; `Random.random` alone is promised to stay the same in new Pythons."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed).random

    def __call__(self, low: int, high: int) -> int:
        """One of low .. high."""
        return low + int(self.random() * (high - low + 1))

    def one(self, items: Sequence[Any]) -> Any:
        return items[self(0, len(items) - 1)]


def table(name: str, kind: str | None = None) -> list[list[str]]:
    """Rows of a tab-separated file; with `kind` those that begin with it, without that cell."""
    rows = [line.split("\t") for line in (PARTS / name).read_text("utf-8").splitlines()]
    return rows if kind is None else [row[1:] for row in rows if row[0] == kind]


def markdown(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shopping(draw: Draw) -> str:
    name, thing = draw.one(("Anna", "Omar", "Mei", "Lucas")), draw.one(("apples", "pens", "books"))
    count, price, paid = draw(3, 12), draw(2, 9), draw(3, 6) * 50
    cost = count * price
    return (
        f"Problem: {name} buys {count} {thing} at ${price} each and pays with ${paid}. How much "
        f"change does {name} get?\nSolution: The {thing} cost {count} * {price} = ${cost}. The "
        f"change is {paid} - {cost} = ${paid - cost}.\nAnswer: {paid - cost}"
    )


def journey(draw: Draw) -> str:
    speed, hours, other = draw(4, 18) * 10, draw(2, 7), draw(2, 9) * 5
    rest = speed * hours + other * 2
    return (
        f"Question: A train goes {hours} hours at {speed} km/h and then 2 hours at {other} km/h. "
        f"What is its average speed?\nThe distance is {hours} × {speed} + 2 × {other} = {rest} km, "
        f"the time {hours + 2} hours. The average speed is {rest} / {hours + 2} ≈ "
        f"{rest / (hours + 2):.1f} km/h."
    )


def linear_equation(draw: Draw) -> str:
    a, x, b = draw(2, 12), draw(-9, 12), draw(-20, 20)
    sign, step = ("+", "Subtracting") if b >= 0 else ("-", "Adding")
    return (
        f"Solve ${a}x {sign} {abs(b)} = {a * x + b}$. {step} ${abs(b)}$ on both sides gives "
        f"${a}x = {a * x}$, and dividing by ${a}$ gives $x = {x}$."
    )


def quadratic(draw: Draw) -> str:
    r, s = draw(-7, 9), draw(-7, 9)
    b, c = -(r + s), r * s
    root = isqrt(b * b - 4 * c)
    return (
        f"To solve $x^2 {b:+d}x {c:+d} = 0$, take the discriminant $D = ({b})^2 - 4 \\cdot ({c}) "
        f"= {b * b - 4 * c}$. Its square root is ${root}$, hence\n\\[ x_{{1,2}} = "
        f"\\frac{{{-b} \\pm {root}}}{{2}}, \\qquad x_1 = {max(r, s)}, \\quad x_2 = {min(r, s)}. \\]"
    )


def derivative(draw: Draw) -> str:
    a, n, b, m = draw(2, 9), draw(4, 7), draw(2, 9), draw(2, 3)
    return (
        f"Let $f(x) = {a}x^{n} - {b}x^{m}$. By the power rule $f'(x) = {a * n}x^{{{n - 1}}} - "
        f"{b * m}x^{{{m - 1}}}$, so $f'(1) = {a * n - b * m}$. An antiderivative is "
        f"$\\frac{{{a}}}{{{n + 1}}}x^{{{n + 1}}} - \\frac{{{b}}}{{{m + 1}}}x^{{{m + 1}}} + C$."
    )


def euclid(draw: Draw) -> str:
    a, b = draw(200, 999), draw(20, 199)
    lines, x, y = [f"Greatest common divisor of {a} and {b}:"], a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"gcd({a}, {b}) = {gcd(a, b)}, lcm({a}, {b}) = {a * b // gcd(a, b)}"])


def fraction_sum(draw: Draw) -> str:
    p, q = Fraction(draw(1, 8), draw(3, 9)), Fraction(draw(1, 8), draw(3, 12))
    text = lambda f: f"\\frac{{{f.numerator}}}{{{f.denominator}}}"
    return f"\\[ {text(p)} + {text(q)} = {text(p + q)}, \\qquad {text(p)} \\cdot {text(q)} = " + (
        f"{text(p * q)} \\approx {float(p * q):.4f} \\]"
    )


def statistics(draw: Draw) -> str:
    values = sorted(draw(1, 40) for _ in range(7))
    mean = sum(values) / 7
    variance = sum((v - mean) ** 2 for v in values) / 6
    return (
        f"Data: {', '.join(map(str, values))} (n = 7). Median {values[3]}, mean {mean:.3f}, sample "
        f"variance {variance:.3f}, standard deviation {variance**0.5:.3f}, range {values[-1]} - "
        f"{values[0]} = {values[-1] - values[0]}."
    )


def matrix_product(draw: Draw) -> str:
    a, b = ([[draw(-5, 9) for _ in range(2)] for _ in range(2)] for _ in range(2))
    c = [[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    tex = lambda m: (
        "\\begin{pmatrix} "
        + " \\\\ ".join(" & ".join(map(str, row)) for row in m)
        + " \\end{pmatrix}"
    )
    determinant = a[0][0] * a[1][1] - a[0][1] * a[1][0]
    return f"$${tex(a)} {tex(b)} = {tex(c)}$$ and $\\det A = {determinant}$."


def bases(draw: Draw) -> str:
    rows = [[n, f"{n:b}", f"{n:o}", f"{n:#x}"] for n in (draw(9, 255) for _ in range(5))]
    return markdown(["decimal", "binary", "octal", "hexadecimal"], rows)


def csv_readings(draw: Draw) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["date", "station", "celsius", "fahrenheit", "rain_mm"])
    day = date(1900, 1, 1) + timedelta(draw(0, 36_000))
    for i in range(8):
        tenths = draw(-80, 320)
        row = [day + timedelta(i), f"S{draw(1, 9):02d}", tenths / 10]
        writer.writerow([*row, round(tenths * 0.18 + 32, 2), draw(0, 300) / 10])
    return out.getvalue().rstrip()


def json_elements(draw: Draw) -> str:
    keys = ("number", "name", "symbol", "weight", "state")
    chosen = [draw.one(table("facts.tsv", "element")) for _ in range(3)]
    rows = [dict(zip(keys, row, strict=True)) for row in chosen]
    rows = [row | {"number": int(row["number"]), "weight": float(row["weight"])} for row in rows]
    return json.dumps({"elements": rows, "count": len(rows)}, indent=2)


def yaml_capitals(draw: Draw) -> str:
    rows = [draw.one(table("facts.tsv", "capital")) for _ in range(4)]
    return "countries:\n" + "\n".join(
        f"  - name: {name}\n    capital: {capital}\n    continent: {continent}"
        for name, capital, continent in rows
    )


def ledger(draw: Draw) -> str:
    rows, total = [], 0
    for item in ("paper", "ink", "rent", "travel", "repairs"):
        quantity, price = draw(1, 20), draw(150, 9_900)
        total += quantity * price
        rows.append([item, quantity, f"{price / 100:.2f}", f"{quantity * price / 100:,.2f}"])
    rows.append(["**total**", "", "", f"**{total / 100:,.2f}**"])
    return markdown(["item", "quantity", "unit price", "amount"], rows)


MATHEMATICS: tuple[Callable[[Draw], str], ...] = (
    shopping, linear_equation, csv_readings, quadratic, euclid, json_elements, derivative,
    statistics, bases, journey, fraction_sum, matrix_product, ledger, yaml_capitals,
)  # fmt: skip


def mathematics(count: int, seed: int = 0) -> list[str]:
    """`count` items: worked problems and structured data in turn."""
    draw = Draw(seed)
    return [MATHEMATICS[i % len(MATHEMATICS)](draw) for i in range(count)]


def questions(count: int, seed: int = 1) -> list[str]:
    """`count` short exchanges about facts and sums, in three layouts."""
    draw = Draw(seed)
    layouts = (("User", "Assistant"), ("Q", "A"), ("Human", "AI"))
    elements, capitals = table("facts.tsv", "element"), table("facts.tsv", "capital")
    found = []
    for i in range(count):
        number, name, symbol, weight, state = draw.one(elements)
        country, capital, continent = draw.one(capitals)
        a, b = draw(12, 99), draw(3, 19)
        asked = (
            (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
            (f"Which element has the symbol {symbol}?", f"{name}, with atomic number {number}."),
            (f"What is {a} times {b}?", f"{a} × {b} = {a * b}."),
            (f"Is {country} in Europe?", "Yes." if continent == "Europe" else f"No, {continent}."),
            (f"Is {name.lower()} a gas at room temperature?", f"It is a {state}."),
            (f"Compute {a * b} / {b} and explain.", f"{a}, because {a} * {b} = {a * b}."),
            (f"Give me JSON for {name}.", json.dumps({"symbol": symbol, "weight": float(weight)})),
        )[i % 7]
        asker, answerer = layouts[i // 7 % 3]
        found.append(f"{asker}: {asked[0]}\n{answerer}: {asked[1]}")
    return found


def phrases() -> Iterator[str]:
    """Sentences in ten languages, then words in eleven: lists, a table, translation tasks."""
    languages, *rows = table("phrases.tsv")
    for i, row in enumerate(rows):
        if i % 2:
            yield "\n".join(f"{name}: {text}" for name, text in zip(languages, row, strict=True))
        else:
            record = dict(zip(languages, row, strict=True))
            yield json.dumps(record, ensure_ascii=False, indent=1)
    header, *words = table("words.tsv")
    for start in range(0, len(words), 8):
        yield markdown(header, words[start : start + 8])
