"""Everything that a machine with a GPU can tell about arc_ao's operators, in one command.

    python benchmarks/gpu/gpu_suite.py --output results  # from a bare checkout: torch, triton
    python benchmarks/gpu/gpu_suite.py --tune            # also rewrite this GPU's table
    python benchmarks/gpu/gpu_suite.py --dry-run         # without a GPU: what can run, tiny

Builds the compiled kernels where nvcc, CUTLASS and a GPU for them are there, checks every dispatch
level, measures the ceilings, times the linears of shapes.py. Ends inside --budget seconds with
what it has; what it had no time for is absent. Exit status 1 if an operator was wrong or failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not __package__:  # run as a file: its folder stands first, where the checkout has to
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common.checkout import ROOT, commit  # noqa: E402
from benchmarks.gpu.operators import load_operators  # noqa: E402

SHARE_OF_CHECKS = 0.35  # of the budget, at most
SHARE_OF_TUNING = 0.4
BUILD_SECONDS = 240
FIRST_BLACKWELL = (10, 0)
OWN = ("bf16", "nvfp4", "arc", "quantize", "ceilings")  # may not fail


class Deadline:
    """Seconds that are left of a budget."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def until(self, share: float) -> Callable[[], bool]:
        """Whether `share` more of the whole budget has not been used yet."""
        end = max(0.0, self.left() - share * self.seconds)
        return lambda: self.left() > end


def build_kernels(device: torch.device, seconds: float) -> str:
    """Build csrc/cuda for this GPU, and say what came of it."""
    script = ROOT / "build_cuda.py"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_BLACKWELL:
        return "not built: the compiled kernels are for Blackwell"
    if not script.exists() or shutil.which("nvcc") is None:
        return "not built: build_cuda.py or nvcc is missing"
    family = "100" if torch.cuda.get_device_capability(device)[0] == 10 else "120"
    command = [sys.executable, str(script), str(ROOT / "arc_ao" / "libarc_ao_cuda.so")]
    options = {"cwd": ROOT, "env": os.environ | {"ARC_AO_CUDA_ARCHS": family}}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        return f"not built: took longer than {seconds:.0f} s"
    return "built" if done.returncode == 0 else f"failed: {done.stderr.strip()[-500:]}"


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU, the versions and the commit."""
    from arc_ao.env import env_report

    report = env_report()
    versions = {n: v for n, v in report["versions"].items() if v != "not installed"}
    gpu = next(iter(report["cuda"]), {}) if device.type == "cuda" else {"name": "none"}
    return {**gpu, **versions, "cuda": torch.version.cuda or "none", "commit": commit()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The document of one run."""
    deadline = Deadline(args.budget)
    device = torch.device("cpu" if args.dry_run else "cuda")
    notes = {"build": build_kernels(device, min(BUILD_SECONDS, 0.4 * args.budget))}
    missing = load_operators()
    notes["imports"] = f"without {', '.join(missing)}" if missing else "the whole package"

    from benchmarks.gpu import checks, speed
    from benchmarks.gpu.report import acceptance

    document: dict[str, Any] = {"dry_run": args.dry_run, "notes": notes, "timings": []}
    document["machine"] = machine(device)
    cases = checks.all_cases(device, small=args.dry_run)
    found = checks.run_checks(cases, deadline.until(SHARE_OF_CHECKS))
    document["checks"] = [check._asdict() | {"verdict": check.verdict} for check in found]
    if args.tune and not args.dry_run:
        from benchmarks.gpu.tune import tune

        notes["tuning"] = tune(device, deadline.until(SHARE_OF_TUNING))
    document |= timed(speed, device, deadline, small=args.dry_run)
    notes |= {f"failed: {name}": text for name, text in document["failed"].items()}
    notes["seconds"] = f"{args.budget - deadline.left():.0f} of {args.budget:.0f}"
    document["acceptance"] = [line.document() for line in acceptance(document)]
    return document


def timed(
    speed: ModuleType, device: torch.device, deadline: Deadline, *, small: bool
) -> dict[str, Any]:
    """Ceilings, timings and what failed; a GPU that a fault has stopped leaves them empty, so that
    the report of what came before is still written."""
    try:
        ceilings = speed.ceilings(device, small=small)
    except Exception:
        error = traceback.format_exc(limit=-2)
        return {"ceilings": {}, "timings": [], "failed": {"ceilings": error}}
    timings, failed = speed.time_shapes(device, ceilings, lambda: deadline.left() > 0, small=small)
    return {"ceilings": ceilings, "timings": timings, "failed": failed}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--budget", type=float, default=510.0, help="seconds")
    parser.add_argument("--tune", action="store_true", help="measure this GPU's table of routes")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny shapes")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry-run runs what does not need one")
    document = run(args)
    from benchmarks.gpu.report import markdown, write_report

    files = write_report(document, args.output)
    print(markdown(document))
    print("written:", *files)
    wrong = any(check["verdict"] == "FAIL" for check in document["checks"])
    return int(wrong or not document["failed"].keys().isdisjoint(OWN))


if __name__ == "__main__":
    sys.exit(main())
