"""What became of a call of an operator: right, refused or wrong."""

import math
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from arc_ao.formats import nvfp4
from arc_ao.ops import native
from arc_ao.ops.layout import from_panels, unswizzle
from arc_ao.ops.nvfp4_gemm import decode_weight
from benchmarks.operators.calls import MAKERS, Call, operator_of

# Modules of arc_ao.ops that hold the eager meaning of operators that are not their namesakes.
MODULES = {
    "rms_norm_quant_augment": "producers",
    "add_rms_norm_quant_augment": "producers",
    "silu_mul_quant_augment": "producers",
    "gelu_quant_augment": "producers",
    "block_residuals": "encode_blocks",
    "transform_input": "input_transform",
    "project_down": "input_transform",
}
# Refusals that depend on more than what tracing knows: numbers, and memory.
BY_VALUE = (" holds ",)
BY_MEMORY = ("bytes of memory", "contiguous copy", "allocate", "bad_alloc", "for storage of size")


class Outcome(NamedTuple):
    """ "right", "refused" or "wrong", and why."""

    kind: str
    why: str


class Result(NamedTuple):
    """What a call returned, or how it was refused."""

    outputs: tuple[Tensor, ...] | None
    refusal: str


def outcome_of(call: Call, number: int) -> Outcome:
    """Run a call by a kernel, by its meaning and in tracing; levels take turns."""
    levels = native.available_levels()
    if levels:
        level = levels[number // len(MAKERS) % len(levels)]
        with native.capped_at(level):
            found = result_of(operator_of(call), call)
    else:
        found = result_of(operator_of(call), call)
    if found.outputs is None and any(words in found.refusal for words in BY_MEMORY):
        return Outcome("refused", found.refusal)
    meaning = result_of(eager_of(call), call)
    for refusal in (found.refusal, meaning.refusal):
        if refusal and not refusal.startswith((f"{call.op}: ", f"Could not run 'arc::{call.op}'")):
            return Outcome("wrong", f"a refusal that does not name the operator: {refusal}")
    if difference := disagreement(call, found, meaning):
        return Outcome("wrong", difference)
    traced = result_of(operator_of(call), call, in_tracing)
    if difference := traced and untraced(found, traced):
        return Outcome("wrong", difference)
    return Outcome("right" if found.outputs is not None else "refused", found.refusal)


def in_tracing(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments without their numbers; None where one has no such form."""
    mode = FakeTensorMode()

    def fake(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    if any(isinstance(x, Tensor) and not is_plain(x) for x in arguments.values()):
        return None
    return {name: fake(x) for name, x in arguments.items()}


def is_plain(x: Tensor) -> bool:
    """Whether x has a fake that PyTorch can make."""
    return x.layout is torch.strided and not x.is_nested and not x.is_quantized


def result_of(
    function: Callable,
    call: Call,
    prepare: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda arguments: arguments,
) -> Result | None:
    """Of one call; an error of another kind than a refusal names no operator."""
    arguments = prepare(call.arguments)
    if arguments is None:
        return None
    try:
        outputs = function(*arguments.values())
    except Exception as error:
        refusal = str(error) if isinstance(error, RuntimeError) else traceback.format_exc(limit=-3)
        return Result(None, refusal)
    return Result(outputs if isinstance(outputs, tuple) else (outputs,), "")


def eager_of(call: Call) -> Callable:
    """The meaning of the operator."""
    module = import_module(f"arc_ao.ops.{MODULES.get(call.op, call.op)}")
    return getattr(module, f"{call.op}_eager")


def untraced(found: Result, traced: Result) -> str:
    """How tracing differs from the call, or ""."""
    if traced.outputs is None:
        return "" if found.outputs is None else f"only tracing refuses: {traced.refusal}"
    if found.outputs is None:
        by_value = any(words in found.refusal for words in BY_VALUE)
        return "" if by_value else f"tracing does not refuse: {found.refusal}"
    kinds = [[(tuple(x.shape), x.dtype) for x in r.outputs] for r in (found, traced)]
    return "" if kinds[0] == kinds[1] else f"tracing gives {kinds[1]}, the kernel {kinds[0]}"


def disagreement(call: Call, found: Result, meaning: Result) -> str:
    """How the kernel differs from the meaning, or ""."""
    if (found.outputs is None) != (meaning.outputs is None):
        return f"kernel: {found.refusal or 'runs'}; meaning: {meaning.refusal or 'runs'}"
    if found.outputs is None:
        return ""
    compare = COMPARISONS.get(call.op, same_bits)
    for i, (mine, expected) in enumerate(zip(found.outputs, meaning.outputs, strict=True)):
        if (mine.shape, mine.dtype) != (expected.shape, expected.dtype):
            return (
                f"output {i}: {mine.dtype} {mine.shape}, expected {expected.dtype} {expected.shape}"
            )
        if mine.is_meta or not mine.numel():
            continue  # without numbers
        if not compare(call.arguments, mine.detach(), expected.detach()):
            return f"output {i} differs: {mine.flatten()[:8]}, expected {expected.flatten()[:8]}"
    return ""


def same_bits(arguments: dict[str, Any], found: Tensor, expected: Tensor) -> bool:
    """Every NaN is the same."""
    nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected).bool()
    return torch.equal(found.isnan(), nan) and torch.equal(
        found.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    )


def within(
    found: Tensor, expected: Tensor, sizes: Tensor, relative: float, more: Tensor | float = 0.0
) -> bool:
    """Whether sums of numbers whose magnitudes add up to `sizes` differ by no more than an order of
    adding and `more` explain. Where they may overflow on the way, anything goes."""
    most = torch.finfo(found.dtype).max / 4
    counts = ~(sizes >= most) | sizes.isnan()
    nan = (found.isnan() == expected.isnan()) | ~counts
    found, expected = found.double(), expected.double()
    error = (found - expected).abs().nan_to_num(0.0, math.inf, math.inf)
    error = error.masked_fill(found == expected, 0)
    close = error <= relative * expected.abs() + 2e-6 * sizes + more + 1e-37
    return bool((nan & (close | ~counts | expected.isnan())).all())


def same_product(arguments: dict[str, Any], found: Tensor, expected: Tensor) -> bool:
    """Of nvfp4_gemm."""
    given = dict(arguments)
    a, b = ((given[name], given[f"{name}_scale"]) for name in "ab")
    if given["b_layout"] == "swizzled":
        a, b, given["act_blocks"] = unswizzle(*a), unswizzle(*b), None
    elif given["b_layout"] == "panels":
        b = from_panels(*b)
    left = nvfp4.decode(*a).double().abs()
    right = decode_weight(*b, given["act_blocks"], given["base_blocks"]).double().abs()
    outer = given["a_outer"].double().abs().unsqueeze(1) * given["b_outer"].double().abs()
    # Products are scaled twice, and may overflow in between.
    steps = (left @ right.t()) * given["a_outer"].double().abs().clamp(min=1).unsqueeze(1)
    sizes = torch.maximum(steps, (left @ right.t()) * outer)
    if given["bias"] is not None:
        sizes = sizes + given["bias"].double().abs()
    return within(found, expected, sizes, 2 * torch.finfo(found.dtype).eps)


def same_linear(arguments: dict[str, Any], found: Tensor, expected: Tensor) -> bool:
    """Of bf16_linear."""
    x, weight, bias = (None if t is None else t.double().abs() for t in arguments.values())
    sizes = x @ weight.t() if bias is None else x @ weight.t() + bias
    flushed = x @ weight.t() - normal(x) @ normal(weight).t()  # what subnormal inputs add
    return within(found, expected, sizes, 2**-6, flushed)


def normal(x: Tensor) -> Tensor:
    """x without what bf16 holds as subnormal numbers."""
    return x.masked_fill(x < torch.finfo(torch.bfloat16).tiny, 0)


def same_attention(arguments: dict[str, Any], found: Tensor, expected: Tensor) -> bool:
    """Of attention: weights are rounded to bf16, and a score's own error moves its weight."""
    query, key, value = (arguments[name].double().abs() for name in ("query", "key", "value"))
    if not value.numel() or not expected.numel():
        return same_bits(arguments, found, expected)
    group = query.shape[1] // key.shape[1]
    product = query.sum((-2, -1)) * key.sum((-2, -1)).repeat_interleave(group, 1)
    unscaled = product[..., None, None]  # at least the largest score
    score = unscaled * abs(arguments["scale"])
    largest = value.amax(-2, keepdim=True).repeat_interleave(group, 1)
    bound = (2**-6 + score * 2**-22).clamp(max=2) * largest + 1e-6
    overflows = ~(torch.maximum(score, unscaled) < 1e38) | ~(largest * key.shape[2] < 1e38)
    nan = found.isnan() == expected.isnan()
    close = (found.double() - expected.double()).abs() <= bound
    return bool(((nan & (close | expected.isnan())) | overflows).all())


COMPARISONS = {
    "nvfp4_gemm": same_product,
    "bf16_linear": same_linear,
    "attention": same_attention,
}
