"""Quantize an exported graph: observers at linear inputs, calibration, linears to arc operators.

    program = torch.export.export(model, example_inputs)
    prepared = prepare_arc(program, ARCConfig())
    for batch in batches:
        prepared(batch)                      # calibrate
    quantized = convert_arc(prepared)        # a GraphModule to export again

Built on torchao's prepare_pt2e and convert_pt2e, which `ARCQuantizer` also serves directly: linears
that read one tensor get one observer, and `convert` of an observer rewrites the linears behind it.
Statistics, selection and weights are those of `quantize_`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from arc_ao.calibration.few_tokens import RoundingNote, warn_of_few_tokens
from arc_ao.calibration.observer import ARCObserver
from arc_ao.calibration.padding import watch, without_padding
from arc_ao.calibration.session import Member
from arc_ao.config import ARCConfig
from arc_ao.flow.targets import DTYPES, SKIPPED_NAMES, is_ragged
from arc_ao.methods.hessian import quantize_group
from arc_ao.methods.plan import GroupAnalysis, analyse_group, make_plans
from arc_ao.methods.weights import LayerPlan
from arc_ao.passes.export.graph_linears import GraphLinear, match_linear, other_readers
from arc_ao.passes.export.rewrite_linear import rewrite_linears

ANNOTATION = "quantization_annotation"
WATCHING = "arc_watching"  # hooks that see which rows are padding
NameFilter = Callable[[str], bool]


class GraphObserver(ObserverBase):
    """Observes one input in a prepared graph; the graph's observers are planned together."""

    def __init__(self, config: ARCConfig, dtype: torch.dtype = torch.uint8, **_: Any) -> None:
        super().__init__(dtype)  # torchao also passes the fields of its QuantizationSpec
        self.config = config
        self.statistics: ARCObserver | None = None
        self.plans: dict[str, LayerPlan] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is None:
            orders = (self.config.channel_order,)
            tokens = self.config.sample_tokens
            products = self.config.needs_hessian
            observer = ARCObserver(x.shape[-1], orders, "graph input", tokens, products)
            self.statistics = observer.to(x.device)
        if x.numel():
            rows = without_padding(x)
            self.statistics.observe(rows)
            self.statistics.keep(rows)
        return x

    def calculate_qparams(self, **kwargs: Any) -> None:
        raise NotImplementedError("arc observers have statistics, not quantization parameters")

    def convert(self, gm: GraphModule, observer_node: Node) -> None:
        """torchao's hook: put arc operators in the place of the linears that read this input."""
        if self.plans is None:
            _plan_graph(gm, self.config)
        linears = _linears_behind(gm, observer_node)
        names = [linear.name for linear in linears]
        weights, plans = [li.as_module(gm).weight for li in linears], [self.plans[n] for n in names]
        rounded = quantize_group(weights, plans, names, self.statistics.gram)
        tensors = {name: r.tensor.packed() for name, r in zip(names, rounded, strict=True)}
        rewrite_linears(gm, observer_node, linears, tensors)


class ARCQuantizer(Quantizer):
    """Annotates the linears of an exported graph for torchao's prepare_pt2e.

    Args:
        config: fields that `quantize_` would measure are those of recipe "balanced", and all
            layers weigh the same. Hessians are of the unquantized model's inputs, as in
            torchao's three steps (methods/hessian.py).
        filter_fn: takes the fully qualified name of a layer; default: all but output heads and
            routers.

    Attributes:
        skipped: linears left alone, by name, and why.

    Raises:
        ValueError: a config whose layers differ by what is measured, or one that trains.
    """

    def __init__(self, config: ARCConfig | None = None, filter_fn: NameFilter | None = None):
        super().__init__()
        config = ARCConfig() if config is None else config
        if config.mixes:
            raise ValueError(
                f"ARCQuantizer: expected a config that is the same for all layers, found "
                f"{type(config).__name__}; use arc_ao.quantize_ before torch.export"
            )
        if config.tunes_codes:
            raise ValueError(
                "ARCQuantizer: expected a recipe that needs no training, found 'tuned'; take "
                "recipe='best', or use arc_ao.quantize_ before torch.export"
            )
        self.config = config.resolve()
        self.filter_fn = filter_fn
        self.skipped: dict[str, str] = {}

    def annotate(self, model: GraphModule) -> GraphModule:
        """Ask for one observer at the input of every linear that is to be quantized."""
        observer = GraphObserver.with_args(config=self.config)
        spec = QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=observer)
        for node in model.graph.nodes:
            linear = match_linear(model, node)
            if linear is None:
                continue
            reason = self._skip_reason(model, linear)
            if reason is not None:
                self.skipped[linear.name] = reason
                continue
            node.meta[ANNOTATION] = QuantizationAnnotation(
                input_qspec_map={linear.x: spec}, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Warn once of what stays in its own precision for its shape."""
        ragged = [name for name, reason in self.skipped.items() if "multiple of 16" in reason]
        if ragged:
            warnings.warn(
                f"{len(ragged)} linears stay unquantized because in_features is not a multiple of "
                f"16 (ARCConfig(pad_in_features=True) pads them): {', '.join(ragged)}",
                stacklevel=3,
            )

    def _skip_reason(self, gm: GraphModule, linear: GraphLinear) -> str | None:
        module = linear.as_module(gm)
        if self.filter_fn is not None and not self.filter_fn(linear.name):
            return "excluded by filter_fn"
        if self.filter_fn is None and linear.name.rsplit(".", 1)[-1] in SKIPPED_NAMES:
            return "output head or router, kept in its own precision"
        if module.weight.dtype not in DTYPES:
            return f"weight of dtype {module.weight.dtype}"
        if others := other_readers(gm, linear):
            return f"its weight is also read by {others[0]}; quantizing would untie them"
        if is_ragged(module, self.config):
            return f"in_features {module.in_features} is not a multiple of 16"
        return None


def prepare_arc(
    program: ExportedProgram | GraphModule,
    config: ARCConfig | None = None,
    filter_fn: NameFilter | None = None,
) -> GraphModule:
    """The program's graph with an observer at every input of a linear, to run calibration data on.

    Args:
        program: from torch.export.export, or its module().
        config, filter_fn: see ARCQuantizer.

    Raises:
        ValueError: no linear to quantize, saying why each one was skipped.
    """
    gm = program.module() if isinstance(program, ExportedProgram) else program
    quantizer = ARCQuantizer(config, filter_fn)
    prepared = prepare_pt2e(gm, quantizer)
    if not any(isinstance(module, GraphObserver) for module in prepared.modules()):
        raise ValueError(
            f"prepare_arc: expected linears to quantize, found none; skipped: {quantizer.skipped}"
        )
    prepared.meta["arc_skipped"] = quantizer.skipped
    prepared.meta[WATCHING] = watch(prepared)
    return prepared


def convert_arc(prepared: GraphModule) -> GraphModule:
    """A calibrated graph with its linears on `arc::quant_augment` and `arc::nvfp4_gemm`.

    The old weights are gone; the result exports again.

    Raises:
        ValueError: an input that no calibration data reached, naming its linears.
    """
    for handle in prepared.meta.pop(WATCHING, []):
        handle.remove()
    return convert_pt2e(prepared, fold_quantize=False)


def _linears_behind(gm: GraphModule, observer_node: Node) -> list[GraphLinear]:
    found = (match_linear(gm, user) for user in list(observer_node.users))
    return [linear for linear in found if linear is not None]


def _plan_graph(gm: GraphModule, config: ARCConfig) -> None:
    """Plan all observed linears of a graph under one budget."""
    analyses, observers = [], []
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in gm.graph.nodes:
        observer = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(observer, GraphObserver):
            continue
        linears = _linears_behind(gm, node)
        names = [linear.name for linear in linears]
        if observer.statistics is None:
            raise ValueError(
                f"{', '.join(names)}: expected calibration tokens, found none; run the prepared "
                "graph on calibration data before convert_arc"
            )
        observer.statistics.name = names[0]
        members = [Member(linear.name, linear.as_module(gm)) for linear in linears]
        statistics = observer.statistics.statistics(config.channel_order)
        sample = observer.statistics.sample.rows()
        analyses.append(analyse_group(members, statistics, config, sample))
        observers.append(observer)
    if config.rounding == "gptq":
        warn_of_few_tokens(_notes(analyses, observers), judged=False)
    plans = make_plans(analyses, config)
    for observer in observers:
        observer.plans = plans


def _notes(
    analyses: list[GroupAnalysis], observers: list[GraphObserver]
) -> dict[str, RoundingNote]:
    """What GPTQ has for every linear."""
    return {
        member.name: RoundingNote(
            "gptq", None, observer.statistics.gram.count, member.module.in_features
        )
        for analysis, observer in zip(analyses, observers, strict=True)
        for member in analysis.members
    }
