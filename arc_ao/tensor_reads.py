"""Functions that take an ARCTensor for a frozen weight: they read the values that it stands for.

Whatever has no function of its own (tensor.py, tensor_ops.py) runs on `dequantize()` and gives
plain tensors. In place it may do what changes nothing, such as an average of equal weights; any
other change would need a quantization and is refused.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from arc_ao.tensor import ARCTensor, aten, implements, implements_torch_function


def _dispatch(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    """`__torch_dispatch__`: the function of its own, or that of the dequantized weights."""
    own = cls._ATEN_OP_TABLE[cls].get(func)
    if own is not None:
        return own(func, types, args, kwargs or {})
    return _on_dequantized(func, args, kwargs or {})


ARCTensor.__torch_dispatch__ = classmethod(_dispatch)


def _on_dequantized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` with every weight dequantized; where it returns one of them, the weight itself.

    Raises:
        ValueError: it changed one, naming the function.
    """
    weights: dict[int, tuple[ARCTensor, Tensor]] = {}  # by id of the weight

    def dense(weight: ARCTensor) -> Tensor:
        return weights.setdefault(id(weight), (weight, weight.decoded()))[1]

    inference = torch.is_inference_mode_enabled()
    # PyTorch takes what a view returns for a view of the weight, which is no inference tensor.
    with torch.inference_mode(False) if inference and func.is_view else nullcontext():
        args, kwargs = tree_map_only(ARCTensor, dense, (args, kwargs))
        result = func(*args, **kwargs)
    if func._schema.is_mutable:
        for weight, values in weights.values():
            refuse_change(weight, values, str(func))
    owners = {id(values): weight for weight, values in weights.values()}
    return tree_map_only(Tensor, lambda t: owners.get(id(t), t), result)


def refuse_change(weight: ARCTensor, values: Tensor, name: str) -> None:
    """Refuse values other than those that `weight` stands for.

    Raises:
        ValueError: they differ, in a value, the dtype or the shape.
    """
    before = weight.decoded()
    if values.dtype != before.dtype or not torch.equal(values, before):
        raise ValueError(
            f"{name}: expected to leave {weight!r} as it is, found other values; a quantized "
            "weight is frozen. Leave it out, or change weight.dequantize() and quantize it again; "
            "merge adapters before a model is quantized, or attach them to the quantized one"
        )


@implements([aten.view.dtype])
def _(func, types, args, kwargs):
    raise ValueError(
        f"{args[0]!r} cannot be read as {args[1]}: it is stored in tensors of several dtypes. "
        "Save it with save_pretrained or torch.save; offload it to CPU memory, not to disk"
    )


@implements_torch_function([torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__])
def _(func, types, args, kwargs):
    """The weight stays frozen: there is no gradient that an optimizer could apply to it."""
    return args[0] if func is torch.Tensor.requires_grad_ else None


@implements_torch_function([torch.Tensor.share_memory_])
def _(func, types, args, kwargs):
    weight = args[0]
    for name in weight.__tensor_flatten__()[0]:
        getattr(weight, name).share_memory_()
    return weight


@implements_torch_function([torch.Tensor.is_shared])
def _(func, types, args, kwargs):
    """Empty tensors (no block ids) have no memory that another process could map."""
    tensors = (getattr(args[0], name) for name in args[0].__tensor_flatten__()[0])
    return all(tensor.is_shared() for tensor in tensors if tensor.numel())


@implements_torch_function([torch.Tensor.__setitem__])
def _(func, types, args, kwargs):
    """Rows of a weight that was quantized alike; of plain tensors only the values that are here."""
    weight, key, value = args
    if isinstance(value, ARCTensor):
        with torch._C.DisableTorchFunctionSubclass():
            return func(weight, key, value)
    values = weight.decoded()
    values[key] = value
    return refuse_change(weight, values, "__setitem__")


@implements_torch_function([torch.Tensor.data.__set__])
def _(func, types, args, kwargs):
    """Every inner tensor and attribute of another quantized weight of this shape."""
    weight, value = args
    if not isinstance(value, ARCTensor):
        raise ValueError(
            f"{weight!r}.data: expected a quantized weight, got {type(value).__name__}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        func(weight, value)  # dtype and device
    names, attributes = value.__tensor_flatten__()
    for name in (*names, *attributes):
        setattr(weight, name, getattr(value, name))
    for name in set(ARCTensor.optional_tensor_data_names).difference(names):
        setattr(weight, name, None)
