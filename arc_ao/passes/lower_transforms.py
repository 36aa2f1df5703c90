"""What a linear's input goes through, in plain operators: in the norm before it, or for Inductor.

    transform_input(weight * normalised, s) ->  (weight * s) * normalised    if nothing else reads x
    transform_input(x, s)                   ->  x * s
    transform_input(x, s, H)                ->  (x * s) H, block by block
    project_down(x, down)                   ->  mm(x, down^T)

All keep the bits: s holds powers of two, so the products with it are exact, and the rest is the
operators' own arithmetic. A package for other processes needs nothing of ours for them, then.
"""

import torch
from torch.fx import Graph, Node

from arc_ao.passes.fuse_rms_norm import match_norm
from arc_ao.passes.nodes import (
    aten,
    bound,
    calls,
    factors,
    insert_call,
    is_call,
    meta_of,
    prims,
    value,
)

transform_input = torch.ops.arc.transform_input.default
project_down = torch.ops.arc.project_down.default


def fold_input_scale(graph: Graph) -> int:
    """Fold scales into the gain of the norm whose only reader they are; how many."""
    folded = 0
    for node in calls(graph, transform_input):
        x, scale, rotation = node.args[:3]
        norm = match_norm(x) if scale is not None and rotation is None else None
        if norm is None or len(x.users) > 1:
            continue
        normalised = next(other for gain, other in factors(x) if gain is norm.weight)
        with graph.inserting_before(node):
            gain = insert_call(
                graph, aten.mul.Tensor, norm.weight, _cast(graph, scale, value(x).dtype)
            )
            product = insert_call(graph, aten.mul.Tensor, gain, normalised)
        _replace(graph, node, product)
        graph.erase_node(x)
        folded += 1
    return folded


def lower_transforms(graph: Graph) -> int:
    """Put plain operators in the place of transforms and projections; how many."""
    lowered = 0
    for node in calls(graph, transform_input, project_down):
        if value(node.args[0]) is None:
            continue
        with graph.inserting_before(node):
            lower = _lower_transform if is_call(node, transform_input) else _lower_projection
            result = lower(graph, **{k: v for k, v in bound(node).items() if k != "plan"})
        _replace(graph, node, result)
        lowered += 1
    return lowered


def _lower_transform(
    graph: Graph, x: Node, input_scale: Node | None, rotation: Node | None
) -> Node:
    dtype = value(x).dtype
    if input_scale is not None:
        x = insert_call(graph, aten.mul.Tensor, x, _cast(graph, input_scale, dtype))
    if rotation is None:
        return x
    size, shape = value(rotation).shape[0], value(x).shape
    blocks = insert_call(graph, aten.reshape.default, _cast(graph, x, torch.float32), [-1, size])
    signs = _cast(graph, rotation, torch.float32)
    rotated = insert_call(graph, aten.mm.default, blocks, signs)
    rotated = insert_call(graph, aten.mul.Tensor, rotated, size**-0.5)
    sizes = [n if isinstance(n, int) else _size(graph, x, i) for i, n in enumerate(shape)]
    return _cast(graph, insert_call(graph, aten.reshape.default, rotated, sizes), dtype)


def _lower_projection(graph: Graph, x: Node, down: Node) -> Node:
    rows = insert_call(graph, aten.reshape.default, x, [-1, value(down).shape[1]])
    factor = _cast(graph, down, value(x).dtype)
    return insert_call(
        graph, aten.mm.default, rows, insert_call(graph, aten.permute.default, factor, [1, 0])
    )


def _size(graph: Graph, x: Node, dim: int) -> Node:
    """A size that varies, as a node."""
    node = graph.call_function(aten.sym_size.int, (x, dim))
    node.meta["val"] = value(x).shape[dim]
    return node


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    if value(node).dtype == dtype:
        return node
    return insert_call(graph, prims.convert_element_type.default, node, dtype)


def _replace(graph: Graph, node: Node, result: Node) -> None:
    result.meta = meta_of(node) | {"val": result.meta["val"]}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
