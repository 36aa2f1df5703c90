"""Block scales of weights: the amax scale, four-over-six, or a search for the least squared error.

"mse" weighs errors by importance, E[x_k^2] on calibration data, or 1 without any; its candidates
are in ops/search_block_scales.py. The local Hessian instead weighs the error e of a block as a
whole, e H e^T with H = E[x^T x] of the block's own 16 channels.
"""

import torch
from torch import Tensor

from arc_ao.config import WeightScale
from arc_ao.formats import nvfp4
from arc_ao.ops import search_block_scales
from arc_ao.ops.search_block_scales import least_cost_scales


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
    return nvfp4.decode_e4m3(choose_scale_bits(blocks, method, importance))


def choose_scale_bits(
    blocks: Tensor, method: WeightScale, importance: Tensor | None = None
) -> Tensor:
    """The same as e4m3 bits, uint8 [N, K/16]."""
    if method == "amax":
        return nvfp4.encode_e4m3(nvfp4.block_scale(blocks))
    if method == "four_over_six":
        return nvfp4.encode_e4m3(nvfp4.quantize_blocks(blocks, method="four_over_six").scale)
    if importance is not None and importance.dim() == 3:
        if method == "local_hessian":
            return _by_local_hessian(blocks, importance)
        importance = importance.diagonal(dim1=1, dim2=2)
    by_channel = None if importance is None else importance.flatten()
    return search_block_scales(blocks.flatten(1), by_channel)


def _by_local_hessian(blocks: Tensor, hessian: Tensor) -> Tensor:
    def cost(errors: Tensor) -> Tensor:
        weighted = torch.bmm(errors.transpose(0, 1), hessian).transpose(0, 1)
        return errors.mul_(weighted).sum(-1)

    return nvfp4.encode_e4m3(least_cost_scales(blocks, cost))
