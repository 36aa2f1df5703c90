"""The ways to quantize the linears behind one input: what each costs and what error it leaves.

A variant settles what the input goes through (channel order, scales, branch, four-over-six); on top
of it come residuals of the first a activation and w weight blocks by removed error. The errors of
both quantizers are independent, so that their sum is measured by its parts, on kept input rows:

    error(a, w) = |(Q_a(x) - x) W^T|^2 + |x (Q_w(W) - W)^T|^2      each over |x W^T|^2

summed over the linears. Some of them may stay unquantized, which leaves no error and takes their
share of the residuals' multiply-adds away. With rounding "gptq", Q_w(W) is rounded by the other kept
rows, so that no row judges what it has fitted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from arc_ao.calibration.gram import Gram, effective_input
from arc_ao.calibration.session import CalibrationSession, Member
from arc_ao.config import ARCConfig
from arc_ao.config_budget import RANKS, BudgetConfig
from arc_ao.cost import PLAIN_BITS, planned_cost
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.memory import release_memory
from arc_ao.methods.gptq import Rounding, prepare_rounding, round_weight
from arc_ao.methods.plan import (
    GroupAnalysis,
    analyse_group,
    analyse_prepared,
    group_statistics,
    plan_member,
)
from arc_ao.methods.prepare import Preparation, branch_sweep
from arc_ao.methods.select import Selected
from arc_ao.methods.weights import LayerPlan, in_order, quantize_weight
from arc_ao.tensor import ARCTensor

MEASURED_ROWS = 512  # input rows, and output rows of each linear, that errors are measured on
MEASURED_EVERY = 4  # of the kept rows; GPTQ is fitted to the others
LEAST_SHARE = 6  # shares of blocks down to 2^-6
MOST_SUBSETS = 3  # linears of one input of which every subset may stay unquantized
Errors = dict[int, list[float]]  # number of residual blocks -> relative error of each linear


@dataclass(frozen=True)
class Variant:
    """What the linears of one input share, less their residuals."""

    method: str  # "residual" (nothing else), "rank" or "smooth"
    config: ARCConfig  # resolved
    prepared: Preparation
    act_ranking: list[int]  # block ids by removed error, most first
    weight_ranking: list[int]


@dataclass(frozen=True)
class Option:
    """One way to quantize the linears of an input, or all but those `left` as they are."""

    error: float
    bits: int  # over plain NVFP4's 4.5 a weight, of all the linears
    multiply_adds: int  # per token over the plain products
    variant: Variant | None = None  # None where all are left
    act_blocks: int = 0
    weight_blocks: int = 0
    left: frozenset[int] = frozenset()  # indices of linears

    def method(self, member: int) -> str:
        """Name of the choice for one of the linears."""
        if member in self.left:
            return "exclude"
        bare = self.variant.method == "residual" and not self.act_blocks + self.weight_blocks
        return "plain" if bare else self.variant.method

    @property
    def selected(self) -> Selected:
        """The residual blocks."""
        act, weight = self.variant.act_ranking, self.variant.weight_ranking
        return Selected(sorted(act[: self.act_blocks]), sorted(weight[: self.weight_blocks]))


@dataclass
class Menu:
    """Linears of one input and the ways to quantize them."""

    members: list[Member]
    sample: Tensor  # rows [M, K] of the input
    options: list[Option] = field(default_factory=list)

    @property
    def num_weights(self) -> int:
        """Weights of all the linears."""
        return sum(member.module.weight.numel() for member in self.members)

    def left_bits(self, left: frozenset[int]) -> int:
        """Bits over plain NVFP4's of linears that stay as they are."""
        weights = [self.members[i].module.weight for i in left]
        return round(sum(8 * w.nbytes - PLAIN_BITS * w.numel() for w in weights))


@torch.no_grad()
def make_menu(session: CalibrationSession, group: list[Member], config: BudgetConfig) -> Menu:
    """Measure every option of the linears of one input of a calibrated session.

    Raises:
        ValueError: no calibration token reached them, naming the first.
    """
    sample = session.sample_of(group)
    if sample is None:
        raise ValueError(
            f"{group[0].name}: expected calibration tokens, found none; run data that reaches the "
            "layer, or exclude it"
        )
    menu = Menu(group, sample)
    for method, analysis, variants in _analyses(session, menu, config):
        measure = _Measure(menu, analysis, config)
        weight_errors = measure.weight_errors(variants[0])
        for variant_config in variants:
            ranking = analysis.scores.rankings()
            variant = Variant(method, variant_config, analysis.prepared, *ranking)
            act_errors = measure.act_errors(variant_config)
            for left in _subsets(len(group)) if "exclude" in config.methods else [frozenset()]:
                menu.options += _grid(menu, variant, act_errors, weight_errors, left)
        release_memory()
    if "exclude" in config.methods:
        everything = frozenset(range(len(group)))
        menu.options.append(Option(0.0, menu.left_bits(everything), 0, left=everything))
    return menu


def _subsets(count: int) -> Iterator[frozenset[int]]:
    """What may stay unquantized beside others that do not: nothing first."""
    most = count - 1 if count <= MOST_SUBSETS else 1
    for size in range(most + 1):
        yield from map(frozenset, combinations(range(count), size))


def _analyses(
    session: CalibrationSession, menu: Menu, config: BudgetConfig
) -> Iterator[tuple[str, GroupAnalysis, list[ARCConfig]]]:
    """(method, analysis, configs that share it) of every variant; one analysis is alive."""
    by_order: dict[str, list[ARCConfig]] = {}
    for variant in config.variants():
        by_order.setdefault(variant.channel_order, []).append(variant)
    for variants in by_order.values():
        first, members = variants[0], menu.members
        statistics = group_statistics(session, members, first)
        yield "residual", analyse_group(members, statistics, first, menu.sample), variants
        if "smooth" in config.methods:
            smooth = [replace(v, smooth="search") for v in variants]
            yield "smooth", analyse_group(members, statistics, smooth[0], menu.sample), smooth
        if "rank" not in config.methods:
            continue
        weights = [member.module.weight for member in members]
        for rank, prepared in branch_sweep(weights, menu.sample, config, RANKS).items():
            ranked = [replace(v, rank=rank, branch=config.branch) for v in variants]
            analysis = analyse_prepared(members, statistics, ranked[0], menu.sample, prepared)
            yield "rank", analysis, ranked


def _grid(
    menu: Menu,
    variant: Variant,
    act_errors: Errors,
    weight_errors: Errors,
    left: frozenset[int],
) -> list[Option]:
    """Every number of activation blocks with every number of weight blocks."""
    kept = [i for i in range(len(menu.members)) if i not in left]
    shapes = [tuple(menu.members[i].module.weight.shape) for i in kept]
    config, options, left_bits = variant.config, [], menu.left_bits(left)
    for act_blocks, act_error in act_errors.items():
        for weight_blocks, weight_error in weight_errors.items():
            bits, adds = planned_cost(
                shapes,
                act_blocks=act_blocks,
                weight_blocks=weight_blocks,
                rank=config.rank,
                ordered=config.channel_order == "amax",
                scaled=config.smooth != "none",
                static=config.activation_scale == "static",
            )
            error = sum(act_error[i] + weight_error[i] for i in kept)
            cost = bits + left_bits, adds
            options.append(Option(error, *cost, variant, act_blocks, weight_blocks, left))
    return options


def block_counts(blocks: int, per_octave: int) -> list[int]:
    """None, then shares of all blocks from 2^-LEAST_SHARE to 1 in geometric steps."""
    steps = range(LEAST_SHARE * per_octave + 1)
    return sorted({0, *(round(blocks * 2 ** (-i / per_octave)) for i in steps)})


class _Measure:
    """Errors of the linears of one input under one analysis."""

    def __init__(self, menu: Menu, analysis: GroupAnalysis, config: BudgetConfig) -> None:
        self.menu, self.analysis = menu, analysis
        self.residuals = "residual" in config.methods
        judging = torch.zeros(menu.sample.shape[0], dtype=torch.bool)
        judging[::MEASURED_EVERY] = True
        self.x = menu.sample[judging][:MEASURED_ROWS]
        self.fitted = menu.sample[~judging] if (~judging).any() else self.x
        self.rows = [
            slice(None, None, -(-member.module.out_features // MEASURED_ROWS))
            for member in menu.members
        ]
        self.weights = [
            m.module.weight.detach()[rows] for m, rows in zip(menu.members, self.rows, strict=True)
        ]
        tiny = torch.finfo(torch.float32).tiny
        outputs = [self.x.float() @ weight.float().t() for weight in self.weights]
        self.energies = [y.square().sum().clamp(min=tiny) for y in outputs]

    def _counts(self, per_octave: int) -> list[int]:
        blocks = -(-self.x.shape[1] // BLOCK_SIZE)
        return block_counts(blocks, per_octave) if self.residuals else [0]

    def act_errors(self, config: ARCConfig) -> Errors:
        """By number of activation blocks, with exact weights."""
        prepared, order = self.analysis.prepared, self.analysis.order
        parts = [
            prepared.residual(member.module.weight.detach(), rows, i) / energy.sqrt()
            for i, (member, rows, energy) in enumerate(
                zip(self.menu.members, self.rows, self.energies, strict=True)
            )
        ]
        weight = in_order(torch.cat(parts), order)  # [rows, K16]
        exact = in_order(prepared.transform_input(self.x), order)
        ranking, errors = self.analysis.scores.rankings()[0], {}
        sizes = [part.shape[0] for part in parts]
        for count in self._counts(2):
            plan = plan_member(self.analysis, 0, Selected(sorted(ranking[:count])), config)
            difference = (effective_input(self.x, plan) - exact) @ weight.t()
            by_row = difference.square().sum(0).split(sizes)
            errors[count] = [rows.sum().item() for rows in by_row]
        return errors

    def weight_errors(self, config: ARCConfig) -> Errors:
        """By number of weight blocks, with exact inputs."""
        ranking, errors = self.analysis.scores.rankings()[1], {}
        gram = self._gram(config) if config.needs_hessian else None
        for count in self._counts(1):
            selected = Selected(weight_blocks=sorted(ranking[:count]))
            errors[count] = self._weight_errors(selected, config, gram)
        return errors

    def _gram(self, config: ARCConfig) -> Tensor:
        gram = Gram(plan_member(self.analysis, 0, Selected(), config))
        gram.add(self.fitted)
        return gram.take()

    def _weight_errors(
        self, selected: Selected, config: ARCConfig, gram: Tensor | None
    ) -> list[float]:
        rounding, found = None, []
        names = [member.name for member in self.menu.members]
        for i, (weight, rows) in enumerate(zip(self.weights, self.rows, strict=True)):
            plan = plan_member(self.analysis, i, selected, config)
            if gram is not None and rounding is None:
                rounding = prepare_rounding(lambda: gram, plan, names)
            tensor = quantized(weight, rows_of(plan, rows), rounding)
            difference = weight.float() - tensor.dequantize(torch.float32)
            error = (self.x.float() @ difference.t()).square().sum()
            found.append((error / self.energies[i]).item())
        return found


def rows_of(plan: LayerPlan, rows: slice) -> LayerPlan:
    """The plan of some output rows of its linear."""
    branches = tuple(replace(b, up=b.up[rows]) for b in plan.prepared.branches)
    scale = None if plan.scale is None else plan.scale[rows]
    return replace(plan, scale=scale, prepared=replace(plan.prepared, branches=branches))


def quantized(weight: Tensor, plan: LayerPlan, rounding: Rounding | None) -> ARCTensor:
    """Weight [N, K] as planned, rounded to nearest without `rounding`."""
    if rounding is None:
        return quantize_weight(weight, plan)
    return round_weight(weight, plan, rounding)


def undominated(options: list[Option]) -> list[Option]:
    """Those for which no other is at least as good in error, bits and multiply-adds.

    Of equals the first stays.
    """
    values = torch.tensor(
        [(o.error, o.bits, o.multiply_adds) for o in options], dtype=torch.float64
    )
    order = sorted(range(len(options)), key=lambda i: (*values[i].tolist(), i))
    kept: list[int] = []
    for i in order:  # by rising error: only those before can be better
        if not (values[kept] <= values[i]).all(1).any():
            kept.append(i)
    return [options[i] for i in sorted(kept)]
