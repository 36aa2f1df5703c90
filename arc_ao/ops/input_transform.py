"""arc::transform_input and arc::project_down: what a linear's input goes through besides rounding.

    transform_input(x) = (x * input_scale) H        smoothing, then a block Hadamard rotation
    project_down(x)    = x down^T                   first half of a low-rank branch, in x's dtype

They are operators, and carry the digest `plan`, so that graph passes can tell that q, k and v (gate
and up) do the same to one tensor: a pass sees tensors by name, not their values. After sharing,
the passes put plain PyTorch operators in their place (passes/lower_transforms.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.formats.rotation import rotate
from arc_ao.ops.checks import FLOATING, FP32, check, check_rows, check_tensor
from arc_ao.ops.registry import define

SIGNS = (torch.int8,)


def transform_input_eager(
    x: Tensor, input_scale: Tensor | None, rotation: Tensor | None, plan: str = ""
) -> Tensor:
    """Scale and rotate the channels of x.

    Args:
        x: bf16, fp16 or fp32 [*, K].
        input_scale: fp32 [K], powers of two, or None.
        rotation: int8 [h, h], signs of an orthonormal matrix for every h channels, or None.
        plan: digest of the other arguments; changes nothing here.

    Returns:
        [*, K] in x's dtype. Scaling is exact; rotation is computed in fp32 and rounded once.

    Raises:
        RuntimeError: a scale or a rotation that does not fit K.
    """
    _check(x, input_scale, rotation)
    y = x.contiguous()
    if input_scale is not None:
        y = y * input_scale.to(x.dtype)
    if rotation is not None:
        y = rotate(y, rotation).to(x.dtype)
    return y.clone() if y is x else y


def _transform_input_fake(x, input_scale, rotation, plan=""):
    _check(x, input_scale, rotation)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: Tensor, input_scale: Tensor | None, rotation: Tensor | None) -> None:
    op = "transform_input"
    check_rows(op, "x", x)
    channels = x.shape[-1]
    if input_scale is not None:
        check_tensor(op, "input_scale", input_scale, FP32, (channels,), x.device)
    if rotation is not None:
        check_tensor(op, "rotation", rotation, SIGNS, (None, None), x.device)
        size = rotation.shape[0]
        check_tensor(op, "rotation", rotation, SIGNS, (size, size), x.device)
        message = f"{op}: x has {channels} channels, no multiple of the rotation's {size}"
        check(size > 0 and channels % size == 0, message)


def project_down_eager(x: Tensor, down: Tensor, plan: str = "") -> Tensor:
    """x [*, K] times down^T, down [r, K] in 16 bits: [M, r] in x's dtype.

    Raises:
        RuntimeError: an x of another K, or what is not in floating point.
    """
    _check_down(x, down)
    return F.linear(x.reshape(-1, x.shape[-1]), down.to(x.dtype))


def _project_down_fake(x, down, plan=""):
    _check_down(x, down)
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((rows, down.shape[0]))


def _check_down(x: Tensor, down: Tensor) -> None:
    check_rows("project_down", "x", x)
    check_tensor("project_down", "down", down, FLOATING, (None, None), x.device)
    check(
        x.shape[-1] == down.shape[1],
        lambda: f"project_down: x has {x.shape[-1]} channels, down has {down.shape[1]}",
    )


transform_input = define(
    'transform_input(Tensor x, Tensor? input_scale, Tensor? rotation, str plan="") -> Tensor',
    transform_input_eager,
    _transform_input_fake,
)
project_down = define(
    'project_down(Tensor x, Tensor down, str plan="") -> Tensor',
    project_down_eager,
    _project_down_fake,
)
