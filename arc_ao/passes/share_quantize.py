"""One quantization per input: q, k and v (gate and up, experts) read the same tensor.

Calls of `arc::quant_augment` on one tensor are equal if their block ids, scales and settings are.
Those tensors are inputs of the graph, whose values a pass does not see: equal digests (`plan`)
stand for equal values, and a call without one is compared by its nodes. The layout of the scales is
the weight's matter and not part of the digest. The same holds for what x goes through before
(`arc::transform_input`) and beside it (`arc::project_down`).
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from arc_ao.passes.nodes import bound, calls

arc = torch.ops.arc
SHARED = (arc.quant_augment.default, arc.transform_input.default, arc.project_down.default)


def share_quantize(graph: Graph) -> int:
    """Let equal calls on one tensor be one; how many went."""
    seen: dict[Any, Node] = {}
    shared = 0
    for node in calls(graph, *SHARED):
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            shared += 1
    return shared


def _key(node: Node) -> Any:
    arguments = bound(node)
    x, plan = arguments.pop("x"), arguments.pop("plan")
    layout = arguments.get("scale_layout")
    return (node.target, x, plan, layout) if plan else (node.target, x, *arguments.values())
