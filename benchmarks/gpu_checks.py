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
from gpu_providers import quantized
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import nvfp4_gemm, producers, quant_augment
from arc_ao.ops.cuda import dispatch
from arc_ao.ops.nvfp4_gemm import decode_weight, nvfp4_gemm_eager
from arc_ao.ops.nvfp4_weight_only_gemm import augmented, nvfp4_weight_only_gemm_eager
from arc_ao.ops.quant_augment import quant_augment_eager

EPS = 1e-6
EAGER = {
    "quant_augment": quant_augment_eager,
    "rms_norm_quant_augment": producers.rms_norm_quant_augment_eager,
    "add_rms_norm_quant_augment": producers.add_rms_norm_quant_augment_eager,
    "silu_mul_quant_augment": producers.silu_mul_quant_augment_eager,
    "nvfp4_gemm": nvfp4_gemm_eager,
    "nvfp4_weight_only_gemm": nvfp4_weight_only_gemm_eager,
}
ROUNDED_EXACTLY = 0.999  # share of elements; the rest may differ by an ulp
ROW_SUM_TOLERANCE = 1e-6
HUGE_BYTES = 24 << 30  # free memory that the cases beyond 2^31 elements take
HUGE_ROWS = (1 << 18) + 1


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
    yield "empty batch", partial(empty_batch, device)
    yield "strided input", partial(strided, device)
    yield "same result twice", partial(repeatable, device)
    yield "CUDA graph", partial(cuda_graph, device)
    yield "non-default stream", partial(other_stream, device)
    yield "second device", partial(second_device, device)
    yield "quantize beyond 2^31 elements", partial(huge_input, device)
    yield "product beyond 2^31 elements", partial(huge_output, device)


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


def activations(rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of different size with outlier channels; from the third on one zero row."""
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows))
    x[:, ::37] *= 20
    x *= torch.logspace(-1, 1, rows).unsqueeze(1)
    x[2:3] = 0
    return x.to(dtype).to(device)


def augmentations(channels: int, device: torch.device) -> Iterator[tuple]:
    """Arguments behind x: every scale mode, every kind of extra column, four-over-six."""
    blocks = -(-channels // nvfp4.BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(channels, generator=generator).int().to(device)
    some = torch.randperm(blocks, generator=generator)[: 1 + blocks // 16].int().to(device)
    gathered = torch.randint(channels, (32,), generator=generator).int().to(device)
    none = some[:0]
    yield none, none, None, "token"
    yield some, some.flip(0), None, "token", None, gathered
    yield some, some, None, "token", order, gathered, True
    yield some, none, None, "tensor"
    yield none, some, torch.tensor([0.01], device=device), "static"


def codes(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> None:
    """Every quantizing operator against the eager meaning on the CPU."""
    x, y = (activations(rows, channels, dtype, device) for rows in (5, 6))
    x[3, channels - 1], x[4, 0] = float("nan"), float("inf")
    weight = activations(1, channels, dtype, device)[0]
    inputs = {
        "quant_augment": (x,),
        "rms_norm_quant_augment": (x, weight, EPS),
        "add_rms_norm_quant_augment": (x, y[:5], weight, EPS),
        "silu_mul_quant_augment": (x, y[:5]),
    }
    for arguments in augmentations(channels, device):
        for name, first in inputs.items():
            got = operator(name, backend)(*first, *arguments)
            expected = EAGER[name](*_on_cpu(first), *_on_cpu(arguments))
            for result, bits in zip(got, expected, strict=True):
                assert_same(result.cpu(), bits, f"{name}, scale mode {arguments[3]}")


def _on_cpu(values: tuple) -> tuple:
    return tuple(v.cpu() if isinstance(v, Tensor) else v for v in values)


def assert_same(got: Tensor, expected: Tensor, name: str) -> None:
    """Equal bit for bit, any NaN to any NaN."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )


def operands(rows: int, n: int, k: int, device: torch.device, dtype=torch.bfloat16) -> dict:
    """A product with residual blocks of both kinds, bias and one outer scale per row."""
    weight = quantized(activations(n, k, torch.bfloat16, device), 0.06)
    x = activations(rows, k, torch.bfloat16, device)
    a = quant_augment_eager(x, weight.act_blocks, weight.weight_blocks, None, "token")
    return {
        **dict(zip(("a", "a_scale", "a_outer"), a, strict=True)),
        "b": weight.qdata,
        "b_scale": weight.scale,
        "b_outer": weight.outer,
        "bias": activations(1, n, torch.bfloat16, device)[0],
        "out_dtype": dtype,
        "act_blocks": weight.act_blocks,
        "base_blocks": weight.base_blocks,
    }


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
        allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * (left.abs() @ right.abs().t())
        # fp16 overflows to the same Inf on both sides.
        difference = torch.where(y == exact.to(dtype), 0.0, (y.double() - exact).abs())
        assert (difference <= allowed).all(), f"{dtype}: {(difference / allowed).max():.3g} bounds"


def routes(device: torch.device) -> Iterator[Case]:
    """Every rule of the GPU's table and of the default one, with and without splitting K."""
    if "triton" not in backends(device):
        return
    from arc_ao.ops.cuda import triton_products, tuning

    tables = {tuning.table_path(c) for c in (torch.cuda.get_device_capability(device), None)}
    rules = {rule for path in tables for rule in tuning.read_table(path)}
    for rule in sorted(rules, key=str):
        for rows, n, k in ((1, 257, 4096), (37, 515, 1040), (300, 4096, 272)):
            if rule.route == "row" and rows > 64:
                continue

            def case(rule=rule, rows=rows, n=n, k=k) -> None:
                args = operands(rows, n, k, device)
                for split in (0, 1, 3):
                    tried = dataclasses.replace(rule, split=split)
                    y = triton_products.multiply(*args.values(), rule=tried)
                    assert_within_the_bound(y, args)

            name = f"triton: {rule.route} {rule.block_m}x{rule.block_n}x{rule.block_k}"
            yield f"{name}, {rows} x {n} x {k}", case


def assert_within_the_bound(y: Tensor, args: dict) -> None:
    """99.9 % of the elements equal the float64 product rounded; none is further than one ulp plus
    1e-6 of the sum of its absolute terms. fp32 only has to meet the second."""
    left = nvfp4.decode(args["a"], args["a_scale"]).double()
    right = decode_weight(args["b"], args["b_scale"], args["act_blocks"], args["base_blocks"])
    outer = args["a_outer"].double().unsqueeze(1) * args["b_outer"].double()
    right = right.double().t()
    exact = left @ right * outer + args["bias"].double()
    absolute = left.abs() @ right.abs() * outer
    rounded = exact.to(y.dtype)
    share = (y == rounded).double().mean().item()
    assert y.dtype == torch.float32 or share >= ROUNDED_EXACTLY, f"{share:.5f} rounded exactly"
    info = torch.finfo(y.dtype)
    size = rounded.double().abs().clamp_min(info.tiny)
    allowed = torch.exp2(torch.floor(torch.log2(size))) * info.eps + ROW_SUM_TOLERANCE * absolute
    difference = torch.where(y == rounded, 0.0, (y.double() - rounded.double()).abs())
    assert (difference <= allowed).all(), f"off by up to {(difference / allowed).max():.3g} bounds"


def _linear(x: Tensor, args: dict) -> Tensor:
    """Quantize x and multiply, as a layer does."""
    act_blocks = args["act_blocks"]
    a = quant_augment(x, act_blocks, act_blocks, None, "token")
    return nvfp4_gemm(*a, *list(args.values())[3:])


def empty_batch(device: torch.device) -> None:
    """M = 0 gives an empty result of the right shape, dtype and device."""
    args = operands(1, 33, 272, device)
    y = _linear(torch.empty(0, 272, dtype=torch.bfloat16, device=device), args)
    assert y.shape == (0, 33) and y.dtype == torch.bfloat16 and y.device.type == device.type


def strided(device: torch.device) -> None:
    """A transposed and a sliced input give the bits of a contiguous one."""
    args, x = operands(1, 33, 272, device), activations(6, 272, torch.bfloat16, device)
    expected = _linear(x, args)
    assert torch.equal(_linear(x.t().contiguous().t(), args), expected)
    assert torch.equal(_linear(torch.cat([x, x], 1)[:, 272:], args), expected)


def repeatable(device: torch.device) -> None:
    """K in parts is summed in a fixed order: the same bits at every call."""
    for rows in (1, 16, 300):
        args, x = operands(1, 257, 4096, device), activations(rows, 4096, torch.bfloat16, device)
        first = _linear(x, args)
        assert all(torch.equal(_linear(x, args), first) for _ in range(3))


def cuda_graph(device: torch.device) -> str | None:
    """A captured layer gives, on new input, the bits of an eager call."""
    if device.type != "cuda":
        return "needs a GPU"
    for rows in (1, 16, 300):
        args = operands(1, 515, 1040, device)
        x = activations(rows, 1040, torch.bfloat16, device)
        _linear(x, args)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = _linear(x, args)
        x.mul_(3).add_(1)
        graph.replay()
        assert torch.equal(y, _linear(x, args)), f"M = {rows}"
    return None


def other_stream(device: torch.device) -> str | None:
    """Work is put on the current stream, behind what is there."""
    if device.type != "cuda":
        return "needs a GPU"
    args, x = operands(1, 515, 4096, device), activations(64, 4096, torch.bfloat16, device)
    expected = _linear(x * 2, args)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # x * 2 is late
        y = _linear(x * 2, args)
    stream.synchronize()
    assert torch.equal(y, expected)
    return None


def second_device(device: torch.device) -> str | None:
    """Tensors of another device than the current one are worked on there."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return "needs two GPUs"
    other = torch.device("cuda", 1)
    expected = _linear(activations(5, 272, torch.bfloat16, device), operands(1, 33, 272, device))
    y = _linear(activations(5, 272, torch.bfloat16, other), operands(1, 33, 272, other))
    assert y.device == other and torch.equal(y.cpu(), expected.cpu())
    return None


def _too_small_for_huge(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    free = torch.cuda.mem_get_info(device)[0]
    if free < HUGE_BYTES:
        return f"needs {HUGE_BYTES >> 30} GiB of free memory, found {free >> 30}"
    return None


def huge_input(device: torch.device) -> str | None:
    """The last rows of x [2^18 + 1, 8208] have the codes that they have alone."""
    if reason := _too_small_for_huge(device):
        return reason
    x = torch.zeros(HUGE_ROWS, 8208, dtype=torch.bfloat16, device=device)
    x[-3:] = activations(3, 8208, torch.bfloat16, device)
    rest = (*(torch.arange(2, device=device).int(),) * 2, None, "token")
    for got, alone in zip(quant_augment(x, *rest), quant_augment(x[-3:], *rest), strict=True):
        assert_same(got[-3:], alone, "last rows")
    return None


def huge_output(device: torch.device) -> str | None:
    """The last rows of y [2^18 + 1, 8200] are what they are alone, up to the order of sums."""
    if reason := _too_small_for_huge(device):
        return reason
    args = operands(3, 8200, 64, device)
    rows = {name: args[name].repeat(HUGE_ROWS // 3 + 1, *[1] * (args[name].dim() - 1))[:HUGE_ROWS]
            for name in ("a", "a_scale", "a_outer")}  # fmt: skip
    y = nvfp4_gemm(**(args | rows))
    last = {name: value[-3:] for name, value in rows.items()}
    assert_within_the_bound(y[-3:], args | last)
    return None
