"""Tokens per second of a Llama on the CPU: llama.cpp's formats and arc_ao, in turns.

    python -m benchmarks.peers.environments llama_cpp      # once: compiles it for this machine
    python -m benchmarks.cpu.llama_cpp --threads 2       # the shape of cpu/model.py
    python -m benchmarks.cpu.llama_cpp --check           # exit code 1 if an acceptance line fails
    python -m benchmarks.cpu.llama_cpp --no-ours --formats nvfp4

Weights are random: arc_ao's with torch, llama.cpp's with numpy, of the same shape and spread. Each
file and each variant lives in a process of its own, and the processes take turns, one round each:

    prefill   one prompt of --prompt tokens, logits of its last token
    decode    --tokens tokens, one at a time, behind that prompt

Reported is the median over rounds. Before that, each file is checked: its logits behind the prompt
against those of the bf16 file. NVFP4 is quantized where arc_ao's is, the linears of the layers;
Q4_0, Q4_K_M and Q8_0 are what llama.cpp's quantizer makes of these names, head and embedding too.
The files (5 GB) lie in a folder that is removed at the end.

Stored are the file, and what of arc_ao's model is in memory. A process counts all that it holds at
most: arc_ao's with PyTorch and its compiler, llama.cpp's with the pages of its mapped file.
The last line of stdout is one JSON document.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.checkout import ROOT
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.memory import MIB
from benchmarks.cpu import model as bench_cpu_model
from benchmarks.cpu.model import FUSED, OURS, Variant, progress, take_turns
from benchmarks.peers import environments

PEER = "llama_cpp"
RUNNER = ROOT / "benchmarks" / "peers" / "with_llama_cpp.py"
BF16, NVFP4 = "bf16", "nvfp4"
FORMATS = (BF16, NVFP4, "q8_0", "q4_0", "q4_k_m")
LOWEST_COSINE = 0.5  # of logits to the bf16 file's: random layers amplify; of another model, 0.00
SHAPE = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary")
RUN = ("prompt", "tokens", "threads", "seed")
PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"


def label(fmt: str) -> str:
    """Name of a row."""
    return f"llama.cpp {fmt}"


def options(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Parsed options as a command line again."""
    return [part for n in names for part in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]


def peer_command(action: str, path: Path, args: argparse.Namespace) -> list[str]:
    """Starts the peer's script in its environment, without our PYTHONPATH (-E)."""
    python = str(environments.interpreter(PEER))
    return [python, "-E", str(RUNNER), action, str(path), *options(args, SHAPE + RUN)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def check_logits(name: str, path: Path, reference: np.ndarray | None) -> float | None:
    """Cosine of a file's logits to the reference's; None without a reference.

    Raises:
        SystemExit: they are not finite, or of another model.
    """
    logits = np.fromfile(path, np.float32)
    if not np.isfinite(logits).all():
        raise SystemExit(f"{name}: expected finite logits, found others; its speed means nothing")
    if reference is None:
        return None
    found = cosine(logits, reference)
    if not found >= LOWEST_COSINE:
        raise SystemExit(
            f"{name}: expected logits within {LOWEST_COSINE} of the bf16 file's (cosine), "
            f"found {found:.3f}; its speed means nothing"
        )
    return found


def start(args: argparse.Namespace, folder: Path, variants: dict[str, Variant]) -> None:
    """Fill `variants` with processes that are ready, llama.cpp's first."""
    write = [*peer_command("write", folder, args), "--formats", *args.formats]
    progress("writing files")
    subprocess.run(write, check=True)
    reference = None
    for fmt in args.formats:
        logits = folder / f"{fmt}.logits"
        serve = peer_command("serve", folder / f"{fmt}.gguf", args)
        variant = variants[label(fmt)] = Variant([*serve, "--logits", str(logits)])
        variant.memory["cosine"] = check_logits(fmt, logits, reference)
        if fmt == BF16:
            reference = np.fromfile(logits, np.float32)
    if args.ours:
        argv = options(args, (*SHAPE, *RUN, "budget"))
        for name in (OURS, FUSED):
            variants[name] = Variant(bench_cpu_model.command(name, argv))


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Speeds and facts of each row, timed in turns."""
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        try:
            start(args, Path(folder).resolve(), variants)
            take_turns(variants, args.rounds)
        finally:
            for variant in variants.values():
                variant.close()
    return {name: v.speeds(args.prompt) | v.memory for name, v in variants.items()}


def ratio(rows: dict[str, dict[str, Any]], key: str, ours: str, theirs: str) -> float | None:
    """How many times theirs ours is; None where one of them was not measured."""
    if ours not in rows or theirs not in rows:
        return None
    return rows[ours][key] / rows[theirs][key]


def acceptance(rows: dict[str, dict[str, Any]]) -> list[Line]:
    """Backend "arc" against llama.cpp's own NVFP4."""
    theirs = label(NVFP4)
    return [
        Line("prefill, over llama.cpp NVFP4", ratio(rows, PREFILL, FUSED, theirs), at_least=10),
        Line("decode, over llama.cpp NVFP4", ratio(rows, DECODE, FUSED, theirs), at_least=3),
    ]


def cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_table(rows: dict[str, dict[str, Any]], title: str) -> None:
    """One line per row; the last two columns say how many times its speed backend "arc" has."""
    table = Table("", title=title)
    headings = ("prefill\ntok/s", "decode\ntok/s", "stored\nMiB", "process\nMiB", "\ncosine")
    for heading in (*headings, "prefill,\nours x", "decode,\nours x"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            cell(row[PREFILL], 1),
            cell(row[DECODE], 2),
            *(cell(row[key] / MIB, 0) for key in ("stored", "total")),
            cell(row.get("cosine"), 4),
            *(cell(ratio(rows, key, FUSED, name), 2) for key in (PREFILL, DECODE)),
        )
    Console(width=100).print(table)


def print_build(rows: dict[str, dict[str, Any]]) -> None:
    """What llama.cpp says of its build, and where it put the weights of each file."""
    peers = {name: row for name, row in rows.items() if "system_info" in row}
    print(f"llama.cpp: {next(iter(peers.values()))['system_info'].strip()}")
    for name, row in peers.items():
        buffers = ", ".join(f"{key} {size:.0f} MiB" for key, size in row["buffers_mib"].items())
        types = ", ".join(f"{count} {name}" for name, count in row["tensors"].items())
        flash = "with" if row["flash_attention"] else "without"
        print(f"{name}: {types} tensors; {buffers}; {flash} flash attention")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_cpu_model.parser(__doc__.splitlines()[0])
    ours = argparse.BooleanOptionalAction
    parser.add_argument("--ours", action=ours, default=True, help="arc_ao's rows, too")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--folder", type=Path, help="for the files, default the system's")
    args = parser.parse_args(argv)
    args.formats = [fmt for fmt in FORMATS if fmt in args.formats]  # bf16, the reference, first
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    environments.interpreter(PEER)  # missing: says so before anything else
    header = machine_header(vars(args) | {"folder": None})
    print_header(header)
    rows = measure(args)
    print_build(rows)
    title = f"Llama, {args.layers} layers of {args.hidden}/{args.intermediate}"
    print_table(rows, f"{title}, {args.threads} threads")
    lines = acceptance(rows)
    return conclude({"benchmark": "bench_llama_cpp", **header, "rows": rows}, lines, args.check)


if __name__ == "__main__":
    sys.exit(main())
