"""Attention in bf16 by our CPU kernel, where that is the faster one.

    attention(q [B, H, T, D], repeat(k [B, H/G, L, D], G), repeat(v, G), mask)
        ->  arc::attention(q, k, v, mask)

PyTorch's kernel multiplies bf16 by way of a library that is slow on CPUs with AVX-512 BF16 and no
tile registers: 34 ms for 512 queries and 592 keys of 32 heads on a Zen 5 core, where ours takes 7,
and a seventh of a quantized prompt's time. Nothing is repeated, either. Sums run in another order,
so results differ in their last bits.
"""

import math

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from arc_ao.ops import native
from arc_ao.passes.attention_calls import (
    attention,
    only_result_is_read,
    replace_result,
    shared_heads,
)
from arc_ao.passes.nodes import bound, calls, insert_call, is_cpu_bf16, value


def use_native_attention(graph: Graph) -> int:
    """Replace every attention that the kernel serves, where it is the faster one; how many."""
    if not native.pairs_are_fast():
        return 0
    replaced = 0
    for node in calls(graph, attention):
        found = _arguments(node)
        if found is None or not only_result_is_read(node):
            continue
        with graph.inserting_before(node):
            new = insert_call(graph, torch.ops.arc.attention.default, *found)
        replace_result(graph, node, new)
        replaced += 1
    return replaced


def _arguments(node: Node) -> tuple | None:
    """Arguments of arc::attention for the same result; None where it does not serve."""
    given = bound(node)
    query, mask, causal = given["query"], given["attn_mask"], given["is_causal"]
    if given["dropout_p"] != 0 or (causal and mask is not None):
        return None
    pair = shared_heads(query, given["key"], given["value"])
    if pair is None or not all(is_cpu_bf16(x, dims=4) for x in (query, *pair)):
        return None
    key, values = pair
    if not _fits(mask, key):
        return None
    channels = value(query).shape[-1]
    if not isinstance(channels, int) or channels % 2:
        return None
    scale = given["scale"]
    return query, key, values, mask, causal, 1 / math.sqrt(channels) if scale is None else scale


def _fits(mask: Node | None, key: Node) -> bool:
    """No mask, or one with a number for each key that the kernel reads."""
    if mask is None:
        return True
    x = value(mask)
    if x is None or x.dtype not in (torch.bfloat16, torch.float32) or x.dim() > 4:
        return False
    return statically_known_true(x.shape[-1] == value(key).shape[2])
