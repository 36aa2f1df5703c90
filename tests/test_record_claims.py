"""What the accuracy record says of its rows: made-up rows, known verdicts."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))  # scripts

import record_claims  # noqa: E402
import record_report  # noqa: E402
from record_methods import BEST, DEFAULT, PLAIN  # noqa: E402
from record_table import lines_by_model, primary  # noqa: E402

MODELS = ("shipped", "encoder")
HEADER = {
    "versions": {"torch": "2"},
    "cpu": "a CPU",
    "threads": 1,
    "seeds": 1,
    "settings": {"tokens": 8},
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
    """Rows of both models, all claims true: plain 1, best 0.3, default 0.5, a rival, a peer."""
    rows = []
    for name in MODELS:
        wanted = {PLAIN: 1.0, BEST: 0.3, DEFAULT: 0.5, "rival": 0.4}
        wanted |= divergences if name == model else {}
        rows += [row(name, method, value) for method, value in wanted.items()]
        rows.append(row(name, "peer: recipe", 0.6, group="peer"))
    return rows


def verdicts(rows: list[dict]) -> dict[str, str]:
    return {c["claim"]: c["verdict"] for c in record_claims.claims(rows) if c["acceptance"]}


def changed(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {claim: verdict for claim, verdict in after.items() if before[claim] != verdict}


BEATS = f"shipped: {BEST} beats every other row at no larger budget"
PEERS = f"shipped: {BEST} beats every peer at no larger budget"
ALL_TRUE = verdicts(record())


def test_all_claims_hold_where_ours_is_best():
    assert set(ALL_TRUE.values()) == {"PASS"} and len(ALL_TRUE) == 8


@pytest.mark.parametrize("divergence", [0.3, 0.1])
def test_a_rival_that_is_as_good_or_better_fails_the_claim(divergence):
    rows = record(rival=divergence)
    assert changed(ALL_TRUE, verdicts(rows)) == {BEATS: "FAIL"}
    (detail,) = [c["detail"] for c in record_claims.claims(rows) if c["claim"] == BEATS]
    assert f"rival with {divergence:.4f} to 0.3000" in detail


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
    (detail,) = [c["detail"] for c in record_claims.claims(rows) if c["claim"] == PEERS]
    assert detail.startswith("1 compared, 1 failed")


def test_shares_are_of_plain_and_within_ten_percent_of_channels():
    closes = f"shipped: {BEST} closes at least 55% of plain NVFP4's divergence"
    assert changed(ALL_TRUE, verdicts(record(**{BEST: 0.46, "rival": 0.9}))) == {closes: "FAIL"}
    rows = record()
    (best,) = [r for r in rows if r["method"] == BEST and r["model"] == "shipped"]
    best["cost"]["extra_channels"] = 0.11
    assert changed(ALL_TRUE, verdicts(rows)) == {closes: "FAIL"}


def test_seeds_are_put_together():
    rows = [row("shipped", BEST, 0.2), row("shipped", BEST, 0.4, seed=1)]
    rows.append(row("shipped", BEST, 0.0, seed=2, error="OSError: disk", metrics={}, cost={}))
    line = lines_by_model(rows)["shipped"][BEST]
    assert line.mean("books/mean_kl") == pytest.approx(0.3)
    assert line.half_range("books/mean_kl") == pytest.approx(0.1)
    assert line.errors == ["seed 2: OSError: disk"]


def test_report_lists_everything():
    rows = record()
    rows[3]["sqnr_db"] = {"down": 17.25}
    rows.append(row("shipped", "broken", 0, error="ValueError: no", metrics={}, cost={}))
    rows.append(row("shipped", "later", 0, metrics={}, cost={}, cpu_seconds=None, commit=None))
    claims = record_claims.claims(rows)
    markdown, document = record_report.build_report(rows, claims, HEADER)
    assert "| rival | 10.0% | +0.10 | +10.0% | - | 0.4000 | 60.0% |" in markdown
    assert "| 17.25 |" in markdown
    assert "* broken: seed 0: ValueError: no" in markdown
    assert "Not run: later." in markdown
    assert "## qwen3\n\nAbsent" in markdown
    assert "| seeds | 1 for the main rows, 1 for the others |" in markdown
    assert len(document["rows"]) == len(rows) - 1 and document["claims"] == claims
    assert json.loads(record_report.to_json(document)) == document
    assert document["rows"][0]["weights"] == "abc"
    assert (markdown, document) == record_report.build_report(rows, claims, HEADER)
