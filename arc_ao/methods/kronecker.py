"""Kronecker factors of the Fisher information, from its sums to what rounding takes.

The factor of the inputs is a Hessian whose tokens weigh what their errors cost the model's output
(calibration/gram.py sums it), that of the outputs is in output_factor.py.
"""

import torch
from torch import Tensor, nn

from arc_ao.calibration.fisher import OutputFisher
from arc_ao.methods.gptq import damping_for
from arc_ao.methods.output_factor import OutputFactor, output_factor

MOST_WEIGHT = 8.0  # of a token, over the mean: a few with large gradients must not be all there is


def token_weights(fishers: list[OutputFisher | None]) -> list[Tensor] | None:
    """Weights fp32 [M] of the tokens of every call of the linears that read one input: the mean of
    theirs, each over its mean. None where tokens were not kept, or no error costs anything."""
    if any(fisher is None or not fisher.tokens for fisher in fishers):
        return None
    means = [torch.cat(fisher.tokens).mean() for fisher in fishers]
    if not all(mean > 0 for mean in means):
        return None
    calls = zip(*(fisher.tokens for fisher in fishers), strict=False)
    return [
        torch.stack([t / mean for t, mean in zip(call, means, strict=True)])
        .mean(0)
        .clamp_(max=MOST_WEIGHT)
        for call in calls
        if len({t.shape for t in call}) == 1
    ]


def factor_of(fisher: OutputFisher | None, linear: nn.Linear) -> OutputFactor | None:
    """The factor of a linear's outputs; None where their products were not summed."""
    if fisher is None or fisher.products is None:
        return None
    rows = linear.out_features
    damping = damping_for(sum(len(call) for call in fisher.tokens), rows)
    return output_factor(fisher.products, rows, damping)
