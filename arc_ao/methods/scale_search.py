"""Block scales of weights: the amax scale, four-over-six, or a search for the least squared error.

The search tries the e4m3 codes around the amax scale (13 neighbours, factors of about 0.57 to 1.7)
and keeps, per block of 16, the scale with the least

    sum_k importance[k] * (w[k] - q[k] * s)^2

where importance is E[x_k^2] on calibration data, or 1 without any. Every candidate is an e4m3
value, so nothing is lost by rounding the winner. Ties go to the candidate nearest to amax.
"""

from typing import Literal

import torch
from torch import Tensor

from arc_ao.formats import nvfp4

WeightScale = Literal["amax", "mse", "four_over_six"]
CODE_OFFSETS = sorted(range(-6, 7), key=abs)
SMALLEST_CODE, LARGEST_CODE = 1, 0x7E  # 2^-9 and 448


def choose_scales(blocks: Tensor, method: WeightScale, importance: Tensor | None = None) -> Tensor:
    """Block scales of outer-scaled weight blocks.

    Args:
        blocks: fp32 [N, K/16, 16], already multiplied by the inverse outer scale.
        method: "amax", "mse" (the search above) or "four_over_six".
        importance: fp32 [K/16, 16], non-negative; only "mse" uses it.

    Returns:
        fp32 [N, K/16], every value an e4m3 value.
    """
    if method == "amax":
        return nvfp4.block_scale(blocks)
    if method == "four_over_six":
        return nvfp4.quantize_blocks(blocks, four_over_six=True).scale
    return _search(blocks, importance)


def _search(blocks: Tensor, importance: Tensor | None) -> Tensor:
    base = nvfp4.encode_e4m3(nvfp4.block_scale(blocks)).short()  # [N, K/16]
    best_scale, best_error = None, None
    for offset in CODE_OFFSETS:
        code = (base + offset).clamp_(SMALLEST_CODE, LARGEST_CODE)
        scale = nvfp4.decode_e4m3(code.to(torch.uint8))
        error = nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale).sub_(blocks)
        error.square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(-1)  # [N, K/16]
        if best_error is None:
            best_scale, best_error = scale, total
            continue
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, total, best_error)
    return best_scale
