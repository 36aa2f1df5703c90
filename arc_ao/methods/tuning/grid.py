"""The grid of e2m1 for training: rounding by arithmetic, cells, and where latents start.

A latent is a code's real-valued twin, in units of its block scale: u in [-6, 6], and the code is
the one nearest to u. `round_to_grid` is `nvfp4.decode_e2m1(nvfp4.encode_e2m1(u))` without a table:
it runs over every weight at every step.
"""

import torch
from torch import Tensor

from arc_ao.formats import nvfp4

LIMIT = nvfp4.F4_E2M1_MAX
MARGIN = 0.2  # of a half cell, between a latent's start and the border of its cell
EXPONENT = 0x7F800000  # bits of a float's exponent


def round_to_grid(u: Tensor) -> Tensor:
    """Nearest e2m1 value of fp32 u, ties to even, saturating at 6.

    Values lie 1/2 apart below 2, 1 below 4 and 2 above: half the power of two below |u|.
    """
    step = (u.view(torch.int32) & EXPONENT).view(torch.float32).clamp_(1, 4).mul_(0.5)
    return (u / step).round_().mul_(step).clamp_(-LIMIT, LIMIT)


def start_latent(values: Tensor, target: Tensor) -> Tensor:
    """Latent that rounds to `values` and is as near to `target` as its cell allows, less a margin.

    What the original weight tells beyond its code is which neighbour is near. Error feedback may
    have chosen another code than the nearest; then the latent starts at the cell's border on that
    side, short of it by MARGIN, or the first step would undo the choice.

    Args:
        values: fp32, on the grid. target: fp32, of the same shape and in the same units.
    """
    low, high = _half_cells(values.device)
    codes = nvfp4.encode_e2m1(values).int()
    keep = 1 - MARGIN
    offset = torch.maximum(torch.minimum(target - values, high[codes] * keep), low[codes] * keep)
    return values + offset


def _half_cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 [16] each: from a code's value to the lower and to the upper end of its cell; what
    saturates has no cell beyond 6."""
    values = torch.tensor(nvfp4.E2M1_VALUES, dtype=torch.float32, device=device)
    half = values.diff() / 2
    above = torch.cat((half, half.new_zeros(1)))
    below = torch.cat((half[:1], half))
    return torch.cat((-below, -above)), torch.cat((above, below))
