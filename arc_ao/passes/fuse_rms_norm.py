"""RMSNorm, and the residual addition before it, into the quantization of its output.

    sum = a + b;  xs = sum.float();  r = rsqrt(mean(xs^2) + eps);  y = weight * (xs * r).to(dtype)
    quant_augment(y)  ->  arc::add_rms_norm_quant_augment(a, b, weight, eps), which returns sum

as transformers' Llama, Qwen and Mistral norms decompose. Without the addition, or where the sum is
not at hand, arc::rms_norm_quant_augment. A norm that something else reads too stays.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from arc_ao.passes.nodes import (
    aten,
    augmentation,
    bound,
    calls,
    factors,
    is_call,
    meta_of,
    only_users,
    outputs,
    replace_quantize,
    same_kind,
    uncast,
    value,
    value_tuple,
)

arc = torch.ops.arc
quant_augment = arc.quant_augment.default


@dataclass(frozen=True)
class Norm:
    """y = weight * normalised x."""

    x: Node
    weight: Node
    eps: float


def fuse_rms_norm(graph: Graph) -> int:
    """Fuse every norm whose only reader is a quantization; how many."""
    fused = 0
    for quantize in calls(graph, quant_augment):
        normed = quantize.args[0]
        norm = match_norm(normed) if only_users(normed, quant_augment) else None
        if norm is None or len(normed.users) > 1:
            continue
        if not _fuse_with_add(graph, norm, quantize):
            producer = (norm.x, norm.weight, norm.eps)
            replace_quantize(graph, quantize, arc.rms_norm_quant_augment.default, producer)
        fused += 1
    return fused


def match_norm(node: Node) -> Norm | None:
    """The norm that `node` is the output of, or None."""
    result = value(node)
    if result is None:
        return None
    for weight, normalised in factors(node):
        gain = value(weight)
        if gain is None or gain.dim() != 1 or gain.dtype != result.dtype:
            continue
        product = uncast(normalised, result.dtype)
        for wide, inverse in factors(product):
            found = _match_inverse_rms(wide, inverse)
            if found is None:
                continue
            x, eps = found
            if same_kind(x, node):
                return Norm(x, weight, eps)
    return None


def _match_inverse_rms(wide: Node, inverse: Node) -> tuple[Node, float] | None:
    """x and eps where inverse = rsqrt(mean(wide^2, -1, keepdim) + eps) and wide is x in fp32."""
    x = uncast(wide, torch.float32)
    if x is None or not is_call(inverse, aten.rsqrt.default):
        return None
    total = inverse.args[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    mean = total.args[0]
    if not is_call(mean, aten.mean.dim) or bound(mean)["keepdim"] is not True:
        return None
    square, dims = mean.args[0], list(mean.args[1])
    is_square = is_call(square, aten.pow.Tensor_Scalar) and square.args == (wide, 2)
    is_square |= is_call(square, aten.mul.Tensor) and square.args == (wide, wide)
    if not is_square or dims not in ([-1], [value(wide).dim() - 1]):
        return None
    return x, total.args[1]


def _fuse_with_add(graph: Graph, norm: Norm, quantize: Node) -> bool:
    """Where x is a sum of two tensors alike: put the fused call in the sum's place."""
    total = norm.x
    if not is_call(total, aten.add.Tensor) or total.kwargs or not same_kind(total, *total.args):
        return False
    arguments = augmentation(quantize)
    nodes = [a for a in (norm.weight, *arguments) if isinstance(a, Node)]
    order = {node: i for i, node in enumerate(graph.nodes)}
    if any(order[node] > order[total] for node in nodes):
        return False
    with graph.inserting_before(total):
        fused = graph.call_function(
            arc.add_rms_norm_quant_augment.default,
            (*total.args, norm.weight, norm.eps, *arguments),
        )
        parts = [graph.call_function(operator.getitem, (fused, i)) for i in range(4)]
    quantized = value_tuple(quantize)
    if quantized is not None:
        fused.meta = meta_of(quantize) | {"val": (*quantized, value(total))}
    for index, part in outputs(quantize):
        parts[index].meta = meta_of(part)
        part.replace_all_uses_with(parts[index])
        graph.erase_node(part)
    parts[3].meta = meta_of(total)
    total.replace_all_uses_with(parts[3])
    graph.erase_node(quantize)
    return True
