"""`torch.compile(model, backend="arc")`: Inductor with our passes; or Inductor's own, with them.

The passes run on Inductor's graph of aten operators before its own rewrites. They are appended to
what other libraries put there, and their `uuid` is a hash of their sources and of what the
machine offers them, so that Inductor's caches hold.
"""

from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule

from arc_ao.ops import native
from arc_ao.passes.pipeline import run_passes

SOURCES = tuple(str(path) for path in sorted(Path(__file__).parent.glob("*.py")))


class ArcPass(CustomGraphPass):
    """Our passes as one pass of Inductor."""

    def __init__(self) -> None:
        self.applied: dict[str, int] = {}  # of the last graph

    def __call__(self, graph: Graph) -> None:
        self.applied = run_passes(graph)

    def uuid(self) -> Any:
        return get_hash_for_files(SOURCES, f"arc_ao {native.pairs_are_fast()}")


ARC_PASS = ArcPass()


def arc(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Backend "arc" of torch.compile: Inductor with its `mode` and `options`, and our passes."""
    from torch._inductor.compile_fx import compile_fx

    patches = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    patches |= options or {}
    before = patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
    patches["post_grad_custom_pre_pass"] = with_ours(before)
    return compile_fx(gm, example_inputs, config_patches=patches)


def enable_inductor_passes() -> None:
    """Run our passes in every later compilation by Inductor, such as a plain torch.compile."""
    config.post_grad_custom_pre_pass = with_ours(config.post_grad_custom_pre_pass)


def disable_inductor_passes() -> None:
    """Undo `enable_inductor_passes`; passes of other libraries stay."""
    present = config.post_grad_custom_pre_pass
    if present is ARC_PASS:
        config.post_grad_custom_pre_pass = None
    elif isinstance(present, (list, tuple)):
        rest = [p for p in present if p is not ARC_PASS]
        config.post_grad_custom_pre_pass = rest[0] if len(rest) == 1 else rest or None


def with_ours(present: Any, ours: ArcPass = ARC_PASS) -> Any:
    """What is there and our pass behind it, once."""
    found = list(present) if isinstance(present, (list, tuple)) else [present]
    others = [p for p in found if p is not None and not isinstance(p, ArcPass)]
    return [*others, ours] if others else ours
