"""PyTorch's attention on CPUs as it stands in a graph: its inputs and its results."""

from torch.fx import Graph, Node

from arc_ao.passes.nodes import aten, is_call, outputs, value

attention = aten._scaled_dot_product_flash_attention_for_cpu.default
VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def before_repeat(node: Node) -> Node:
    """x [B, H/G, L, D] where `node` is x with each head G times in a row, else `node` itself."""
    if not is_call(node, *VIEWS) or value(node) is None:
        return node
    wide = node.args[0]
    if is_call(wide, aten.clone.default):
        wide = wide.args[0]
    if not is_call(wide, aten.expand.default):
        return node
    narrow = wide.args[0]
    if not is_call(narrow, aten.unsqueeze.default) or narrow.args[1] != 2:
        return node
    x, repeated, result = value(narrow.args[0]), value(wide), value(node)
    if x is None or repeated is None or x.dim() != 4:
        return node
    batch, few, length, size = x.shape
    groups = repeated.shape[2]
    as_expected = list(repeated.shape) == [batch, few, groups, length, size]
    as_expected &= list(result.shape) == [batch, few * groups, length, size]
    return narrow.args[0] if as_expected else node


def shared_heads(query: Node, key: Node, values: Node) -> tuple[Node, Node] | None:
    """Keys and values before they were repeated, where both were; None where shapes are unknown."""
    narrow = before_repeat(key), before_repeat(values)
    if any(value(x) is None for x in (query, *narrow)):
        return None
    heads, few, same = (value(x).shape[1] for x in (query, *narrow))
    known = all(isinstance(count, int) for count in (heads, few, same))
    return narrow if known and few == same and heads % few == 0 else (key, values)


def only_result_is_read(node: Node) -> bool:
    """Whether nothing reads the log-sum-exp of an attention."""
    return not any(index != 0 and read.users for index, read in outputs(node))


def replace_result(graph: Graph, node: Node, new: Node) -> None:
    """Let `new` stand for the result of an attention of which nothing else is read."""
    for index, result in outputs(node):
        if index == 0:
            new.meta = {**result.meta, "val": new.meta["val"]}
            result.replace_all_uses_with(new)
        graph.erase_node(result)
    graph.erase_node(node)
