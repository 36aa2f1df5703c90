"""The ways to quantize the linears behind one input: what each costs and what error it leaves.

A variant settles what the input goes through (channel order, scales, branch, block scales); on top
of it come residuals of the first activation and weight blocks by removed error. Some of the linears
may stay unquantized, which leaves no error and takes their share of multiply-adds away. Errors are
sums over the linears (choice_errors.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from arc_ao.calibration.session import CalibrationSession, Member
from arc_ao.config import ARCConfig
from arc_ao.config_budget import RANKS, BudgetConfig
from arc_ao.cost import PLAIN_BITS, planned_cost
from arc_ao.memory import release_memory
from arc_ao.methods.choice_errors import Errors, GroupErrors
from arc_ao.methods.plan import GroupAnalysis, analyse_group, analyse_prepared, group_statistics
from arc_ao.methods.prepare import Preparation, branch_sweep
from arc_ao.methods.select import Selected

MOST_SUBSETS = 3  # linears of one input of which every subset may stay unquantized


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
        measure = GroupErrors(group, menu.sample, analysis, "residual" in config.methods)
        if method != "residual" and _is_beaten(menu, method, analysis, variants[-1], measure):
            continue
        weight_errors = measure.weight_errors(variants[0])
        for variant_config in variants:
            variant = _variant(method, variant_config, analysis)
            act_errors = measure.act_errors(variant_config)
            for left in _subsets(len(group)) if "exclude" in config.methods else [frozenset()]:
                menu.options += _grid(menu, variant, act_errors, weight_errors, left)
        release_memory()
    if "exclude" in config.methods:
        everything = frozenset(range(len(group)))
        menu.options.append(Option(0.0, menu.left_bits(everything), 0, left=everything))
    return menu


def _variant(method: str, config: ARCConfig, analysis: GroupAnalysis) -> Variant:
    return Variant(method, config, analysis.prepared, *analysis.scores.rankings())


def _is_beaten(
    menu: Menu, method: str, analysis: GroupAnalysis, config: ARCConfig, measure: GroupErrors
) -> bool:
    """Whether a variant without residuals is no better than some residuals that cost no more, in
    which case it is taken to be so with residuals, too, and not measured further."""
    errors = measure.act_errors(config, bare=True), measure.weight_errors(config, bare=True)
    (bare,) = _grid(menu, _variant(method, config, analysis), *errors, frozenset())
    return any(
        o.error <= bare.error and o.bits <= bare.bits and o.multiply_adds <= bare.multiply_adds
        for o in menu.options
    )


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
                ordered=config.channel_order != "none",
                scaled=config.smooth != "none",
                static=config.activation_scale == "static",
            )
            error = sum(act_error[i] + weight_error[i] for i in kept)
            cost = bits + left_bits, adds
            options.append(Option(error, *cost, variant, act_blocks, weight_blocks, left))
    return options


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
