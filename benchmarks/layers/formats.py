"""Formats alone, without kernels, on a layer problem: MXFP4 and int4; plain, rotated, with SERQ.

    SERQ (arXiv 2603.08185), as its authors compute it, for any rounding Q of rows:
    s = amax per channel;  x' = (x / s)[:, order], w' = (w * s)[:, order], order by falling s
    R = Q(w'[:, :S]);  y = Q(x') Q(w' - [R | 0])^T + Q(x')[:, :S] R^T

The most salient S channels of the weight are rounded twice. MXFP4 has blocks of 32; int4 is
symmetric with one scale a row (token, output), amax / 7.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arc_ao.cost import PLAIN_BITS
from arc_ao.formats import mxfp4
from arc_ao.formats.rotation import hadamard_signs, rotate
from benchmarks.layers.problems import Problem
from benchmarks.layers.sqnr import sqnr_db

Rounding = Callable[[Tensor], Tensor]
MXFP4_BITS, INT4_BITS = 4.25, 4.0  # and 32 bits a row
SALIENT_MULTIPLE = 32  # a block of MXFP4


def mxfp4_rounded(t: Tensor) -> Tensor:
    """Rows [M, K] to MXFP4 and back."""
    return mxfp4.dequantize(*mxfp4.quantize(t))[:, : t.shape[1]]


def int4_rounded(t: Tensor) -> Tensor:
    """Rows [M, K] to int4 and back, one scale a row; rows of zeros stay."""
    scale = t.abs().amax(1, keepdim=True) / 7
    safe = torch.where(scale > 0, scale, 1.0)
    return (t / safe).round().clamp(-8, 7) * scale


def plain_output(problem: Problem, rounded: Rounding) -> Tensor:
    """Both operands rounded to nearest: [M, N]."""
    return rounded(problem.evaluation) @ rounded(problem.weight).t()


def rotated_output(problem: Problem, rounded: Rounding, size: int) -> Tensor:
    """The same after a block Hadamard rotation."""
    turned = lambda t: rounded(rotate(t, hadamard_signs(size)))
    return plain_output(problem, turned)


def serq_output(problem: Problem, rounded: Rounding, salient: int, flatten: bool = True) -> Tensor:
    """SERQ with the first `salient` channels corrected: [M, N]. A dead channel keeps s = 1."""
    amax = problem.calibration.abs().amax(0)
    order = amax.argsort(descending=True)
    scale = torch.where(amax > 0, amax, 1.0) if flatten else torch.ones_like(amax)
    x, w = (problem.evaluation / scale)[:, order], (problem.weight * scale)[:, order]
    first = rounded(w[:, :salient])
    rest = torch.cat([w[:, :salient] - first, w[:, salient:]], dim=1)
    x = rounded(x)
    return x @ rounded(rest).t() + x[:, :salient] @ first.t()


def format_rows(problem: Problem, budget: float) -> dict[str, dict[str, float]]:
    """Rows of methods.py: output SQNR and what is added to plain NVFP4."""
    outputs, channels = problem.weight.shape
    salient = min(channels, max(1, round(budget * channels / SALIENT_MULTIPLE)) * SALIENT_MULTIPLE)
    exact = problem.evaluation @ problem.weight.t()
    percent = f"{budget:.0%}".replace("%", " %")

    def row(y: Tensor, bits: float, extra: float = 0.0) -> dict[str, float]:
        return {
            "sqnr_db": sqnr_db(exact, y),
            "extra_bits": bits - PLAIN_BITS,
            "extra_multiply_adds": extra,
            "quantize_seconds": 0.0,
        }

    rows = {}
    for name, rounded, bits in (
        ("MXFP4", mxfp4_rounded, MXFP4_BITS),
        ("int4", int4_rounded, INT4_BITS + 32 / channels),
    ):
        share = salient / channels
        more = bits * (1 + share) + 32 / outputs  # and the channels' scales
        rows[name] = row(plain_output(problem, rounded), bits)
        rows[f"SERQ {percent}, {name}"] = row(serq_output(problem, rounded, salient), more, share)
        unscaled = serq_output(problem, rounded, salient, flatten=False)
        rows[f"SERQ {percent}, {name}, not flattened"] = row(unscaled, bits * (1 + share), share)
    for size in (32, 128):
        turned = rotated_output(problem, mxfp4_rounded, size)
        rows[f"MXFP4, Hadamard {size}"] = row(turned, MXFP4_BITS, size / outputs)
    return rows
