"""What loaders, savers and serving engines do to an ARCTensor: move, cast, copy, slice, split."""

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from arc_ao.tensor import ARCTensor, aten, implements

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # that it stands for
ROW_TENSORS = ("qdata", "scale", "up")  # one row per output


def _rebuilt(weight: ARCTensor, fn, dtype: torch.dtype | None = None) -> ARCTensor:
    """New ARCTensor whose inner tensors went through `fn`. `dtype` is what the weight stands for
    (`orig_dtype`); the stored bytes do not depend on it."""
    names, attributes = weight.__tensor_flatten__()
    dtype = dtype or weight.orig_dtype
    if dtype not in DTYPES:
        raise ValueError(f"ARCTensor stands for a weight in one of {DTYPES}, cannot become {dtype}")
    tensors = {name: fn(getattr(weight, name)) for name in names}
    return ARCTensor.__tensor_unflatten__(tensors, attributes | {"orig_dtype": dtype}, None, None)


def _with_rows(weight: ARCTensor, fn) -> ARCTensor:
    """New plain ARCTensor whose per-row tensors went through `fn`; the rest is shared."""
    weight = weight.to_layout("plain")
    names, attributes = weight.__tensor_flatten__()
    tensors = {name: getattr(weight, name) for name in names}
    tensors |= {name: fn(tensors[name]) for name in ROW_TENSORS if name in tensors}
    return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    weight, dim, start, end, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    if dim % 2 == 1:
        whole = (start in (None, 0)) and (end is None or end >= weight.in_features) and step == 1
        if not whole:
            raise ValueError(
                f"ARCTensor: slicing in_features [{start}:{end}:{step}] of {weight.in_features} "
                "would cut residual blocks and the channel order; slice rows, or quantize the shard"
            )
        return return_and_correct_aliasing(
            func, args, kwargs or {}, _with_rows(weight, lambda t: t)
        )
    sliced = _with_rows(weight, lambda t: func(t, 0, start, end, step))
    return return_and_correct_aliasing(func, args, kwargs or {}, sliced)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, size = args[:2]
    dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", 0)
    if dim % 2 == 1:
        raise ValueError("ARCTensor: split along in_features is not possible; split rows")
    weight = weight.to_layout("plain")
    names, attributes = weight.__tensor_flatten__()
    shared = {name: getattr(weight, name) for name in names}
    by_row = [name for name in ROW_TENSORS if name in names]
    parts = zip(*(func(shared[name], size, 0) for name in by_row), strict=True)
    return [
        ARCTensor.__tensor_unflatten__(
            shared | dict(zip(by_row, part, strict=True)), attributes, None, None
        )
        for part in parts
    ]


@implements([aten.empty_like.default])
def _(func, types, args, kwargs):
    kwargs = kwargs or {}
    plain = {k: v for k, v in kwargs.items() if k in ("device", "pin_memory")}
    return _rebuilt(args[0], lambda t: func(t, **plain), kwargs.get("dtype"))


@implements([aten._to_copy.default, aten.zeros_like.default])
def _(func, types, args, kwargs):
    """`.to(device)` moves the stored bytes; `.to(dtype)` keeps them and changes `orig_dtype`.
    A zero weight keeps its block ids and its channel order. What moves to another kind of device
    leaves its device's layout behind, and on a GPU takes that of its kernels; on the meta device it
    keeps it."""
    kwargs = kwargs or {}
    plain = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
    source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
    if target.type not in (source.device.type, "meta"):
        source = source.packed(target) if target.type == "cuda" else source.to_layout("plain")
    copy = _rebuilt(source, lambda t: t.to(**plain, copy=True), kwargs.get("dtype"))
    if func is aten.zeros_like.default:
        return _fill(copy, 0)
    return return_and_correct_aliasing(func, args, kwargs, copy)


def _signature(weight: ARCTensor) -> tuple:
    """What two weights must have in common for one to be copied into the other."""
    names, attributes = weight.__tensor_flatten__()
    attributes = {k: v for k, v in attributes.items() if k != "input_plan"}  # copied along
    return attributes, {name: getattr(weight, name).shape for name in names}


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    """Bytes of a weight that was quantized alike, into the layout that is here; into a plain tensor
    the values. From a plain tensor only those values that are here already.

    Raises:
        ValueError: shapes, residual channels, settings or values that differ.
    """
    target, source = args[:2]
    if not isinstance(target, ARCTensor):
        return func(target, source.decoded(target.dtype), *args[2:])
    if not isinstance(source, ARCTensor):
        if torch.equal(source.to(target), target.decoded()):
            return target
    else:
        source = source.to_layout(target.weight_layout)
    if not isinstance(source, ARCTensor) or _signature(target) != _signature(source):
        raise ValueError(
            f"copy_ into {target!r}: expected a weight quantized alike, got {source!r}"
        )
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name))
    target.input_plan = source.input_plan
    return target


@implements([aten.fill_.Scalar])
def _(func, types, args, kwargs):
    return _fill(*args)


def _fill(weight: ARCTensor, value: float) -> ARCTensor:
    """Only zero can be filled in: loaders use it for padding rows."""
    if value != 0:
        raise ValueError(f"ARCTensor.fill_ takes 0 only, got {value}")
    weight.qdata.zero_()
    if weight.up is not None:
        weight.up.zero_()
    return weight
