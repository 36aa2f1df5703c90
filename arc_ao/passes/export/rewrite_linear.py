"""Linears behind one input to one `arc::quant_augment` and a product each; or, where activations
are not quantized, to an `arc::nvfp4_weight_only_gemm` each."""

import operator

import torch
from torch.fx import GraphModule, Node

from arc_ao.ops.layout import scale_layout_for
from arc_ao.passes.export.graph_linears import GraphLinear, register, remove_attribute
from arc_ao.passes.nodes import aten, meta_of, value
from arc_ao.tensor import INPUT_TENSORS, TRANSFORM_TENSORS, ARCTensor

arc = torch.ops.arc


def rewrite_linears(
    gm: GraphModule,
    observer_node: Node,
    linears: list[GraphLinear],
    tensors: dict[str, ARCTensor],
) -> None:
    """Replace the linears that read `observer_node`, and the observer by its input."""
    x = observer_node.args[0]
    first, hidden = tensors[linears[0].name], None
    with gm.graph.inserting_before(observer_node):
        ids = _register_ids(gm, linears[0].name, first)
        transformed = _transform(gm, x, ids, first)
        if first.quantizes_input:
            quantized = _quantize(gm, transformed, ids, first)
            hidden = _project_down(gm, x, ids["down"], first)
    for linear in linears:
        tensor = tensors[linear.name]
        with gm.graph.inserting_before(linear.node):
            if tensor.quantizes_input:
                y = _multiply(gm, quantized, linear, tensor, ids, value(linear.node))
                y = _add_branch(gm, y, hidden, linear, tensor)
            else:
                y = _multiply_as_is(gm, transformed, linear, tensor)
            shaped = _shaped_like(gm, y, x, linear.node)
        shaped.meta = meta_of(linear.node)
        linear.node.replace_all_uses_with(shaped)
        gm.graph.erase_node(linear.node)
    observer_node.replace_all_uses_with(x)
    gm.graph.erase_node(observer_node)
    for linear in linears:
        _erase_unread(gm, linear.weight)
        remove_attribute(gm, linear.weight.target)


def _erase_unread(gm: GraphModule, weight: Node) -> None:
    """The read of a parameter and its transposition, where nothing is left that uses them. Not by
    eliminate_dead_code: torchao walks over the observers of dead code, too."""
    for user in list(weight.users):
        if not user.users:
            gm.graph.erase_node(user)
    if not weight.users:
        gm.graph.erase_node(weight)


def _register_ids(gm: GraphModule, name: str, tensor: ARCTensor) -> dict[str, Node | None]:
    """The nodes of what is done to x."""
    read = (*INPUT_TENSORS, *TRANSFORM_TENSORS) if tensor.quantizes_input else TRANSFORM_TENSORS
    found = {inner: getattr(tensor, inner) for inner in read}
    return {
        inner: None if data is None else register(gm, f"{name}_{inner}", data)
        for inner, data in found.items()
    }


def _transform(gm: GraphModule, x: Node, ids: dict[str, Node | None], tensor: ARCTensor) -> Node:
    """x scaled and rotated."""
    if tensor.input_scale is None and tensor.rotation is None:
        return x
    transform = (x, ids["input_scale"], ids["rotation"], tensor.input_plan)
    return gm.graph.call_function(arc.transform_input.default, transform)


def _quantize(
    gm: GraphModule, x: Node, ids: dict[str, Node | None], tensor: ARCTensor
) -> tuple[Node, ...]:
    """The three results of quantizing x."""
    call = gm.graph.call_function(
        arc.quant_augment.default,
        (
            x,
            ids["act_blocks"],
            ids["weight_blocks"],
            ids["act_outer_scale"],
            tensor.activation_scale,
            ids["channel_order"],
            ids["act_channels"],
            tensor.activation_block_scale,
            tensor.input_plan,
            scale_layout_for(tensor.weight_layout),
        ),
    )
    return tuple(gm.graph.call_function(operator.getitem, (call, i)) for i in range(3))


def _project_down(gm: GraphModule, x: Node, down: Node | None, tensor: ARCTensor) -> Node | None:
    """First half of the low-rank branch, once for all linears behind x."""
    if down is None:
        return None
    return gm.graph.call_function(arc.project_down.default, (x, down, tensor.input_plan))


def _add_branch(
    gm: GraphModule, y: Node, hidden: Node | None, linear: GraphLinear, tensor: ARCTensor
) -> Node:
    """y and the second half of the low-rank branch."""
    if hidden is None:
        return y
    up = register(gm, f"{linear.name}_up", tensor.up.to(value(linear.node).dtype))
    transposed = gm.graph.call_function(aten.permute.default, (up, [1, 0]))
    return gm.graph.call_function(aten.addmm.default, (y, hidden, transposed))


def _multiply(
    gm: GraphModule,
    quantized: tuple[Node, ...],
    linear: GraphLinear,
    tensor: ARCTensor,
    ids: dict[str, Node | None],
    result: torch.Tensor,
) -> Node:
    weights = [
        register(gm, f"{linear.name}_{inner}", getattr(tensor, inner))
        for inner in ("qdata", "scale", "outer_scale")
    ]
    arguments = (*quantized, *weights, linear.bias, result.dtype)
    return gm.graph.call_function(
        arc.nvfp4_gemm.default,
        (*arguments, ids["act_blocks"], tensor.base_blocks, tensor.weight_layout),
    )


def _multiply_as_is(gm: GraphModule, x: Node, linear: GraphLinear, tensor: ARCTensor) -> Node:
    """x, which is not quantized, times the weight."""
    b, b_scale, b_outer, weight_blocks = (
        register(gm, f"{linear.name}_{inner}", getattr(tensor, inner))
        for inner in ("qdata", "scale", "outer_scale", "weight_blocks")
    )
    return gm.graph.call_function(
        arc.nvfp4_weight_only_gemm.default,
        (x, b, b_scale, b_outer, linear.bias, weight_blocks, tensor.weight_layout),
    )


def _shaped_like(gm: GraphModule, y: Node, x: Node, linear: Node) -> Node:
    """y [M, N] in the shape of the linear's result; sizes that vary are read from x."""
    shape = list(value(linear).shape)
    if len(shape) == 2:
        return y
    sizes = [
        size if isinstance(size, int) else gm.graph.call_function(aten.sym_size.int, (x, i))
        for i, size in enumerate(shape)
    ]
    return gm.graph.call_function(aten.reshape.default, (y, sizes))
