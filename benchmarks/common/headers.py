"""What a reader needs to repeat a run, and on what it ran."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from arc_ao.env import env_report
from benchmarks.common.checkout import commit


def run_header(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments, among them the seed, versions and threads."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    versions = env_report()["versions"]
    return {"arguments": arguments, "versions": versions, "threads": torch.get_num_threads()}


def machine_header(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments and versions, the CPU, the operators' levels, the commit and the load before."""
    report = env_report()
    cpu = report["cpu"] | {"threads": torch.get_num_threads()}
    backends = {name: op["backend"] for name, op in report["ops"].items()}
    return {
        "arguments": arguments,
        "versions": report["versions"],
        "cpu": cpu,
        "ops": backends,
        "commit": commit(),
        "load_before": os.getloadavg()[0],
    }


def print_header(header: dict[str, Any]) -> None:
    """The machine in four lines."""
    cpu, versions = header["cpu"], header["versions"]
    sets = [name for name, present in cpu["instruction_sets"].items() if present is True]
    print(f"{cpu['model']}, {cpu['threads']} of {cpu['cores']} cores: {', '.join(sets)}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"arc_ao operators: {header['ops']['arc::nvfp4_gemm']}; commit {header['commit']}")
    print(f"load average before: {header['load_before']:.2f} (busy cores spoil every figure)")
