"""Constructed activations with real channel profiles: output SQNR of W4A4 linears by layer kind.

    python -m benchmarks.layers.sqnr --imatrix Qwen3-4B.imatrix.dat --imatrix gemma-3-4b.imatrix.dat

An importance matrix (imatrix.py) gives the RMS of every input channel of a real model, and neither
its weights nor its activations. So all results are CONSTRUCTED:

    x[m, k] = rms[k] * t[m, k]      t: Student's t with 5 degrees of freedom, unit variance
    w[n, k] = g[n, k] / sqrt(K)     g: Gaussian; --weights balanced divides by sqrt(rms[k]) too
    SQNR    = 10 log10(sum y^2 / sum (y - y_quantized)^2)        of y = x w^T, evaluation tokens

Student's t stands for the heavy tails of real activations (kurtosis 9 against the Gaussian's 3).
Calibration and evaluation tokens are separate draws, and all channels are independent. Per layer
kind, every --every-th layer is one linear [out_features, K] of a model of its own, so that each
kind has exactly the budget of the row. The last line of stdout is one JSON document.
"""

import argparse
import copy
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from arc_ao import ARCConfig, quantize_
from benchmarks.accuracy.methods import OURS, PLAIN, quantized_rows
from benchmarks.common.headers import run_header
from benchmarks.layers.imatrix import read_imatrix

TARGET_DB = 3.0  # gain of OURS over plain NVFP4 on attention inputs

# Layer kind -> tensor of the importance matrix. q/k/v share their input, so do gate and up.
KINDS = {
    "attention input": "attn_q",
    "attention output": "attn_output",
    "MLP input": "ffn_up",
    "MLP middle": "ffn_down",
}
DEGREES_OF_FREEDOM = 5


class SeparateLinears(nn.Module):
    """Linears that read one input each: x [layers, M, K] to [layers, M, N]."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleList()
        for weight in weights:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight)
            self.linears.append(linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([linear(t) for linear, t in zip(self.linears, x, strict=True)])


def profiles(rms: dict[str, Tensor], kind: str, every: int) -> list[Tensor]:
    """Channel RMS of every `every`-th layer of a kind, first layer first.

    Raises:
        ValueError: none found.
    """
    pattern = re.compile(rf"blk\.(\d+)\.{KINDS[kind]}\.weight")
    found = {int(m[1]): value for name, value in rms.items() if (m := pattern.fullmatch(name))}
    if not found:
        raise ValueError(f"importance matrix without blk.*.{KINDS[kind]}.weight, the {kind}")
    return [found[layer] for layer in sorted(found)][::every]


def activations(rms: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Constructed inputs [tokens, K]; a channel with RMS 0 is 0."""
    shape = (tokens, rms.numel())
    chi_square = torch.zeros(shape)
    for _ in range(DEGREES_OF_FREEDOM):
        chi_square += torch.randn(shape, generator=generator).square()
    # normal / sqrt(chi_square / f) has variance f / (f - 2)
    t = torch.randn(shape, generator=generator) * (chi_square / (DEGREES_OF_FREEDOM - 2)).rsqrt()
    return rms * t


def random_weight(rms: Tensor, rows: int, weights: str, generator: torch.Generator) -> Tensor:
    """Constructed weight [rows, K]; "balanced" makes columns small where the input is large."""
    weight = torch.randn(rows, rms.numel(), generator=generator) * rms.numel() ** -0.5
    if weights == "balanced":
        alive = rms[rms > 0]
        weight /= (rms.clamp(min=alive.min()) / alive.median()).sqrt()
    return weight


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """10 log10 of signal energy over error energy, in fp64."""
    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item()


@torch.no_grad()
def measure(
    model: SeparateLinears, config: ARCConfig, calibration: Tensor, evaluation: Tensor
) -> dict[str, Any]:
    """Mean SQNR over the layers of a quantized copy."""
    quantized = copy.deepcopy(model)
    start = time.perf_counter()
    summary = quantize_(
        quantized, config, calibration_data=[calibration], progress=sys.stderr.isatty()
    )
    seconds = time.perf_counter() - start
    pairs = zip(model(evaluation), quantized(evaluation), strict=True)
    by_layer = [sqnr_db(reference, value) for reference, value in pairs]
    return {
        "sqnr_db": sum(by_layer) / len(by_layer),
        "sqnr_db_by_layer": by_layer,
        "extra_channels": summary.extra_channels,
        "quantize_seconds": seconds,
        "config": summary.configs[0],
        "trials": summary.trials[0],
    }


def measure_kind(
    rms: list[Tensor], args: argparse.Namespace, generator: torch.Generator
) -> dict[str, dict[str, Any]]:
    """Every row on the layers of one kind; all rows see the same draws."""
    weights = [random_weight(r, args.out_features, args.weights, generator) for r in rms]
    drawn = [[activations(r, args.tokens, generator) for r in rms] for _ in range(2)]
    calibration, evaluation = (torch.stack(layers) for layers in drawn)  # [layers, M, K]
    model = SeparateLinears(weights)
    configs = quantized_rows()
    return {name: measure(model, c, calibration, evaluation) for name, c in configs.items()}


def print_table(kinds: dict[str, dict[str, dict[str, Any]]], title: str) -> None:
    """Rows of the comparison by layer kind: dB, and the gain over plain NVFP4."""
    table = Table(title=title)
    for heading in ("", *kinds):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("fp32", *("inf" for _ in kinds))
    for name in quantized_rows():
        gains = [rows[name]["sqnr_db"] - rows[PLAIN]["sqnr_db"] for rows in kinds.values()]
        values = [rows[name]["sqnr_db"] for rows in kinds.values()]
        table.add_row(name, *(f"{v:.2f} ({g:+.2f})" for v, g in zip(values, gains, strict=True)))
    Console(width=100).print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imatrix", type=Path, action="append", required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--every", type=int, default=12, help="take every n-th layer")
    parser.add_argument("--tokens", type=int, default=512, help="for calibration and evaluation")
    parser.add_argument("--out-features", type=int, default=512)
    parser.add_argument("--weights", choices=("gaussian", "balanced"), default="gaussian")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with 1 unless ours, 10 %% gains {TARGET_DB} dB on attention inputs",
    )
    return parser.parse_args(argv)


def attention_gain(kinds: dict[str, Any]) -> float:
    """Gain in dB of ours at 10 % over plain NVFP4 on attention inputs; NaN if not measured."""
    rows = kinds.get("attention input")
    return rows[OURS]["sqnr_db"] - rows[PLAIN]["sqnr_db"] if rows else float("nan")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    results = {}
    for path in args.imatrix:
        rms = read_imatrix(path)
        kinds = {
            kind: measure_kind(profiles(rms, kind, args.every), args, generator)
            for kind in args.kinds
        }
        print_table(kinds, f"{path.name}: output SQNR in dB, constructed activations (vs plain)")
        results[path.name] = kinds
    gains = {name: attention_gain(kinds) for name, kinds in results.items()}
    passed = all(gain >= TARGET_DB for gain in gains.values())
    print(f"{'PASS' if passed else 'FAIL'}: attention inputs gain {gains} dB, target {TARGET_DB}")
    header = run_header(args) | {"data": "constructed", "passed": passed}
    print(json.dumps({"benchmark": "layer_sqnr", **header, "results": results}, default=str))
    if args.check and not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
