"""Random calls of the operators in processes of their own, each against its eager meaning.

    python -m benchmarks.operators.fuzz --calls 20000
    python -m benchmarks.operators.fuzz --first 1234 --calls 1 # one of them again

A call is right, refused or wrong. Right: the kernels of one dispatch level (they take turns) give
what the eager meaning gives, in every bit where numbers are quantized and within the rounding of
their sums where they are multiplied; tracing gives the same shapes and dtypes. Refused: by a
RuntimeError that names the operator, from kernel, meaning and tracing alike. Everything else is
wrong, as are a process that ends (a crash) and a call of more than a minute (a hang).

The last line of stdout is one JSON document; the exit code is 1 where anything was wrong.
"""

import argparse
import faulthandler
import json
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from benchmarks.common.checkout import ROOT
from benchmarks.operators.calls import make_call
from benchmarks.operators.outcomes import outcome_of

CALLS_OF_A_PROCESS = 4000
SECONDS = 60.0  # a longer call hangs
SHOWN = 20  # calls that went wrong


def run_here(first: int, count: int) -> None:
    """Run calls in this process: two lines each, its number before it and its outcome behind it."""
    torch.set_num_threads(1)
    for number in range(first, first + count):
        print(number, flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        call = make_call(number)
        kind, why = outcome_of(call, number)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"op": call.op, "kind": kind, "why": why, "spoilt": call.spoilt}))


def run_apart(first: int, count: int) -> list[dict[str, Any]]:
    """Outcomes of calls in a process of their own, up to the one that ends it."""
    command = [sys.executable, "-m", __spec__.name, "--here"]
    command += ["--first", str(first), "--calls", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    outcomes = [
        {"number": int(n)} | json.loads(o) for n, o in zip(lines[::2], lines[1::2], strict=False)
    ]
    if len(outcomes) < count:
        outcomes.append(ended(int(lines[-1]) if len(lines) % 2 else first, done))
    return outcomes


def ended(number: int, done: subprocess.CompletedProcess) -> dict[str, Any]:
    """The outcome of the call that ended its process."""
    call = make_call(number)
    kind = "crash" if done.returncode < 0 else "hang" if "Timeout" in done.stderr else "error"
    why = f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return {"number": number, "op": call.op, "kind": kind, "why": why, "spoilt": call.spoilt}


def run_all(first: int, calls: int) -> list[dict[str, Any]]:
    """Outcomes of all calls, whatever some of them do to their process."""
    outcomes: list[dict[str, Any]] = []
    while len(outcomes) < calls:
        left = min(CALLS_OF_A_PROCESS, calls - len(outcomes))
        outcomes += run_apart(first + len(outcomes), left)
        print(f"{len(outcomes)} of {calls}", dict(counts(outcomes)), file=sys.stderr, flush=True)
    return outcomes


def counts(outcomes: list[dict[str, Any]]) -> Counter:
    return Counter(outcome["kind"] for outcome in outcomes)


def report(outcomes: list[dict[str, Any]]) -> int:
    """Print a table, what went wrong, and the document; the exit code."""
    kinds = ("right", "refused", "wrong", "error", "crash", "hang")
    print(f"{'operator':28}" + "".join(f"{kind:>9}" for kind in kinds))
    for op in sorted({outcome["op"] for outcome in outcomes}):
        found = counts([outcome for outcome in outcomes if outcome["op"] == op])
        print(f"{op:28}" + "".join(f"{found[kind]:>9}" for kind in kinds))
    bad = [outcome for outcome in outcomes if outcome["kind"] not in ("right", "refused")]
    for outcome in bad[:SHOWN]:
        print("{number} {op} [{spoilt}] {kind}: {why}".format(**outcome))
    total = {kind: counts(outcomes)[kind] for kind in kinds}
    print(json.dumps({"calls": len(outcomes), **total, "passed": not bad}))
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--here", action="store_true", help="in this process, outcomes as lines")
    given = parser.parse_args()
    if given.here:
        warnings.simplefilter("ignore")  # of torch's own, of prototypes among its layouts
        run_here(given.first, given.calls)
        return 0
    return report(run_all(given.first, given.calls))


if __name__ == "__main__":
    sys.exit(main())
