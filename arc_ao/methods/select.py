"""Choose which blocks get a residual: one budget, all layers and both kinds compete.

For an input that several linears read, with mean over calibration tokens E[.] and sums over their
output rows n, each relative to the output energy sum_k E[x_k^2] |w_:k|^2 of its linear:

    activation residual of channel k removes   E[(x_k - Q(x_k))^2] * sum_n Q(w)[n,k]^2
    weight residual of channel k removes       E[x_k^2] * sum_n (w - Q(w))[n,k]^2   * exchange_rate

A block of 16 channels costs 16 * sum(N) multiply-adds. Blocks are taken by removed error per cost
until the budget (extra multiply-adds over those of the plain product) is spent.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arc_ao.config import ARCConfig
from arc_ao.formats.nvfp4 import BLOCK_SIZE

PAPER_RATIO = 2.0**-3  # arXiv 2601.07475: residuals for channels above 2^-3 of the layer's amax
PAPER_MULTIPLE = 64  # ... rounded up to a multiple of 64 channels


@dataclass(frozen=True)
class GroupScores:
    """One input and the linears that read it; fp32 [K16] per channel, in plan order."""

    names: list[str]
    out_features: int  # summed over the linears
    in_features: int
    act_score: Tensor  # relative output error that an activation residual removes
    weight_score: Tensor  # relative output error that a weight residual removes
    amax: Tensor  # largest magnitude of the input channel

    @property
    def cost(self) -> int:
        """Multiply-adds per token of one residual block."""
        return BLOCK_SIZE * self.out_features

    def rankings(self) -> tuple[list[int], list[int]]:
        """Ids of blocks by removed error, most first: activation and weight residuals."""
        return tuple(
            torch.argsort(_block_sums(score), descending=True, stable=True).tolist()
            for score in (self.act_score, self.weight_score)
        )


@dataclass
class Selected:
    """Residual blocks of one group: sorted block ids, or channels gathered into blocks."""

    act_blocks: list[int] = field(default_factory=list)
    weight_blocks: list[int] = field(default_factory=list)
    act_channels: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A residual block that could be taken."""

    value: float  # removed error (or relative amax) per cost
    group: int
    kind: str  # "act" or "weight"
    index: int  # block id, or rank of a chunk of 16 channels


def select(groups: list[GroupScores], config: ARCConfig) -> list[Selected]:
    """Residual blocks of every group under a resolved `config`.

    Raises:
        ValueError: explicit numbers of channels that a layer does not have, naming it.
    """
    if config.explicit:
        chosen = [c for i, g in enumerate(groups) for c in _explicit(i, g, config)]
    elif config.budget is None:
        chosen = [c for i, g in enumerate(groups) for c in _paper_rule(i, g)]
    else:
        chosen = _within_budget(groups, config)
    return _collect(groups, chosen, config)


def _within_budget(groups: list[GroupScores], config: ARCConfig) -> list[Candidate]:
    candidates = [c for i, g in enumerate(groups) for c in _candidates(i, g, config)]
    candidates.sort(key=lambda c: (-c.value, c.group, c.kind, c.index))
    left = config.budget * sum(g.out_features * g.in_features for g in groups)
    taken = []
    for candidate in candidates:
        cost = groups[candidate.group].cost
        if candidate.value > 0 and cost <= left:
            taken.append(candidate)
            left -= cost
    return taken


def _candidates(index: int, group: GroupScores, config: ARCConfig) -> list[Candidate]:
    """Every block of a group with its value; zero-valued ones included."""
    if config.selection == "threshold":
        relative = _block_amax(group) / group.amax.max().clamp(min=torch.finfo(torch.float32).tiny)
        return [Candidate(v, index, "act", b) for b, v in enumerate(relative.tolist())]
    act_rate, weight_rate = _rates(config)
    act = _act_blocks(group, config) * (act_rate / group.cost)
    weight = _block_sums(group.weight_score) * (weight_rate / group.cost)
    return [Candidate(v, index, "act", b) for b, v in enumerate(act.tolist())] + [
        Candidate(v, index, "weight", b) for b, v in enumerate(weight.tolist())
    ]


def _rates(config: ARCConfig) -> tuple[float, float]:
    """Factors of the two kinds; "inf" turns activation residuals off."""
    rate = float(config.exchange_rate)
    return (0.0, 1.0) if math.isinf(rate) else (1.0, rate)


def _act_blocks(group: GroupScores, config: ARCConfig) -> Tensor:
    """Removed error of each activation block, or of each 16 channels from the worst one on."""
    if config.granularity == "channel":
        return _block_sums(group.act_score.sort(descending=True).values)
    return _block_sums(group.act_score)


def _block_sums(per_channel: Tensor) -> Tensor:
    return per_channel.view(-1, BLOCK_SIZE).sum(1)


def _block_amax(group: GroupScores) -> Tensor:
    return group.amax.view(-1, BLOCK_SIZE).amax(1)


def _paper_rule(index: int, group: GroupScores) -> list[Candidate]:
    """Blocks with the largest amax, as many as the paper's threshold asks for."""
    above = int((group.amax > PAPER_RATIO * group.amax.max()).sum())
    channels = min(math.ceil(above / PAPER_MULTIPLE) * PAPER_MULTIPLE, group.amax.numel())
    return _largest(index, "act", _block_amax(group), channels // BLOCK_SIZE)


def _explicit(index: int, group: GroupScores, config: ARCConfig) -> list[Candidate]:
    numbers = {"act": config.num_act_channels or 0, "weight": config.num_weight_channels or 0}
    for kind, number in numbers.items():
        if number > group.amax.numel():
            raise ValueError(
                f"{group.names[0]}: asked for {number} {kind} residual channels, the layer has "
                f"{group.in_features} in_features; lower num_{kind}_channels to at most "
                f"{group.amax.numel()}"
            )
    scores = {
        "act": _block_amax(group)
        if config.selection == "threshold"
        else _act_blocks(group, config),
        "weight": _block_amax(group)
        if config.selection == "threshold"
        else _block_sums(group.weight_score),
    }
    return [
        candidate
        for kind, number in numbers.items()
        for candidate in _largest(index, kind, scores[kind], number // BLOCK_SIZE)
    ]


def _largest(index: int, kind: str, scores: Tensor, count: int) -> list[Candidate]:
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return [Candidate(scores[b].item(), index, kind, b) for b in order.tolist()]


def _collect(
    groups: list[GroupScores], chosen: list[Candidate], config: ARCConfig
) -> list[Selected]:
    """Candidates by group; ranks of channel chunks become channel ids, worst channel first."""
    selected = [Selected() for _ in groups]
    by_channel = config.granularity == "channel" and config.selection != "threshold"
    for candidate in chosen:
        target = selected[candidate.group]
        blocks = target.act_blocks if candidate.kind == "act" else target.weight_blocks
        blocks.append(candidate.index)
    for group, target in zip(groups, selected, strict=True):
        target.act_blocks.sort()
        target.weight_blocks.sort()
        if by_channel and target.act_blocks:
            worst = torch.argsort(group.act_score, descending=True, stable=True)
            target.act_channels = worst[: len(target.act_blocks) * BLOCK_SIZE].tolist()
            target.act_blocks = []
    return selected
