"""The checkout that is measured: where it is, and its commit."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = ("arc_ao", "csrc", "benchmarks")


def commit(paths: Sequence[str] = CODE) -> str:
    """The last commit that touched these paths, "+changes" where files differ from it; "unknown"
    outside of a checkout."""
    found = _git("log", "-1", "--format=%h", "--", *paths)
    if not found:
        return "unknown"
    return found + ("+changes" if _git("status", "--porcelain", "--", *paths) else "")


def _git(*arguments: str) -> str:
    """Output of git in the checkout; "" outside of one."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
