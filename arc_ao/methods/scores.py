"""What a residual of each channel removes: of a linear's relative error, or of the model's.

Per linear, with means E[.] over calibration tokens and sums over outputs n,

    an activation residual of channel k removes  E[(x_k - Q(x_k))^2] sum_n Q(w)[n, k]^2
    a weight residual of channel k removes       E[x_k^2] sum_n (w - Q(w))[n, k]^2

relative to the output's energy; or, where the Fisher information is known (calibration/fisher.py),
with tokens and outputs weighted by it: the divergence of the model's output per token. Values of
linears that read one input add up.
"""

import torch
from torch import Tensor, nn

from arc_ao.calibration.fisher import ChannelFisher
from arc_ao.calibration.session import CalibrationSession, Member
from arc_ao.methods.weights import WeightAnalysis, in_order

TINY = torch.finfo(torch.float32).tiny


def relative_errors(
    weights: list[WeightAnalysis],
    mean_square: Tensor,
    mean_error: Tensor,
    output_energies: list[Tensor] | None = None,
    worths: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Relative output error that residuals remove, fp32 [K16] in plan order: activation, weight.

    Args:
        output_energies: of each linear, by default those of the weights that were analysed.
        worths: of an error of 1 in each linear, default 1.
    """
    act, weight = torch.zeros_like(mean_error), torch.zeros_like(mean_error)
    for i, analysis in enumerate(weights):
        if output_energies is None:
            energy = (mean_square * (analysis.column_energy + analysis.column_error)).sum()
        else:
            energy = output_energies[i]
        scale = (1.0 if worths is None else worths[i]) / energy.clamp(min=TINY)
        act = act + mean_error * analysis.column_energy * scale
        weight = weight + mean_square * analysis.column_error * scale
    return act, weight


def fisher_errors(
    weights: list[WeightAnalysis], fisher: list[ChannelFisher], order: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Divergence per token that residuals remove, fp32 [K16] in plan order: activation, weight.

    Args:
        weights: analysed with the outputs' worths of `fisher`.
    """
    act = sum(
        in_order(one.error, order) * analysis.column_energy
        for one, analysis in zip(fisher, weights, strict=True)
    )
    weight = sum(
        in_order(one.square, order) * analysis.column_error
        for one, analysis in zip(fisher, weights, strict=True)
    )
    return act, weight


def worth_of_errors(linears: list[nn.Linear], fisher: list[ChannelFisher]) -> list[Tensor]:
    """Divergence per token that a relative output error of 1 causes in each linear, fp32 []."""
    worths = []
    for linear, one in zip(linears, fisher, strict=True):
        energy = one.output @ linear.weight.detach().float().square()
        worths.append(one.square @ energy)
    return worths


def group_worths(session: CalibrationSession, groups: list[list[Member]]) -> list[float]:
    """Worth of a relative output error in the linears of each input, with mean 1; 1 if unknown."""
    worths = []
    for group in groups:
        fisher = session.fisher_of(group, session.observer_of(group).channel_orders[0])
        if fisher is None:
            return [1.0] * len(groups)
        found = worth_of_errors([m.module for m in group], fisher)
        worths.append(torch.stack(found).mean().item())
    mean = sum(worths) / max(1, len(worths))
    return [worth / mean if mean > 0 else 1.0 for worth in worths]


def output_energies(members: list[Member], mean_square: Tensor) -> list[Tensor]:
    """Energy of each linear's output per token, fp32 [], from E[x^2] [K] in the natural order."""
    squares = [member.module.weight.detach().float().square().sum(0) for member in members]
    return [(mean_square * square).sum() for square in squares]
