"""The linears of an exported graph: aten.linear, or mm and addmm with a transposed parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from arc_ao.passes.nodes import aten, is_call

TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class GraphLinear:
    """y = x weight^T + bias in a graph."""

    name: str  # fully qualified name of the layer
    node: Node
    x: Node
    weight: Node  # get_attr
    bias: Node | None

    def as_module(self, gm: GraphModule) -> nn.Linear:
        """An nn.Linear on the same parameter, for everything that plans by modules."""
        weight = attribute(gm, self.weight.target)
        shape = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        module = nn.Linear(**shape, bias=False, device="meta", dtype=weight.dtype)
        module.weight = nn.Parameter(weight.detach(), requires_grad=False)
        return module


def attribute(gm: GraphModule, target: str) -> Tensor:
    """The tensor that a get_attr node reads."""
    path, _, name = target.rpartition(".")
    return getattr(gm.get_submodule(path), name)


def match_linear(gm: GraphModule, node: Node) -> GraphLinear | None:
    """The linear that `node` computes with a parameter of its own, or None."""
    if is_call(node, aten.linear.default):
        x, weight, *bias = node.args
        bias = bias[0] if bias else None
    elif is_call(node, aten.mm.default, aten.addmm.default):
        *bias, x, transposed = node.args
        bias = bias[0] if bias else None
        weight = _transposed(transposed)
    else:
        return None
    if not isinstance(weight, Node) or weight.op != "get_attr" or node.kwargs:
        return None
    if bias is not None and bias.op != "get_attr":
        return None
    if attribute(gm, weight.target).dim() != 2:
        return None
    return GraphLinear(weight.target.removesuffix(".weight"), node, x, weight, bias)


def _transposed(node: Node) -> Node | None:
    """w where `node` is w with its two dimensions swapped."""
    if not is_call(node, *TRANSPOSES):
        return None
    if is_call(node, aten.permute.default) and [d % 2 for d in node.args[1]] != [1, 0]:
        return None
    if is_call(node, aten.transpose.int) and {d % 2 for d in node.args[1:]} != {0, 1}:
        return None
    return node.args[0]


def other_readers(gm: GraphModule, linear: GraphLinear) -> list[Node]:
    """Nodes that read the same parameter, under this name or another, and are not this linear."""
    storage = attribute(gm, linear.weight.target).untyped_storage().data_ptr()
    readers = []
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        found = attribute(gm, node.target)
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() == storage:
            for user in node.users:
                final = next(iter(user.users), user) if is_call(user, *TRANSPOSES) else user
                if final is not linear.node:
                    readers.append(final)
    return readers


def remove_attribute(gm: GraphModule, target: str) -> None:
    """Drop a parameter that no node reads any more."""
    if any(node.op == "get_attr" and node.target == target for node in gm.graph.nodes):
        return
    path, _, name = target.rpartition(".")
    owner = gm.get_submodule(path)
    if name in owner._parameters or name in owner._buffers:
        delattr(owner, name)


def register(gm: GraphModule, name: str, value: Tensor) -> Node:
    """A buffer of the graph's module under a free name, and the node that reads it."""
    free, count = name.replace(".", "_"), 0
    while hasattr(gm, free):
        count += 1
        free = f"{name.replace('.', '_')}_{count}"
    gm.register_buffer(free, value)
    node = gm.graph.get_attr(free)
    node.meta["val"] = _fake_like(gm, value)
    return node


def _fake_like(gm: GraphModule, value: Tensor) -> Tensor:
    """A fake tensor in the mode of the graph's metadata, or a meta tensor without one."""
    for node in gm.graph.nodes:
        found = node.meta.get("val")
        if isinstance(found, torch._subclasses.FakeTensor):
            return found.fake_mode.from_tensor(value, static_shapes=True)
    return value.to("meta")
