"""What the compiler made of a quantized model: counts, reasons, passes, the graph and a drawing."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.fx import Graph

from arc_ao.inspect.draw import data_flow, draw
from arc_ao.passes.backend import ArcPass, with_ours
from arc_ao.passes.nodes import arc_calls
from arc_ao.summary import SUMMARY, arc_tensors

QUANTIZE = "quant_augment"  # fused operators end with it


@dataclass
class Explanation:
    """One compilation of a model.

    Attributes:
        linears: quantized linears of the model.
        skipped: linears left alone, by name, and why.
        operators: calls of each operator arc::* in the compiled graphs.
        passes: how often each pass applied.
        graphs: compiled graphs; 1 where nothing broke.
        graph_breaks: reasons of the breaks, and how often.
        text: the graphs after the passes, a line a node.
        flow: networkx.DiGraph of their large operators (inspect/draw.py).
    """

    linears: int
    skipped: dict[str, str]
    operators: dict[str, int] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    graph_breaks: dict[str, int] = field(default_factory=dict)
    text: str = ""
    flow: Any = None

    def save_svg(self, path: str | Path) -> None:
        """Draw the flow of data between the large operators."""
        draw(self.flow, path)

    @property
    def quantizations(self) -> int:
        """Quantizations of an input that one forward makes."""
        found = (times for name, times in self.operators.items() if name.endswith(QUANTIZE))
        return sum(found)

    @property
    def fused(self) -> int:
        """Of these, the ones that also make their input."""
        return self.quantizations - self.operators.get(QUANTIZE, 0)

    def __str__(self) -> str:
        lines = [
            f"{self.linears} linears quantized, {len(self.skipped)} left alone",
            f"{self.quantizations} quantizations of inputs, {self.fused} fused with their producer",
            f"{self.operators.get('nvfp4_gemm', 0)} products, {self.graphs} graphs, "
            f"{sum(self.graph_breaks.values())} graph breaks",
            *(f"  {name}: {times}" for name, times in self.passes.items()),
            *(f"  left alone: {name} ({reason})" for name, reason in self.skipped.items()),
            *(f"  graph break: {reason} ({times})" for reason, times in self.graph_breaks.items()),
        ]
        return "\n".join(lines)


class _Recorder(ArcPass):
    """Our passes, writing down what they did to every graph."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__()
        self.explanation = explanation

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        e = self.explanation
        e.graphs += 1
        e.passes = dict(Counter(e.passes) + Counter(self.applied))
        e.operators = dict(Counter(e.operators) + Counter(arc_calls(graph)))
        flow = data_flow(graph, f"{e.graphs}.")
        e.flow = flow if e.flow is None else networkx.union(e.flow, flow)
        e.text += f"# graph {e.graphs}\n{graph}\n"


def explain(model: nn.Module, *inputs: Any, **keywords: Any) -> Explanation:
    """Compile `model(*inputs, **keywords)` with our passes and say what came out.

    Compiles anew, without Inductor's cache, and forgets the compilation afterwards; the model is
    left as it was.
    """
    explanation = Explanation(len(arc_tensors(model)), _skipped(model))
    torch._dynamo.reset()
    counters.clear()
    passes = with_ours(config.post_grad_custom_pre_pass, _Recorder(explanation))
    patches = {"post_grad_custom_pre_pass": passes, "fx_graph_cache": False}
    try:
        with config.patch(patches), torch.no_grad():
            torch.compile(model, dynamic=None)(*inputs, **keywords)
        explanation.graph_breaks = dict(counters["graph_break"])
    finally:
        torch._dynamo.reset()
    return explanation


def _skipped(model: nn.Module) -> dict[str, str]:
    """Reasons from quantizing; a loaded model only tells which linears are not quantized."""
    summary = getattr(model, SUMMARY, None)
    if summary is not None:
        return dict(summary["skipped"])
    quantized = arc_tensors(model)
    linears = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: "in its own precision" for name in linears if name not in quantized}
