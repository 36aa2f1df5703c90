"""Correctness on the GPU at hand, at every dispatch level: codes bit for bit, products to one ulp.

The reference is the eager meaning on the CPU (codes) and float64 on the device (products). Without
a GPU the same cases run the operators on the CPU, at small shapes.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import producers
from arc_ao.ops.cuda import dispatch, tuning
from arc_ao.ops.nvfp4_gemm import nvfp4_gemm_eager
from arc_ao.ops.nvfp4_weight_only_gemm import augmented, nvfp4_weight_only_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager
from benchmarks.gpu.calls import CALLS
from benchmarks.gpu.providers import quantized
from benchmarks.gpu.reference import (
    ROW_SUM_TOLERANCE,
    activations,
    assert_same,
    assert_within_the_bound,
    exact_operands,
    exact_product,
    operands,
)

EPS = 1e-6
EAGER = {
    "quant_augment": quant_augment_eager,
    "rms_norm_quant_augment": producers.rms_norm_quant_augment_eager,
    "add_rms_norm_quant_augment": producers.add_rms_norm_quant_augment_eager,
    "silu_mul_quant_augment": producers.silu_mul_quant_augment_eager,
    "gelu_quant_augment": producers.gelu_quant_augment_eager,
    "nvfp4_gemm": nvfp4_gemm_eager,
    "nvfp4_weight_only_gemm": nvfp4_weight_only_gemm_eager,
}


class Check(NamedTuple):
    """One case: `error` is empty where it passed, and `skipped` says why it did not run."""

    name: str
    error: str = ""
    skipped: str = ""

    @property
    def verdict(self) -> str:
        return "FAIL" if self.error else ("skipped" if self.skipped else "PASS")


Case = tuple[str, Callable[[], str | None]]  # name; runs it, returns why it was skipped


def run_checks(cases: Iterator[Case], in_time: Callable[[], bool]) -> list[Check]:
    """Run all cases; one that fails is reported with its error and does not stop the others."""
    checks = []
    for name, case in cases:
        if not in_time():
            checks.append(Check(name, skipped="out of time"))
            continue
        try:
            checks.append(Check(name, skipped=case() or ""))
        except Exception:
            checks.append(Check(name, error=traceback.format_exc(limit=-2)))
        print(f"{checks[-1].verdict:8} {name}", flush=True)
    return checks


def all_cases(device: torch.device, *, small: bool) -> Iterator[Case]:
    """Codes and products of every backend of the device, then how the operators are called."""
    for backend in backends(device):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for channels in (40, 272) if small else (40, 4096, 18944):
                case = partial(codes, backend, device, dtype, channels)
                yield f"{backend}: codes, {dtype}, K = {channels}", case
        for rows in (1, 2, 17) if small else (1, 2, 16, 17, 64, 200, 1024):
            n, k = (33, 272) if small else (4099, 4096)
            yield f"{backend}: product, M = {rows}", partial(product, backend, device, rows, n, k)
            case = partial(weight_only_product, backend, device, rows, n, k)
            yield f"{backend}: weight-only product, M = {rows}", case
    if device.type == "cuda":
        yield from routes(device)
    for name, call in CALLS.items():
        yield name, partial(call, device)


def backends(device: torch.device) -> list[str]:
    """Dispatch levels that run on a device; "operators" is whatever the dispatcher takes."""
    if device.type != "cuda":
        return ["operators"]
    capability = torch.cuda.get_device_capability(device)
    absent = {
        "blackwell": dispatch.blackwell_absent(capability),
        "triton": dispatch.triton_absent(capability),
        "eager": None,
    }
    return ["operators", *(name for name in dispatch.BACKENDS if absent[name] is None)]


def operator(name: str, backend: str) -> Callable:
    """arc::`name` at a dispatch level."""
    if backend == "operators":
        return getattr(torch.ops.arc, name)
    return dispatch.implementation(name, backend, EAGER[name], ())


def augmentations(channels: int, device: torch.device) -> Iterator[tuple]:
    """Arguments behind x: every scale mode, every kind of extra column, every choice of
    block scales."""
    blocks = -(-channels // nvfp4.BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(channels, generator=generator).int().to(device)
    some = torch.randperm(blocks, generator=generator)[: 1 + blocks // 16].int().to(device)
    gathered = torch.randint(channels, (32,), generator=generator).int().to(device)
    none = some[:0]
    yield none, none, None, "token"
    yield some, some.flip(0), None, "token", None, gathered
    yield some, some, None, "token", order, gathered, "four_over_six"
    yield some, some, None, "token", order, gathered, "mse"
    yield some, none, None, "tensor"
    yield none, some, torch.tensor([0.01], device=device), "static"
    yield none, some, torch.tensor([0.01], device=device), "static", None, None, "mse"


def codes(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Every quantizing operator against the eager meaning on the CPU."""
    x, y = (activations(rows, channels, dtype, device) for rows in (5, 6))
    x[3, channels - 1], x[4, 0] = float("nan"), float("inf")
    weight = activations(1, channels, dtype, device)[0]
    inputs = [
        ("quant_augment", (x,)),
        ("rms_norm_quant_augment", (x, weight, EPS)),
        ("add_rms_norm_quant_augment", (x, y[:5], weight, EPS)),
        ("silu_mul_quant_augment", (x, y[:5])),
        ("gelu_quant_augment", (x, None, "none")),
        ("gelu_quant_augment", (x, y[:5], "tanh")),
    ]
    for arguments in augmentations(channels, device):
        for name, first in inputs:
            got = operator(name, backend)(*first, *arguments)
            expected = EAGER[name](*_on_cpu(first), *_on_cpu(arguments))
            for result, bits in zip(got, expected, strict=True):
                assert_same(result.cpu(), bits, f"{name}, scale mode {arguments[3]}")


def _on_cpu(values: tuple) -> tuple:
    return tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)


def product(backend: str, device: torch.device, rows: int, n: int, k: int) -> None:
    """One level's product against float64, in all output dtypes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        args = operands(rows, n, k, device, dtype)
        assert_within_the_bound(operator("nvfp4_gemm", backend)(*args.values()), args)


def weight_only_product(backend: str, device: torch.device, rows: int, n: int, k: int) -> None:
    """One level's W4A16 product against float64, to an ulp and 1e-6 of the sums."""
    weight = quantized(activations(n, k, torch.bfloat16, device), 0.06)
    right = nvfp4.decode(weight.qdata, weight.scale).double() * weight.outer.double()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, bias = activations(rows, k, dtype, device), activations(1, n, dtype, device)[0]
        left = augmented(x.double(), weight.weight_blocks)
        y = operator("nvfp4_weight_only_gemm", backend)(
            x, weight.qdata, weight.scale, weight.outer, bias, weight.weight_blocks
        )
        exact = left @ right.t() + bias.double()
        allowed = torch.finfo(dtype).eps * exact.abs() + ROW_SUM_TOLERANCE * (
            left.abs() @ right.abs().t()
        )
        # fp16 overflows to the same Inf on both sides.
        difference = torch.where(y == exact.to(dtype), 0.0, (y.double() - exact).abs())
        assert (difference <= allowed).all(), f"{dtype}: {(difference / allowed).max():.3g} bounds"


def routes(device: torch.device) -> Iterator[Case]:
    """Every rule of the GPU's table and of the default one, with and without splitting K."""
    if "triton" not in backends(device):
        return
    tables = {tuning.table_path(c) for c in (torch.cuda.get_device_capability(device), None)}
    rules = {dataclasses.replace(rule, max_m=None, n=None, k=None)
             for path in tables for rule in tuning.read_table(path)}  # fmt: skip
    for rule in sorted(rules, key=str):
        name = f"triton: {rule.route} {rule.block_m}x{rule.block_n}x{rule.block_k}"
        for rows, n, k in ((1, 257, 4096), (37, 515, 1040), (300, 4096, 272)):
            if rule.route == "row" and rows > 64:
                continue
            yield f"{name}, {rows} x {n} x {k}", partial(route, device, rule, rows, n, k)
        if rule.route != "decode":
            yield f"{name}, bit for bit", partial(route_in_integers, device, rule)


def route(device: torch.device, rule: tuning.Rule, rows: int, n: int, k: int) -> None:
    """A rule's product against float64, K in one part and in several."""
    from arc_ao.ops.cuda import triton_products

    args = operands(rows, n, k, device)
    for split in (0, 1, 3):
        tried = dataclasses.replace(rule, split=split)
        assert_within_the_bound(triton_products.nvfp4_gemm(*args.values(), rule=tried), args)


def route_in_integers(device: torch.device, rule: tuning.Rule) -> None:
    """The kernel's PTX, and what stands beside it, give the product bit for bit where every sum is
    exact; K is ragged and even."""
    from arc_ao.ops.cuda import triton_products

    for rows, n, k in ((3, 131, 1040), (2, 64, 4096)):
        args = exact_operands(rows, n, k, device)
        for assembly in (True, False):
            y = triton_products.nvfp4_gemm(**args, rule=rule, assembly=assembly)
            assert_same(y, exact_product(args), f"assembly {assembly}, {rows} x {n} x {k}")
