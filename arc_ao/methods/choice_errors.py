"""The error that quantizing the linears of one input leaves, part by part, on kept input rows.

The errors of both quantizers are independent, so that their sum is measured by its parts:

    error(a, w) = |(Q_a(x) - x) W^T|^2 + |x (Q_w(W) - W)^T|^2      each over |x W^T|^2

with residuals of a activation and w weight blocks. With rounding "gptq", Q_w(W) is rounded by the
kept rows that errors are not measured on, so that no row judges what it has fitted.
"""

import torch
from torch import Tensor

from arc_ao.calibration.session import Member
from arc_ao.config import ARCConfig
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.methods.gptq import prepare_rounding
from arc_ao.methods.gram import Gram, effective_input
from arc_ao.methods.hessian import quantized
from arc_ao.methods.plan import GroupAnalysis, plan_member
from arc_ao.methods.select import Selected
from arc_ao.methods.weights import in_order, rows_of

MEASURED_ROWS = 512  # input rows, and output rows of each linear, that errors are measured on
MEASURED_EVERY = 4  # of the kept rows; GPTQ is fitted to the others
LEAST_SHARE = 6  # shares of blocks down to 2^-6
Errors = dict[int, list[float]]  # number of residual blocks -> relative error of each linear


def block_counts(blocks: int, per_octave: int) -> list[int]:
    """None, then shares of all blocks from 2^-LEAST_SHARE to 1 in geometric steps."""
    steps = range(LEAST_SHARE * per_octave + 1)
    return sorted({0, *(round(blocks * 2 ** (-i / per_octave)) for i in steps)})


class GroupErrors:
    """Errors of the linears of one input under one analysis.

    Args:
        sample: rows [M, K] of the input.
        residuals: whether to measure more than none of them.
    """

    def __init__(
        self, members: list[Member], sample: Tensor, analysis: GroupAnalysis, residuals: bool
    ) -> None:
        self.members, self.analysis, self.residuals = members, analysis, residuals
        judging = torch.zeros(sample.shape[0], dtype=torch.bool)
        judging[::MEASURED_EVERY] = True
        self.x = sample[judging][:MEASURED_ROWS]
        self.fitted = sample[~judging] if (~judging).any() else self.x
        self.rows = [
            slice(None, None, -(-member.module.out_features // MEASURED_ROWS)) for member in members
        ]
        self.weights = [
            m.module.weight.detach()[rows] for m, rows in zip(members, self.rows, strict=True)
        ]
        tiny = torch.finfo(torch.float32).tiny
        outputs = [self.x.float() @ weight.float().t() for weight in self.weights]
        self.energies = [y.square().sum().clamp(min=tiny) for y in outputs]

    def _counts(self, per_octave: int) -> list[int]:
        blocks = -(-self.x.shape[1] // BLOCK_SIZE)
        return block_counts(blocks, per_octave) if self.residuals else [0]

    def act_errors(self, config: ARCConfig, *, bare: bool = False) -> Errors:
        """By number of activation blocks, with exact weights; `bare` measures none of them."""
        prepared, order = self.analysis.prepared, self.analysis.order
        parts = [
            prepared.residual(member.module.weight.detach(), rows, i) / energy.sqrt()
            for i, (member, rows, energy) in enumerate(
                zip(self.members, self.rows, self.energies, strict=True)
            )
        ]
        weight = in_order(torch.cat(parts), order)  # [rows, K16]
        exact = in_order(prepared.transform_input(self.x), order)
        ranking, errors = self.analysis.scores.rankings()[0], {}
        sizes = [part.shape[0] for part in parts]
        for count in [0] if bare else self._counts(2):
            plan = plan_member(self.analysis, 0, Selected(sorted(ranking[:count])), config)
            difference = (effective_input(self.x, plan) - exact) @ weight.t()
            by_row = difference.square().sum(0).split(sizes)
            errors[count] = [rows.sum().item() for rows in by_row]
        return errors

    def weight_errors(self, config: ARCConfig, *, bare: bool = False) -> Errors:
        """By number of weight blocks, with exact inputs; `bare` measures none of them."""
        ranking, errors = self.analysis.scores.rankings()[1], {}
        gram = self._gram(config) if config.needs_hessian else None
        for count in [0] if bare else self._counts(1):
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
        names = [member.name for member in self.members]
        for i, (weight, rows) in enumerate(zip(self.weights, self.rows, strict=True)):
            plan = plan_member(self.analysis, i, selected, config)
            if gram is not None and rounding is None:
                rounding = prepare_rounding(lambda: gram, plan, names, len(self.fitted))
            tensor = quantized(weight, rows_of(plan, rows), rounding)
            difference = weight.float() - tensor.dequantize(torch.float32)
            error = (self.x.float() @ difference.t()).square().sum()
            found.append((error / self.energies[i]).item())
        return found
