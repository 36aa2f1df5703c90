"""What the tests of the graph passes share: inputs, a quantization, tracing and counting."""

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from arc_ao.ops import quant_augment

BLOCKS, OTHERS = torch.tensor([1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)


def inputs(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(2, 5, 64, generator=generator).to(dtype) for _ in range(2))
    return x, other, torch.randn(64, generator=generator).to(dtype)


def quantize(x: Tensor, blocks: Tensor, plan: str = "p", **changes) -> tuple[Tensor, ...]:
    return quant_augment(x, blocks, blocks, None, "token", plan=plan, **changes)


def traced(fn, *arguments) -> GraphModule:
    return make_fx(fn, tracing_mode="fake")(*arguments)


def count(gm: GraphModule, operator) -> int:
    """Calls of any overload."""
    return sum(getattr(n.target, "overloadpacket", None) is operator for n in gm.graph.nodes)


def rewritten(fn, rewrite, *arguments) -> tuple[GraphModule, int]:
    """The graph of `fn` after one pass, and how often it applied; the results must be the same."""
    gm = traced(fn, *arguments)
    applied = rewrite(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    flat = torch.utils._pytree.tree_leaves
    for new, old in zip(flat(gm(*arguments)), flat(fn(*arguments)), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    return gm, applied


def unknown(gm: GraphModule) -> GraphModule:
    """The graph without what tracing knows of its tensors."""
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    return gm
