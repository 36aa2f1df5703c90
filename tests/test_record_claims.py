"""What the accuracy record says of its rows: made-up rows, known verdicts."""

import json

import pytest

from benchmarks.accuracy.methods import (
    BEST,
    DEFAULT,
    OURS,
    PAPER,
    PLAIN,
    REFERENCE,
    TUNED,
    WEIGHT_ONLY,
)
from benchmarks.accuracy.report.claims import claims
from benchmarks.accuracy.report.markdown import build_report, to_json
from benchmarks.accuracy.report.table import REAL_NAMES, lines_by_model, paired, primary

MODELS = ("smollm2", "qwen-coder", "shipped", "encoder")
HEADER = {
    "versions": {"torch": "2"},
    "cpu": "a CPU",
    "threads": 1,
    "seeds": 1,
    "settings": {"tokens": 8},
    "real_settings": {"tokens": 16},
    "absent_models": ["qwen3"],
    "data_checks": {},
}


def row(model: str, method: str, divergence: float, **changes) -> dict:
    """A measured row with 10 % extra channels and 0.1 extra bits."""
    metrics: dict = {}
    for figure in primary(model):
        text, name = figure.split("/")
        metrics.setdefault(text, {})[name] = divergence
    cost = {"extra_channels": 0.1, "extra_bits": 0.1, "extra_multiply_adds": 0.1}
    found = {"model": model, "method": method, "seed": 0, "group": "other", "commit": "c"}
    found |= {"error": None, "metrics": metrics, "cost": cost, "cpu_seconds": 1.0}
    found["settings"] = {"weights": "abc"}
    return found | changes


def record(model: str = "shipped", **divergences: float) -> list[dict]:
    """Rows of all models, all claims true: plain 1, best 0.2, default 0.3, a rival, a peer."""
    rows = []
    for name in MODELS:
        wanted = {REFERENCE: 0.0, PLAIN: 1.0, OURS: 0.25, BEST: 0.2, DEFAULT: 0.3, TUNED: 0.15}
        wanted |= {"rival": 0.4, WEIGHT_ONLY: 0.01} | (divergences if name == model else {})
        rows += [row(name, method, value) for method, value in wanted.items()]
        rows.append(row(name, "peer: recipe", 0.6, group="peer"))
    for r in rows:
        if r["method"] == DEFAULT:
            r["cost"]["extra_channels"] = 0.06
        if r["method"] == REFERENCE:
            r["group"], r["cost"] = "reference", {}
        if r["model"] in REAL_NAMES:
            r["metrics"]["wikitext2"]["perplexity"] = 10 * (
                1 + r["metrics"]["wikitext2"]["mean_kl"] / 2
            )
    return rows


def verdicts(rows: list[dict]) -> dict[str, str]:
    return {c["claim"]: c["verdict"] for c in claims(rows) if c["acceptance"]}


def changed(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {claim: verdict for claim, verdict in after.items() if before[claim] != verdict}


BEATS = f"shipped: {BEST} beats every other row at no larger budget"
PEERS = f"shipped: {BEST} beats every peer at no larger budget"
ALL_TRUE = verdicts(record())


def test_all_claims_hold_where_ours_is_best():
    assert set(ALL_TRUE.values()) == {"PASS"} and len(ALL_TRUE) == 8 + 2 + 4 + 1 + 2 + 4


@pytest.mark.parametrize("divergence", [0.2, 0.1])
def test_a_rival_that_is_as_good_or_better_fails_the_claim(divergence):
    rows = record(rival=divergence)
    assert changed(ALL_TRUE, verdicts(rows)) == {BEATS: "FAIL"}
    (detail,) = [c["detail"] for c in claims(rows) if c["claim"] == BEATS]
    assert f"rival with {divergence:.4f} to 0.2000" in detail


@pytest.mark.parametrize(
    "cost, counts",
    [
        ({"extra_bits": 0.2, "extra_multiply_adds": 0.0}, False),
        ({"extra_bits": 0.0, "extra_multiply_adds": 0.2}, False),
        ({"extra_bits": 0.0, "extra_multiply_adds": 0.0}, True),
        ({"extra_bits": None, "extra_multiply_adds": None}, True),  # a peer that does not tell
    ],
)
def test_only_rows_of_no_larger_budget_are_compared(cost, counts):
    rows = record(rival=0.1)
    (rival,) = [r for r in rows if r["method"] == "rival" and r["model"] == "shipped"]
    rival["cost"] |= cost
    assert changed(ALL_TRUE, verdicts(rows)) == ({BEATS: "FAIL"} if counts else {})


def test_one_text_on_which_ours_loses_fails_the_claim():
    rows = record(rival=0.4)
    (rival,) = [r for r in rows if r["method"] == "rival" and r["model"] == "shipped"]
    rival["metrics"]["books"]["mean_kl"] = 0.2
    assert changed(ALL_TRUE, verdicts(rows)) == {BEATS: "FAIL"}


def test_a_peer_that_is_better_fails_its_own_claim():
    rows = [r | {"metrics": row(r["model"], "", 0.2)["metrics"]} if r["group"] == "peer" else r
            for r in record()]  # fmt: skip
    assert changed(ALL_TRUE, verdicts(rows))[PEERS] == "FAIL"
    assert verdicts(rows)[BEATS] == "PASS"


def test_peers_that_were_not_run_leave_the_claim_open_and_failed_ones_are_counted():
    rows = record()
    peers = [r for r in rows if r["group"] == "peer"]
    for peer in peers:
        peer |= {"metrics": {}, "cost": {}, "cpu_seconds": None, "commit": None}
    assert verdicts(rows)[PEERS] == "NOT MEASURED"
    rows.append(row("shipped", "peer: good", 0.9, group="peer"))
    assert verdicts(rows)[PEERS] == "NOT MEASURED"
    for peer in peers:
        peer["error"] = "RuntimeError: no GPU"
    assert verdicts(rows)[PEERS] == "PASS"
    (detail,) = [c["detail"] for c in claims(rows) if c["claim"] == PEERS]
    assert detail.startswith("1 compared, 1 failed")


def test_shares_are_of_plain_and_within_ten_percent_of_channels():
    shares = "60.3% (wikitext2/mean_kl) and 59.6% (books/mean_kl)"
    closes = f"shipped: {BEST} closes at least {shares} of plain NVFP4's divergence"
    assert changed(ALL_TRUE, verdicts(record(**{BEST: 0.40, "rival": 0.9}))) == {closes: "FAIL"}
    assert not changed(ALL_TRUE, verdicts(record(**{BEST: 0.396, "rival": 0.9})))
    rows = record()
    (best,) = [r for r in rows if r["method"] == BEST and r["model"] == "shipped"]
    best["cost"]["extra_channels"] = 0.11
    assert changed(ALL_TRUE, verdicts(rows)) == {closes: "FAIL"}


def test_seeds_are_put_together():
    rows = [row("shipped", BEST, 0.2), row("shipped", BEST, 0.4, seed=1)]
    rows.append(row("shipped", BEST, 0.0, seed=2, error="OSError: disk", metrics={}, cost={}))
    line = lines_by_model(rows)["shipped"][BEST]
    assert line.mean("books/mean_kl") == pytest.approx(0.3) and line.commits == {"c"}
    assert line.half_range("books/mean_kl") == pytest.approx(0.1)
    assert line.errors == ["seed 2: OSError: disk"]


def test_report_lists_everything():
    rows = record()
    shipped = next(r for r in rows if r["model"] == "shipped" and r["method"] == BEST)
    shipped["sqnr_db"] = {"down": 17.25}
    rows.append(row("shipped", "broken", 0, error="ValueError: no", metrics={}, cost={}))
    rows.append(row("shipped", "later", 0, metrics={}, cost={}, cpu_seconds=None, commit=None))
    found = claims(rows)
    markdown, document = build_report(rows, found, HEADER)
    assert "| rival | 10.0% | +0.10 | +10.0% | - | 0.4000 | 60.0% |" in markdown
    assert "| 17.25 |" in markdown
    assert "* broken: seed 0: ValueError: no" in markdown
    assert "Not run: later." in markdown
    assert "## qwen3\n\nAbsent" in markdown
    assert "| seeds | 1 for the main rows, 1 for the others |" in markdown
    assert len(document["rows"]) == len(rows) - 1 and document["claims"] == found
    assert json.loads(to_json(document)) == document
    assert document["rows"][0]["weights"] == "abc"
    assert (markdown, document) == build_report(rows, found, HEADER)


GATES = [
    ({DEFAULT: 0.38}, "smollm2", f"{DEFAULT} closes at least 63% "),
    ({OURS: 0.34}, "smollm2", f"{OURS} closes at least 67% "),
    ({BEST: 0.30}, "smollm2", f"{BEST} closes at least 71% "),
    ({TUNED: 0.25}, "smollm2", f"{TUNED} closes at least 76% "),
    ({DEFAULT: 0.46}, "qwen-coder", f"{DEFAULT} closes at least 55% "),
    ({BEST: 0.36}, "qwen-coder", f"{BEST} closes at least 65% "),
    ({DEFAULT: 0.58}, "encoder", f"{DEFAULT} closes at least 42.3% "),
]


@pytest.mark.parametrize("divergences, model, words", GATES)
def test_each_model_has_its_own_gates(divergences, model, words):
    """The share just missed fails that one claim (best on smollm2 also has a perplexity)."""
    found = changed(ALL_TRUE, verdicts(record(model, **divergences)))
    assert {claim: v for claim, v in found.items() if words in claim and model in claim}
    others = [claim for claim in found if words not in claim and "perplexity" not in claim]
    assert set(found.values()) == {"FAIL"} and not others


def test_books_may_close_four_points_less_than_wikitext():
    for books, verdict in ((0.239, "PASS"), (0.241, "FAIL")):
        rows = record()
        best = next(r for r in rows if r["model"] == "smollm2" and r["method"] == BEST)
        best["metrics"]["books"]["mean_kl"] = books
        words = f"smollm2: {BEST} closes on books at most 4% less than on wiki"
        assert verdicts(rows)[words] == verdict


def test_perplexity_is_compared_with_the_unquantized_model_s():
    words = f"smollm2: {BEST} has at most 1.13 times the unquantized model's perplexity (wikitext2)"
    for perplexity, verdict in ((11.29, "PASS"), (11.31, "FAIL")):
        rows = record()
        best = next(r for r in rows if r["model"] == "smollm2" and r["method"] == BEST)
        best["metrics"]["wikitext2"]["perplexity"] = perplexity
        assert changed(ALL_TRUE, verdicts(rows)) == ({words: "FAIL"} if verdict == "FAIL" else {})
    rows = [r for r in rows if r["method"] != REFERENCE]
    assert verdicts(rows)[words] == "NOT MEASURED"


def test_a_peer_that_beats_ours_on_a_real_model_fails_acceptance_another_row_a_relation():
    rows = record("smollm2", rival=0.1)
    assert not changed(ALL_TRUE, verdicts(rows))
    words = f"smollm2: {BEST} beats every other row at no larger budget"
    (claim,) = [c for c in claims(rows) if c["claim"] == words]
    assert claim["verdict"] == "FAIL" and not claim["acceptance"]
    assert WEIGHT_ONLY not in claim["detail"]  # 0.01, but another format
    peer = next(r for r in rows if r["model"] == "smollm2" and r["group"] == "peer")
    peer["metrics"] = row("smollm2", "", 0.19)["metrics"]
    words = f"smollm2: {BEST} beats every peer at no larger budget"
    assert changed(ALL_TRUE, verdicts(rows)) == {words: "FAIL"}


def test_relations_that_fail_on_a_real_model_are_listed():
    rows = [*record(), row("smollm2", PAPER, 0.905), row("smollm2", "GPTQ", 0.5)]
    rows.append(row("smollm2", "RTN, mse scales", 0.4))
    found = {c["claim"]: c for c in claims(rows) if not c["acceptance"]}
    assert found["smollm2: GPTQ beats RTN, mse scales"]["verdict"] == "FAIL"
    assert found[f"smollm2: {PAPER} beats {PLAIN}"]["verdict"] == "PASS"
    share = found[f"smollm2: {PAPER} closes at least 25% of plain NVFP4's divergence"]
    assert share["verdict"] == "FAIL" and "9.5%" in share["detail"]
    assert not any("SERQ" in claim for claim in found if claim.startswith("smollm2"))


def test_differences_are_paired_by_window_over_seeds():
    """Seeds average to (1, 2, 3) and (2, 4, 6): differences of 1, 2, 3."""
    rows = []
    for seed, shift in ((0, 0.5), (1, -0.5)):
        for method, windows in (("a", [2.0, 4.0, 6.0]), ("b", [1.0, 2.0, 3.0])):
            r = row("smollm2", method, 1.0, seed=seed)
            r["metrics"]["books"]["window_kl"] = [value + shift for value in windows]
            rows.append(r)
    lines = lines_by_model(rows)["smollm2"]
    assert paired(lines["a"], lines["b"], "books") == pytest.approx((2.0, 1 / 3**0.5))
    assert paired(lines["a"], lines["b"], "wikitext2") is None
    lines["b"].windows["books/window_kl"] = [[1.0]]
    assert paired(lines["a"], lines["b"], "books") is None


def test_the_report_leads_with_real_models():
    """Their own columns, tasks with errors, where the weights come from, the commit of each row."""
    rows = record()[::-1] + [row("qwen3", PLAIN, 0.5)]
    (best,) = [r for r in rows if r["model"] == "smollm2" and r["method"] == BEST]
    best["metrics"]["books"]["top1"] = 0.751
    best["commit"] = "abcdef1"
    task = {"parity": {"accuracy": 0.5, "standard_error": 0.025, "n": 400}}
    rows.append(row("smollm2", BEST, 0, group="tasks", metrics={}, cost={}, tasks=task))
    rows.append(
        row("smollm2", OURS, 0, group="tasks", metrics={}, cost={}, tasks={"b": task["parity"]})
    )
    header = HEADER | {"absent_models": ["stories260K"]}
    markdown, _ = build_report(rows, claims(rows), header)
    order = [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
    models = ["smollm2", "qwen-coder", "encoder", "shipped", "stories260K", "qwen3"]
    assert order == ["Claims", *models, "Relations"]
    smollm2 = markdown[markdown.index("## smollm2") : markdown.index("## qwen-coder")]
    assert "4-bit grid already" in smollm2 and "top-1 books" in smollm2
    (line,) = [x for x in smollm2.splitlines() if x.startswith(f"| {BEST} | 10.0%")]
    assert "| 75.1% |" in line and "abcdef1" in line
    assert f"| {BEST} | not measured | 50.0 +- 2.5 | - |" in smollm2
    assert "parity 400" in smollm2
    qwen = markdown[markdown.index("## qwen-coder") : markdown.index("## encoder")]
    assert "lm-eval tasks: not measured." in qwen
