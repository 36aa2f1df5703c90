"""Which option each layer gets: the least error under both bounds, then the model's output decides.

The knapsack adds up errors over layers, each relative to its layer's output times the layer's
weight, once as its Fisher information has it and once the square root. That is a model of the
output's divergence, so that its answers and uniform choices (the same variant and the same
shares of blocks for all layers) run through the model and the best measured one wins. Every
candidate is quantized whole before it runs.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.session import CalibrationSession
from arc_ao.config_budget import BudgetConfig
from arc_ao.cost import PLAIN_BITS
from arc_ao.methods.choices import Menu, Option, make_menu, undominated
from arc_ao.methods.compare_mixes import divergences, plans_of
from arc_ao.methods.knapsack import Item, solve
from arc_ao.methods.scores import group_worths
from arc_ao.methods.weights import LayerPlan
from arc_ao.progress import SILENT, Progress

COMPARED_TOKENS = 8192  # on which mixes are compared; four times those of the recipe search
UNIFORM_TRIED = 4


@dataclass(frozen=True)
class Limits:
    """Totals over all linears of a config."""

    bits: float
    multiply_adds: float

    def hold(self, picks: list[Option]) -> bool:
        """Whether these options, one of each menu, stay within both."""
        bits, adds = sum(p.bits for p in picks), sum(p.multiply_adds for p in picks)
        return bits <= self.bits and adds <= self.multiply_adds


@dataclass(frozen=True)
class Mix:
    """One option for every menu; `divergence` is inf until it is measured."""

    name: str
    config: BudgetConfig  # resolved
    picks: list[Option]
    divergence: float = math.inf

    def to_dict(self) -> dict[str, Any]:
        """Name and divergence."""
        return {"mix": self.name, "divergence": self.divergence}


@dataclass
class Search:
    """What a search found, the winner first, for the session's config."""

    menus: list[Menu]
    mixes: list[Mix]
    weights: list[float]  # of each menu's errors

    def by_linear(self) -> dict[str, dict[str, Any]]:
        """Name of each linear -> its choice, its cost and the error of its group."""
        return {
            member.name: _described(menu, option, i) | {"layer_weight": weight}
            for menu, option, weight in zip(
                self.menus, self.mixes[0].picks, self.weights, strict=True
            )
            for i, member in enumerate(menu.members)
        }

    def plans(self, session: CalibrationSession) -> dict[str, LayerPlan]:
        """Plans of all linears that are quantized, by name."""
        found: dict[str, LayerPlan] = {}
        for menu, option in zip(self.menus, self.mixes[0].picks, strict=True):
            if option.variant is not None:
                found |= plans_of(session, menu, option)
        return found


def _described(menu: Menu, option: Option, member: int) -> dict[str, Any]:
    """What one linear gets; what the quantized ones of an input cost is spread evenly over them."""
    weight = menu.members[member].module.weight
    described = {
        "choice": option.method(member),
        "error": option.error,
        "shared_by": [member.name for member in menu.members],
    }
    if member in option.left:
        cost = {"bits_per_weight": 8 * weight.element_size(), "extra_multiply_adds": 0.0}
        return described | cost
    left = sum(menu.members[i].module.weight.numel() for i in option.left)
    quantized = menu.num_weights - left
    bits = option.bits - menu.left_bits(option.left)
    config = option.variant.config
    return described | {
        "bits_per_weight": PLAIN_BITS + bits / quantized,
        "extra_multiply_adds": option.multiply_adds / quantized,
        "act_blocks": option.act_blocks,
        "weight_blocks": option.weight_blocks,
        "rank": config.rank,
        "channel_order": config.channel_order,
        "activation_block_scale": config.activation_block_scale,
    }


def limits_of(menus: list[Menu], config: BudgetConfig) -> Limits:
    """The config's bounds in bits and in multiply-adds per token.

    Outer scales and padding cost plain NVFP4 a little more than 4.5 bits; that much is granted.
    """
    weights = sum(menu.num_weights for menu in menus)
    least = sum(min(option.bits for option in menu.options) for menu in menus)
    return Limits(max(config.extra_bits * weights, least), config.budget * weights)


def search_mix(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    *,
    progress: Progress = SILENT,
) -> Search:
    """Measure the options of every input of a calibrated session, then mixes of them.

    Args:
        session: of a BudgetConfig, calibrated, its layer weights measured, not observing.
        batches: on which the model's output is compared; none: the mix is taken as it is.
    """
    config, groups = session.config, session.groups()
    steps = progress.steps("measure choices", groups)
    menus = [make_menu(session, group, config) for group in steps]
    weights = group_worths(session, groups)
    roots = [math.sqrt(weight) for weight in weights]
    mixes = _distinct(
        [
            best_mix(menus, weights, config),
            best_mix(menus, roots, config, "mix, roots of weights"),
            *uniform_mixes(menus, weights, config),
        ]
    )
    if not batches:
        return Search(menus, mixes[:1], weights)
    picks = [mix.picks for mix in mixes]
    measured = divergences(model, session, menus, picks, batches, progress=progress)
    mixes = [replace(mix, divergence=d) for mix, d in zip(mixes, measured, strict=True)]
    mixes.sort(key=lambda mix: mix.divergence)  # stable: the mix comes first among equals
    return Search(menus, mixes, weights)


def _distinct(mixes: list[Mix]) -> list[Mix]:
    """Without those that pick what an earlier one picks."""
    found: dict[tuple[int, ...], Mix] = {}
    for mix in mixes:
        found.setdefault(tuple(map(id, mix.picks)), mix)
    return list(found.values())


def best_mix(
    menus: list[Menu], weights: list[float], config: BudgetConfig, name: str = "mix"
) -> Mix:
    """The options of least weighed error within the limits."""
    options = [undominated(menu.options) for menu in menus]
    groups = [
        [Item(o.error * weight, (o.bits, o.multiply_adds)) for o in found]
        for found, weight in zip(options, weights, strict=True)
    ]
    limits = limits_of(menus, config)
    solution = solve(groups, (limits.bits, limits.multiply_adds))
    return Mix(
        name, config.resolve(), [found[i] for found, i in zip(options, solution.picks, strict=True)]
    )


def uniform_mixes(menus: list[Menu], weights: list[float], config: BudgetConfig) -> list[Mix]:
    """For every variant the same shares of blocks in all layers, those of least weighed error.

    The best of them by that error, UNIFORM_TRIED at most. Variants that some layer lacks, such as a
    rank that is too large for it, are left out.
    """
    tables, limits = [_by_share(menu) for menu in menus], limits_of(menus, config)
    best: dict[str, tuple[float, Mix]] = {}
    for (variant, act, weight), _ in tables[0].items():
        picks = [table.get((variant, act, weight)) for table in tables]
        if any(pick is None for pick in picks) or not limits.hold(picks):
            continue
        error = sum(pick.error * w for pick, w in zip(picks, weights, strict=True))
        if variant not in best or error < best[variant][0]:
            shares = f"{act} act and {weight} weight blocks"
            best[variant] = error, Mix(f"uniform {variant}, {shares}", config.resolve(), picks)
    ranked = sorted(best.values(), key=lambda found: found[0])
    return [mix for _, mix in ranked[:UNIFORM_TRIED]]


def _by_share(menu: Menu) -> dict[tuple[str, float, float], Option]:
    """Options by variant and shares of blocks, which are those of `block_counts`."""
    found = {}
    for option in menu.options:
        if option.left:
            continue
        config, blocks = option.variant.config, len(option.variant.act_ranking)
        method = config.activation_block_scale
        scales = "" if method == "amax" else f", {method} activation scales"
        rank = f" {config.rank}" if config.rank else ""
        name = f"{option.variant.method}{rank}, order {config.channel_order}{scales}"
        key = name, f"{option.act_blocks / blocks:.3g}", f"{option.weight_blocks / blocks:.3g}"
        found[key] = option
    return found
