"""Kronecker factors of the Fisher information, from its sums to what rounding takes.

The factor of the inputs is a Hessian whose tokens weigh what their errors cost the model's output
(methods/gram.py sums it), that of the outputs is in output_factor.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.fisher import OutputFisher
from arc_ao.methods.gptq import damping_for
from arc_ao.methods.output_factor import OutputFactor, output_factor

MOST_WEIGHT = 8.0  # of a token, over the mean: a few with large gradients must not be all there is


def forget_routed_tokens(fisher: OutputFisher, batches: list[Batch | Tensor]) -> None:
    """Let go `tokens` of a linear whose rows are not a matter of the batch's shapes, as those of an
    expert: what it reads once others are quantized are other tokens, maybe as many."""
    rows: dict[Any, list[int]] = {}
    for batch, calls in zip(batches, fisher.tokens, strict=False):  # none without kronecker
        counts = [len(call) for call in calls]
        if rows.setdefault(_shapes(batch), counts) != counts:
            fisher.tokens = []
            return


def _shapes(batch: Batch | Tensor) -> tuple:
    parts = {"": batch} if isinstance(batch, Tensor) else batch
    return tuple((key, getattr(part, "shape", None)) for key, part in parts.items())


def token_weights(fishers: list[OutputFisher | None]) -> list[list[Tensor]] | None:
    """Weights fp32 [M] of the tokens of every batch and call of the linears that read one input:
    the mean of theirs, each over its mean. None where tokens were not kept, or no error costs
    anything; no call of a batch in which the linears do not have the same ones."""
    if any(fisher is None or not fisher.tokens for fisher in fishers):
        return None
    means = [_mean_cost(fisher) for fisher in fishers]
    if not all(mean > 0 for mean in means):
        return None
    batches = zip(*(fisher.tokens for fisher in fishers), strict=True)
    return [_weights_of_batch(batch, means) for batch in batches]


def _mean_cost(fisher: OutputFisher) -> Tensor:
    """Of the tokens that cost anything: padding must not make the others look large."""
    costs = torch.cat([call for batch in fisher.tokens for call in batch])
    return costs.sum() / costs.count_nonzero().clamp(min=1)


def _weights_of_batch(batch: tuple[list[Tensor], ...], means: list[Tensor]) -> list[Tensor]:
    """Weights of every call of one batch; `batch` holds the calls of each linear."""
    if len({tuple(len(call) for call in calls) for calls in batch}) != 1:
        return []
    return [
        torch.stack([t / mean for t, mean in zip(call, means, strict=True)])
        .mean(0)
        .clamp_(max=MOST_WEIGHT)
        for call in zip(*batch, strict=True)
    ]


def factor_of(fisher: OutputFisher | None, linear: nn.Linear) -> OutputFactor | None:
    """The factor of a linear's outputs; None where their products were not summed."""
    if fisher is None or fisher.products is None:
        return None
    rows = linear.out_features
    return output_factor(fisher.products, rows, damping_for(fisher.rows, rows))
