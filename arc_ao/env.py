"""What this machine has and which kernels arc_ao takes on it.

    print(format_env_report(env_report()))

The report is a plain dict that `json.dumps` accepts, fit for a bug report. It only reads: no
kernel runs and no CUDA context is made beyond the device queries.
"""

import io
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

CPUINFO_PATH = Path("/proc/cpuinfo")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
# Blackwell and newer: sm_100, sm_103, sm_110, sm_120, sm_121. Hopper (sm_90) has none.
FP4_MIN_CAPABILITY = (10, 0)
DISTRIBUTIONS = {  # name in the report -> name of the distribution
    "arc_ao": "arc-ao",
    "torch": "torch",
    "triton": "triton",
    "torchao": "torchao",
    "transformers": "transformers",
    "lm_eval": "lm-eval",
}
TABLE_WIDTH = 100


def env_report() -> dict[str, Any]:
    """Collect versions, CPU, GPUs and the backend of every arc_ao operator.

    Returns a dict with the keys `versions`, `platform`, `cpu`, `cuda` (one entry per device, with
    the `backend` of the operators there and the `reason` it was chosen), `cuda_library` (what the
    compiled kernels for Blackwell are built for) and `ops` (backend and reason of every operator on
    the CPU).
    """
    from arc_ao.ops.backends import backend_report
    from arc_ao.ops.cuda import library

    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": cpu_report(_read_cpuinfo()),
        "cuda": _cuda_devices(),
        "cuda_library": library.description(),
        "ops": backend_report(),
    }


def cpu_report(cpuinfo: str | None) -> dict[str, Any]:
    """Describe the CPU; `cpuinfo` is the text of /proc/cpuinfo, None where it does not exist."""
    return {
        "model": _cpuinfo_field(cpuinfo, "model name") or platform.processor() or "unknown",
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_sets": instruction_sets(cpuinfo),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
    }


def instruction_sets(cpuinfo: str | None) -> dict[str, bool | Literal["unknown"]]:
    """Which of `INSTRUCTION_SETS` the kernel reports, "unknown" where it reports none at all.

    Sets that the operating system masks (as some hypervisors do with AMX) count as absent.
    """
    # x86 kernels call the line "flags", Arm kernels "Features".
    flags = _cpuinfo_field(cpuinfo, "flags") or _cpuinfo_field(cpuinfo, "Features")
    if flags is None:
        return {name: "unknown" for name in INSTRUCTION_SETS}
    present = set(flags.split())
    return {name: name in present for name in INSTRUCTION_SETS}


def format_env_report(report: dict[str, Any]) -> str:
    """Lay out what `env_report` returned as a text table, one fact per row."""
    from rich.console import Console  # here, so that the report needs nothing but torch
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for section, rows in _sections(report).items():
        for i, (name, value) in enumerate(rows):
            table.add_row(section if i == 0 else "", name, value)
    stream = io.StringIO()
    Console(file=stream, width=TABLE_WIDTH, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _sections(report: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    cpu = report["cpu"]
    sets = [f"{name} {_yes_no(present)}" for name, present in cpu["instruction_sets"].items()]
    memory = cpu["memory_gib"]
    return {
        "versions": list(report["versions"].items()),
        "platform": [("system", report["platform"])],
        "cpu": [
            ("model", cpu["model"]),
            ("torch capability", cpu["torch_capability"]),
            ("instruction sets", ", ".join(sets)),
            ("threads", f"{cpu['threads']} of {cpu['cores']} cores"),
            ("memory", "unknown" if memory is None else f"{memory} GiB"),
        ],
        "cuda": [
            *([_cuda_row(device) for device in report["cuda"]] or [("devices", "none")]),
            ("Blackwell kernels", report["cuda_library"]),
        ],
        "ops": [(name, f"{op['backend']}: {op['reason']}") for name, op in report["ops"].items()],
    }


def _cuda_row(device: dict[str, Any]) -> tuple[str, str]:
    fp4 = "has" if device["fp4_tensor_cores"] else "no"
    capability = f"sm_{device['capability'].replace('.', '')}, {fp4} FP4 tensor cores"
    return device["name"], f"{capability}; operators: {device['backend']} ({device['reason']})"


def _yes_no(present: bool | str) -> str:
    return present if isinstance(present, str) else ("yes" if present else "no")


def _versions() -> dict[str, str]:
    versions = {name: _version(dist) for name, dist in DISTRIBUTIONS.items()}
    return {"python": platform.python_version(), **versions}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _read_cpuinfo() -> str | None:
    return CPUINFO_PATH.read_text() if CPUINFO_PATH.exists() else None


def _cpuinfo_field(cpuinfo: str | None, field: str) -> str | None:
    """The value of the first `field : value` line: the first core stands for all."""
    for line in (cpuinfo or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _memory_gib() -> float | None:
    """Physical memory; None where the system does not tell it through sysconf."""
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= os.sysconf_names.keys():
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cuda_devices() -> list[dict[str, Any]]:
    from arc_ao.ops.backends import cuda_backend

    devices = []
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        devices.append(
            {
                "name": torch.cuda.get_device_name(i),
                "capability": f"{capability[0]}.{capability[1]}",
                "fp4_tensor_cores": capability >= FP4_MIN_CAPABILITY,
                **cuda_backend(i),
            }
        )
    return devices
