"""Linears that stay in bf16, such as the output head, by our CPU kernel while decoding.

    mm(x [M, K], W^T), addmm(bias, x, W^T)  ->  arc::bf16_linear(x, W, bias)      M <= 8

Where weights come from memory, reading them is all there is to it: 131 MB of a head (32000 x 2048)
take PyTorch's kernel 4.7 ms on two Zen 5 cores, ours 2.9, at the bandwidth of the memory. That was
a fifth of a quantized 1B-shape model's time for a token. Sums run in another order.
"""

import torch
from torch.fx import Graph, Node

from arc_ao.ops import native
from arc_ao.ops.bf16_linear import MAX_ROWS
from arc_ao.passes.nodes import aten, calls, insert_call, is_call, is_cpu_bf16, meta_of, value

MIN_WEIGHT = 1 << 20  # numbers; smaller ones stay in the caches


def use_native_linear(graph: Graph) -> int:
    """Replace every product of a few rows with a large weight, where ours is faster; how many."""
    if not native.pairs_are_fast():
        return 0
    replaced = 0
    for node in calls(graph, aten.mm.default, aten.addmm.default):
        found = _arguments(node)
        if found is None:
            continue
        with graph.inserting_before(node):
            new = insert_call(graph, torch.ops.arc.bf16_linear.default, *found)
        new.meta = {**meta_of(node), "val": new.meta["val"]}
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced += 1
    return replaced


def _arguments(node: Node) -> tuple[Node, Node, Node | None] | None:
    """x, weight and bias of the product; None where the kernel does not serve."""
    bias = None
    if is_call(node, aten.addmm.default):
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        bias, x, transposed = node.args
    else:
        x, transposed = node.args
    weight = _before_transpose(transposed)
    if weight is None or not all(is_cpu_bf16(n, dims=2) for n in (x, weight)):
        return None
    rows, shape = value(x).shape[0], value(weight).shape
    known = all(isinstance(size, int) for size in (rows, *shape))
    if not known or not 0 < rows <= MAX_ROWS or shape[0] * shape[1] < MIN_WEIGHT:
        return None
    if bias is not None and not (
        is_cpu_bf16(bias, dims=1) and list(value(bias).shape) == [shape[0]]
    ):
        return None
    return x, weight, bias


def _before_transpose(node: Node) -> Node | None:
    """W [N, K], its rows in one piece, where `node` is W^T."""
    is_transpose = is_call(node, aten.permute.default) and list(node.args[1]) == [1, 0]
    if not is_transpose and not is_call(node, aten.t.default):
        return None
    weight = value(node.args[0])
    in_rows = weight is not None and weight.dim() == 2 and weight.stride(1) == 1
    return node.args[0] if in_rows else None
