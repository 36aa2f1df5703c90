"""SiLU and the product of a gated MLP into the quantization of the product.

    g = gate.float();  silu = (g / (exp(-g) + 1)).to(dtype)  or  g * sigmoid(g)  or  aten.silu(gate)
    quant_augment(silu * up)        ->  arc::silu_mul_quant_augment(gate, up)

A product that something else reads too stays.
"""

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


def fuse_silu_mul(graph: Graph) -> int:
    """Fuse every gated product whose only reader is a quantization; how many."""
    return fuse_producers(graph, match_silu_mul, torch.ops.arc.silu_mul_quant_augment.default)


def match_silu_mul(node: Node) -> tuple[Node, Node] | None:
    """(gate, up) where `node` is silu(gate) * up in one dtype, or None."""
    for activated, up in factors(node):
        gate = _match_silu(activated)
        if gate is not None and same_kind(gate, up, node):
            return gate, up
    return None


def _match_silu(node: Node) -> Node | None:
    """gate where `node` is silu(gate), computed in fp32 and cast back."""
    if is_call(node, aten.silu.default):
        return node.args[0]
    if value(node) is None:
        return None
    wide_result = uncast(node, value(node).dtype)
    wide = _numerator(wide_result)
    return None if wide is None else uncast(wide, torch.float32)


def _numerator(node: Node) -> Node | None:
    """g where `node` is g / (exp(-g) + 1) or g * sigmoid(g)."""
    if is_call(node, aten.div.Tensor):
        g, denominator = node.args
        if is_call(denominator, aten.add.Tensor) and denominator.args[1] == 1:
            exponential = denominator.args[0]
            if is_call(exponential, aten.exp.default):
                negative = exponential.args[0]
                if is_call(negative, aten.neg.default) and negative.args[0] is g:
                    return g
    for g, gated in factors(node):
        if is_call(gated, aten.sigmoid.default) and gated.args[0] is g:
            return g
    return None
