"""F.linear with an ARCTensor: the operators that compute it, and its gradient.

    y        = Q(T(x)) W_aug^T + bias, and the low-rank branch          see tensor.py
    dL/dx    = dL/dy W                      W = weight.dequantize()
    dL/dbias = sum of dL/dy over the rows

The gradient takes rounding of x for the identity (straight-through), so that layers below a
quantized linear and adapters beside it train as on the dequantized model. It keeps no activation:
all it reads is the weight, which is frozen. Operators alone have no gradient: a formula on each
would cost every call of inference a visit to Python.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arc_ao.ops import (
    nvfp4_gemm,
    nvfp4_weight_only_gemm,
    project_down,
    quant_augment,
    transform_input,
)
from arc_ao.ops.layout import scale_layout_for

if TYPE_CHECKING:
    from arc_ao.tensor import ARCTensor


def arc_linear(x: Tensor, weight: "ARCTensor", bias: Tensor | None = None) -> Tensor:
    """x [*, K] times the augmented weight: [*, N] in x's dtype, or in that of autocast.

    x may be nested. fp64 is computed in fp32. Differentiable with respect to x and bias.

    Raises:
        ValueError: the last dimension of x is not in_features, naming both.
    """
    if x.is_nested:
        parts = [arc_linear(part, weight, bias) for part in x.unbind()]
        return torch.nested.as_nested_tensor(parts, layout=x.layout)
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"linear with an ARCTensor: x has {x.shape[-1]} channels, the weight has "
            f"in_features {weight.in_features}"
        )
    if x.dtype == torch.float64:
        return arc_linear(x.float(), weight, None if bias is None else bias.float()).double()
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    trained = x.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return _StraightThrough.apply(x, weight, bias)
    return _multiply(x, weight, bias)


class _StraightThrough(torch.autograd.Function):
    """`_multiply`, differentiable with respect to x and bias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: "ARCTensor", bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.weight = inputs[1]  # by reference: a parameter that a graph saves cannot be moved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        of_x, _, of_bias = ctx.needs_input_grad
        x = gradient @ ctx.weight.decoded(gradient.dtype) if of_x else None
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None
        return x, None, bias


def _multiply(x: Tensor, weight: "ARCTensor", bias: Tensor | None) -> Tensor:
    """The operators: transform and quantize x, multiply, add the low-rank branch."""
    source = x
    if weight.input_scale is not None or weight.rotation is not None:
        x = transform_input(x, weight.input_scale, weight.rotation, weight.input_plan)
    if not weight.quantizes_input:
        y = nvfp4_weight_only_gemm(
            x,
            weight.qdata,
            weight.scale,
            weight.outer_scale,
            bias,
            weight.weight_blocks,
            weight.weight_layout,
        )
        return y.reshape(*x.shape[:-1], weight.shape[0])
    a, a_scale, a_outer = quant_augment(
        x,
        weight.act_blocks,
        weight.weight_blocks,
        weight.act_outer_scale,
        weight.activation_scale,
        channel_order=weight.channel_order,
        act_channels=weight.act_channels,
        block_scale=weight.activation_block_scale,
        plan=weight.input_plan,
        scale_layout=scale_layout_for(weight.weight_layout),
    )
    y = nvfp4_gemm(
        a,
        a_scale,
        a_outer,
        weight.qdata,
        weight.scale,
        weight.outer_scale,
        bias,
        x.dtype,
        act_blocks=weight.act_blocks,
        base_blocks=weight.base_blocks,
        b_layout=weight.weight_layout,
    )
    if weight.down is not None:
        hidden = project_down(source, weight.down, weight.input_plan)  # [M, r]
        y = torch.addmm(y, hidden, weight.up.to(x.dtype).t()).to(x.dtype)  # autocast
    return y.reshape(*x.shape[:-1], weight.shape[0])
