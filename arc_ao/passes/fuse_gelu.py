"""GELU, alone or times a gate's product, into the quantization of its output.

    w = x.float();  y = (w * 0.5 * (erf(w * sqrt(1/2)) + 1)).to(dtype)            BERT, ViT
    y = (w * 0.5 * (tanh(sqrt(2/pi) * (w + 0.044715 * w^3)) + 1)).to(dtype)       Gemma, GPT-2
    quant_augment(y), quant_augment(y * up)  ->  arc::gelu_quant_augment(x, up or None)

The operator has an error function of its own, whose last bits of fp32 are not those of PyTorch's:
now and then the rounded result is the neighbouring number. A GELU that something else reads stays.
"""

import math

import torch
from torch.fx import Graph, Node

from arc_ao.passes.nodes import (
    aten,
    factors,
    fuse_producers,
    is_call,
    same_kind,
    uncast,
    value,
)


def fuse_gelu(graph: Graph) -> int:
    """Fuse every GELU whose only reader is a quantization; how many."""
    return fuse_producers(graph, match_gelu_mul, torch.ops.arc.gelu_quant_augment.default)


def match_gelu_mul(node: Node) -> tuple[Node, Node | None, str] | None:
    """(x, up, approximate) where `node` is gelu(x) * up in one dtype, or gelu(x); else None."""
    alone = _match_gelu(node)
    if alone is not None:
        return alone[0], None, alone[1]
    for activated, up in factors(node):
        found = _match_gelu(activated)
        if found is not None and same_kind(found[0], up, node):
            return found[0], up, found[1]
    return None


def _match_gelu(node: Node) -> tuple[Node, str] | None:
    """(x, approximate) where `node` is gelu(x), computed in fp32 and cast back."""
    if is_call(node, aten.gelu.default):
        return node.args[0], node.kwargs.get("approximate", "none")
    if value(node) is None:
        return None
    for half, one_more in factors(uncast(node, value(node).dtype)):
        wide = _scaled(half, 0.5)
        x = None if wide is None else uncast(wide, torch.float32)
        if x is None or not is_call(one_more, aten.add.Tensor) or one_more.args[1] != 1:
            continue
        approximate = _approximation(one_more.args[0], wide)
        if approximate is not None and same_kind(x, node):
            return x, approximate
    return None


def _approximation(node: Node, wide: Node) -> str | None:
    """ "none" for erf(wide * sqrt(1/2)), "tanh" for the tanh of the cubic polynomial in wide."""
    if is_call(node, aten.erf.default):
        return "none" if _scaled(node.args[0], math.sqrt(0.5)) is wide else None
    if not is_call(node, aten.tanh.default):
        return None
    inner = _scaled(node.args[0], math.sqrt(2 / math.pi))
    if not is_call(inner, aten.add.Tensor) or inner.args[0] is not wide:
        return None
    cube = _scaled(inner.args[1], 0.044715)
    squared = [(a, b) for a, b in factors(cube) if b is wide]
    is_cube = any(is_call(a, aten.mul.Tensor) and a.args == (wide, wide) for a, _ in squared)
    return "tanh" if is_cube else None


def _scaled(node: Node, factor: float) -> Node | None:
    """x where `node` is x * factor."""
    for x, found in factors(node):
        if isinstance(x, Node) and isinstance(found, float) and math.isclose(found, factor):
            return x
    return None
