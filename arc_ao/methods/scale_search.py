"""Block scales of weights: the amax scale, four-over-six, or a search for the least squared error.

The search tries the e4m3 codes around the amax scale (13 neighbours, factors of about 0.57 to 1.7)
and keeps, per block of 16, the scale with the least

    sum_k importance[k] * (w[k] - q[k] * s)^2

where importance is E[x_k^2] on calibration data, or 1 without any. Every candidate is an e4m3
value, so nothing is lost by rounding the winner. Ties go to the candidate nearest to amax. The
local Hessian instead weighs the error e of a block as a whole, e H e^T with H = E[x^T x] of the
block's own 16 channels.
"""

import torch
from torch import Tensor

from arc_ao.config import WeightScale
from arc_ao.formats import nvfp4

CODE_OFFSETS = sorted(range(-6, 7), key=abs)


def choose_scales(blocks: Tensor, method: WeightScale, importance: Tensor | None = None) -> Tensor:
    """Block scales of outer-scaled weight blocks.

    Args:
        blocks: fp32 [N, K/16, 16], already multiplied by the inverse outer scale.
        method: "amax", "four_over_six", or the searches above, "mse" and "local_hessian".
        importance: for the searches, fp32 [K/16, 16], E[x^2], or [K/16, 16, 16], E[x^T x] of each
            block. "mse" reads only its diagonal; given a diagonal alone, both do the same.

    Returns:
        fp32 [N, K/16], every value an e4m3 value.
    """
    if method == "amax":
        return nvfp4.block_scale(blocks)
    if method == "four_over_six":
        return nvfp4.quantize_blocks(blocks, method="four_over_six").scale
    if method == "mse" and importance is not None and importance.dim() == 3:
        importance = importance.diagonal(dim1=1, dim2=2)
    return _search(blocks, importance)


def _search(blocks: Tensor, importance: Tensor | None) -> Tensor:
    base = nvfp4.block_scale(blocks)  # [N, K/16]
    best_scale, best_error = None, None
    for offset in CODE_OFFSETS:
        scale = nvfp4.neighbour_scale(base, offset)
        error = nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale).sub_(blocks)
        total = _weighted(error, importance)  # [N, K/16]
        if best_error is None:
            best_scale, best_error = scale, total
            continue
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, total, best_error)
    return best_scale


def _weighted(error: Tensor, importance: Tensor | None) -> Tensor:
    """Cost of errors [N, K/16, 16] per block; overwrites them."""
    if importance is None:
        return error.square_().sum(-1)
    if importance.dim() == 2:
        return error.square_().mul_(importance).sum(-1)
    weighted = torch.bmm(error.transpose(0, 1), importance).transpose(0, 1)
    return error.mul_(weighted).sum(-1)
