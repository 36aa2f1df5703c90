"""Small questions about fx nodes that the passes share."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims
CASTS = (prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype)


def calls(graph: Graph, *targets: Any) -> Iterator[Node]:
    """Nodes that call one of `targets`, in order; the graph may change meanwhile."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def bound(node: Node) -> dict[str, Any]:
    """Every argument of an operator's call by name, in the schema's order, defaults included."""
    arguments = node.target._schema.arguments
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def augmentation(quantize: Node) -> tuple:
    """The arguments of an `arc::quant_augment` call behind x, which the fused producers share."""
    return tuple(bound(quantize).values())[1:]


def arc_calls(graph: Graph) -> list[str]:
    """Names of the operators arc::* that a graph calls, in order."""
    targets = (node.target for node in graph.nodes if node.op == "call_function")
    found = (target for target in targets if getattr(target, "namespace", "") == "arc")
    return [target.name().removeprefix("arc::") for target in found]


def replace_quantize(graph: Graph, quantize: Node, operator: Any, producer: tuple) -> None:
    """Put a fused operator on the producer's inputs in the place of a quantization."""
    with graph.inserting_before(quantize):
        fused = graph.call_function(operator, (*producer, *augmentation(quantize)))
    fused.meta = meta_of(quantize)
    quantize.replace_all_uses_with(fused)
    graph.erase_node(quantize)


def insert_call(graph: Graph, operator: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call whose arguments have fake tensors, and so has its result."""
    node = graph.call_function(operator, args, kwargs)
    fakes = torch.fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
    node.meta["val"] = operator(*fakes[0], **fakes[1])
    return node


def fuse_producers(graph: Graph, match: Callable[[Node], tuple | None], operator: Any) -> int:
    """Fuse what `match` finds the inputs of into the quantization that is all that reads it; how
    many."""
    fused = 0
    for quantize in calls(graph, torch.ops.arc.quant_augment.default):
        made = quantize.args[0]
        found = match(made) if len(made.users) == 1 else None
        if found is None:
            continue
        replace_quantize(graph, quantize, operator, found)
        fused += 1
    return fused


def value(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node stands for; None where tracing left none."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def is_cpu_bf16(node: Any, dims: int) -> bool:
    """Whether a node stands for a tensor in bf16 on the CPU with `dims` dimensions."""
    x = value(node)
    on_cpu = x is not None and x.device.type == "cpu"
    return on_cpu and x.dtype == torch.bfloat16 and x.dim() == dims


def value_tuple(node: Node) -> tuple | None:
    """The fake results of a call with several; None where tracing left none."""
    found = node.meta.get("val")
    return tuple(found) if isinstance(found, (tuple, list)) else None


def meta_of(node: Node) -> dict[str, Any]:
    """Metadata for the node that takes this one's place: all but what describes its arguments."""
    return {k: v for k, v in node.meta.items() if k != "eager_input_vals"}


def same_kind(*nodes: Any) -> bool:
    """Whether all nodes stand for tensors of one shape and dtype."""
    values = [value(node) for node in nodes]
    if any(v is None for v in values):
        return False
    first = values[0]
    return all(v.dtype == first.dtype and list(v.shape) == list(first.shape) for v in values)


def uncast(node: Any, dtype: torch.dtype) -> Node | None:
    """x where `node` is x cast to `dtype`, or x itself where it has that dtype; else None."""
    if value(node) is None or value(node).dtype != dtype:
        return None
    if is_call(node, *CASTS):
        return node.args[0]
    return node


def only_users(node: Node, *targets: Any) -> bool:
    """Whether every user of `node` calls one of `targets`, and there is one."""
    return bool(node.users) and all(is_call(user, *targets) for user in node.users)


def outputs(node: Node) -> list[tuple[int, Node]]:
    """Index and getitem node of every reading of a call with several results."""
    return [(user.args[1], user) for user in node.users if is_call(user, operator.getitem)]


def factors(node: Any) -> list[tuple[Any, Any]]:
    """Both orders of the operands of a product; none for other nodes."""
    if not is_call(node, aten.mul.Tensor):
        return []
    left, right = node.args
    return [(left, right), (right, left)]
