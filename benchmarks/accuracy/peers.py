"""Rows of other libraries (benchmarks/peers): their outputs, measured like our own."""

from pathlib import Path
from typing import Any

from arc_ao.cost import PLAIN_BITS
from benchmarks.accuracy.real_subjects import RealSubject
from benchmarks.accuracy.subjects import Subject
from benchmarks.peers import run

HOURS = {True: 12, False: 2}  # that a peer may take with a real model, with a small one


def names() -> list[str]:
    """Names of all peer rows, "peer: recipe"."""
    return [f"{peer}: {recipe}" for peer, recipes in run.PEERS.items() for recipe in recipes]


def measure(subject: Subject, method: str, seed: int, work: Path) -> dict[str, Any]:
    """Let a peer quantize a model, and measure its outputs.

    Raises:
        RuntimeError: what the peer says.
    """
    peer, recipe = method.split(": ", 1)
    real = isinstance(subject, RealSubject)
    found = run.peer_outputs(
        peer,
        recipe,
        subject.save() if real else subject.directory,
        subject.kind,
        subject.calibration(seed),
        subject.batches,
        work,
        timeout=3600.0 * HOURS[real],
    )
    if found.outputs is None:
        raise RuntimeError(found.error)
    bits = found.info.get("bits_per_weight")
    cost = {
        "extra_channels": 0.0,
        "extra_bits": None if bits is None else bits - PLAIN_BITS,
        "extra_multiply_adds": found.info.get("extra_multiply_adds"),
    }
    return {
        "cost": cost,
        "applied": found.info,
        "cpu_seconds": found.info.get("quantize_cpu_seconds"),
        "metrics": subject.score(found.outputs, subject.expected()),
    }
