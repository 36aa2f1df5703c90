"""Refusals of the operators. Like those of PyTorch's own operators they are RuntimeErrors; the
eager meaning, tracing and the native kernels refuse the same calls, before anything is read.

Sizes may be symbols while a graph is traced: what is not known then is checked when it runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

BYTES, IDS, FP32, BF16 = (torch.uint8,), (torch.int32,), (torch.float32,), (torch.bfloat16,)
FLOATING = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int32: "int32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
Dtypes = tuple[torch.dtype, ...]


def check(condition: bool | torch.SymBool, message: str | Callable[[], str]) -> None:
    """Raise RuntimeError(message) unless `condition`."""
    if condition is not True:
        torch._check(condition, message if callable(message) else lambda: message)


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Dtypes,
    sizes: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """Refuse a tensor of another dtype, of other sizes (None fits all), or that `check_memory`
    refuses; messages name the operator and the argument."""

    def message() -> str:
        expected = ", ".join("*" if size is None else str(size) for size in sizes)
        return f"{op}: {name} must be {names(dtypes)} [{expected}], got {described(tensor)}"

    check_memory(op, name, tensor, device)
    check(tensor.dtype in dtypes and tensor.dim() == len(sizes), message)
    for found, size in zip(tensor.shape, sizes, strict=True):
        if size is not None:
            check(found == size, message)


def check_rows(op: str, name: str, x: Tensor) -> None:
    """Refuse what is not bf16, fp16 or fp32 [*, K] with channels."""
    check_memory(op, name, x, x.device)
    check(x.dtype in FLOATING, lambda: f"{op}: {name} must be {names(FLOATING)}, got {x.dtype}")
    check(x.dim() > 0, f"{op}: {name} must have at least one dimension [*, K], got a scalar")
    check(
        x.shape[-1] > 0,
        lambda: f"{op}: {name} must have at least one channel, got {described(x)}",
    )


def check_same(op: str, name: str, first: Tensor, other: Tensor) -> None:
    """Refuse another shape or dtype than that of the first input."""

    def message() -> str:
        return (
            f"{op}: {name} must have the shape and dtype of the first input, {described(first)}, "
            f"got {described(other)}"
        )

    check_memory(op, name, other, first.device)
    check(first.dtype == other.dtype and first.dim() == other.dim(), message)
    for expected, found in zip(first.shape, other.shape, strict=True):
        check(found == expected, message)


def check_ids(
    op: str,
    name: str,
    ids: Tensor | None,
    limit: int,
    device: torch.device,
    count: int | None = None,
) -> None:
    """Refuse what is not int32 [count] with ids from 0 to limit - 1; the ids themselves are looked
    at on CPUs alone, where that waits for nothing."""
    if ids is None:
        return
    check_tensor(op, name, ids, IDS, (count,), device)
    if not has_values(ids):
        return
    for found in (int(ids.min()), int(ids.max())):
        check(0 <= found < limit, f"{op}: {name} holds {found}, expected 0 to {limit - 1}")


def check_memory(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse sparse, nested and opaque tensors, those on another device, and those whose storage
    was freed or made smaller: PyTorch's own operators, too, would read behind it."""
    check(
        tensor.layout is torch.strided and not tensor.is_nested,
        lambda: (
            f"{op}: {name} must be a dense tensor, got {tensor.layout}"
            f"{' of nested tensors' if tensor.is_nested else ''}"
        ),
    )
    check(
        tensor.device == device,
        lambda: f"{op}: {name} is on {tensor.device}, expected {device}",
    )
    if has_values(tensor):
        held = tensor.untyped_storage().nbytes()
        check(
            end_of(tensor) * tensor.itemsize <= held,
            lambda: (
                f"{op}: {name} is {described(tensor)}, but only {held} bytes of memory are behind "
                "it"
            ),
        )


def has_values(tensor: Tensor) -> bool:
    """Whether there are values that can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not is_fake(tensor) and tensor.numel() > 0


def end_of(tensor: Tensor) -> int:
    """Place in its storage behind the last value of a tensor, in elements."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1


def names(dtypes: Dtypes) -> str:
    """Such as "bf16, fp16 or fp32"."""
    *before, last = (NAMES[dtype] for dtype in dtypes)
    return f"{', '.join(before)} or {last}" if before else last


def described(tensor: Tensor) -> str:
    """Dtype and shape."""
    return f"{NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}"
