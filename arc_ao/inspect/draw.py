"""The flow of data between a graph's large operators, and a drawing of it."""

from pathlib import Path
from typing import Any

import networkx
from torch.fx import Graph, Node

from arc_ao.passes.nodes import value, value_tuple

# Besides arc::*: what multiplies, attends or looks up. The rest is drawn as part of an arrow.
LARGE = ("scaled_dot_product", "mm", "addmm", "bmm", "convolution", "embedding")
COLOURS = {"gemm": "#cfe3ff", "quant": "#ffe2c4", "other": "#e8eaed"}
ROW_INCHES, COLUMN_INCHES = 0.75, 3.2


def data_flow(graph: Graph, prefix: str = "") -> networkx.DiGraph:
    """Large operators as nodes with a `label`; arrows where one's result reaches another.

    Args:
        prefix: of the nodes' names, so that several graphs can be put side by side.
    """
    flow = networkx.DiGraph()
    reached: dict[Node, set[str]] = {}  # the large operators right before each node
    for node in graph.nodes:
        before = set().union(*(reached[source] for source in node.all_input_nodes))
        if not _is_large(node):
            reached[node] = before
            continue
        name = prefix + node.name
        flow.add_node(name, label=_label(node), kind=_kind(node))
        flow.add_edges_from((source, name) for source in before)
        reached[node] = {name}
    return _without_shortcuts(flow)


def _without_shortcuts(flow: networkx.DiGraph) -> networkx.DiGraph:
    """No arrow where a longer way leads there, such as over the residual stream."""
    reduced = networkx.transitive_reduction(flow)
    reduced.add_nodes_from(flow.nodes(data=True))
    return reduced


def draw(flow: networkx.DiGraph, path: str | Path) -> None:
    """Write a drawing, from top to bottom, in the format of the path's suffix, such as .svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generations = [sorted(names) for names in networkx.topological_generations(flow)]
    for row, names in enumerate(generations):
        for name in names:
            flow.nodes[name]["row"] = -row
    positions = networkx.multipartite_layout(flow, subset_key="row", align="horizontal")
    width = COLUMN_INCHES * max(2, *(len(names) for names in generations))
    figure, axis = plt.subplots(figsize=(width, ROW_INCHES * (1 + len(generations))))
    networkx.draw_networkx_edges(flow, positions, ax=axis, node_size=900, edge_color="#8a8f98")
    for name, (x, y) in positions.items():
        box = {"boxstyle": "round", "fc": COLOURS[flow.nodes[name]["kind"]], "ec": "#8a8f98"}
        axis.text(x, y, flow.nodes[name]["label"], ha="center", va="center", fontsize=8, bbox=box)
    axis.set_axis_off()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _is_large(node: Node) -> bool:
    name = _operator(node)
    is_arc = getattr(node.target, "namespace", "") == "arc"
    return is_arc or any(name == large or large in name.split("_", 1)[-1] for large in LARGE)


def _operator(node: Node) -> str:
    """Name without its namespace; "" for what is no operator."""
    name = getattr(node.target, "name", None)
    return name().split("::")[-1].split(".")[0] if node.op == "call_function" and name else ""


def _kind(node: Node) -> str:
    name = _operator(node)
    return next((kind for kind in ("quant", "gemm") if kind in name), "other")


def _label(node: Node) -> str:
    """Operator and shape of its (first) result."""
    several = value_tuple(node)
    first: Any = value(node) if several is None else several[0]
    shape = "" if first is None else f"\n{list(first.shape)}"
    return _operator(node).lstrip("_") + shape
