"""arc::search_block_scales: block scales of a weight that leave the least squared error.

Tried are the e4m3 codes around that of amax/6, 13 neighbours (factors of about 0.57 to 1.7). Per
block of 16 wins the scale s with the least

    sum_k importance[k] * (w[k] - q[k] * s)^2

Every candidate is an e4m3 value, so nothing is lost by rounding the winner. The first of the least
error wins, nearest to amax/6 first. Sums are trees of halves, so that kernels agree in every bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import FP32, check, check_memory, check_tensor, described
from arc_ao.ops.registry import define

CODE_OFFSETS = sorted(range(-6, 7), key=abs)


def least_cost_scales(blocks: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales fp32 [N, K/16] of least cost among the candidates.

    Args:
        blocks: fp32 [N, K/16, 16], already multiplied by the inverse outer scale. One that holds
            NaN or Inf gets the scale NaN.
        cost: from errors [N, K/16, 16], which it may overwrite, to their cost [N, K/16].
    """
    base = nvfp4.block_scale(blocks)
    best, least = base, cost(_errors(blocks, base))
    for offset in CODE_OFFSETS[1:]:
        scale = nvfp4.neighbour_scale(base, offset)
        found = cost(_errors(blocks, scale))
        better = found < least
        best = torch.where(better, scale, best)
        least = torch.where(better, found, least)
    return best


def _errors(blocks: Tensor, scale: Tensor) -> Tensor:
    return nvfp4.decode_blocks(nvfp4.encode_blocks(blocks, scale), scale).sub_(blocks)


def search_block_scales_eager(values: Tensor, importance: Tensor | None) -> Tensor:
    """Search the block scales of a weight.

    Args:
        values: fp32 [N, K], K a multiple of 16, already multiplied by the inverse outer scale.
        importance: fp32 [K], of the squared errors in each channel, such as E[x^2]; None: 1.

    Returns:
        uint8 [N, K/16], e4m3 bits; those of NaN for a block that holds NaN or Inf.

    Raises:
        RuntimeError: other shapes or dtypes.
    """
    _check(values, importance)
    blocks = nvfp4.to_blocks(values)
    weights = None if importance is None else nvfp4.to_blocks(importance)

    def cost(errors: Tensor) -> Tensor:
        squares = errors.square_()
        return nvfp4.sum_of_halves(squares if weights is None else squares.mul_(weights))

    return nvfp4.encode_e4m3(least_cost_scales(blocks, cost))


def check_values(op: str, values: Tensor) -> None:
    """Refuse what is not fp32 [N, K], K a multiple of 16."""
    message = lambda: (
        f"{op}: values must be fp32 [N, K] with K a multiple of 16, got {described(values)}"
    )
    check_memory(op, "values", values, values.device)
    check(values.dtype == torch.float32 and values.dim() == 2, message)
    check(values.shape[1] % nvfp4.BLOCK_SIZE == 0, message)


def _check(values: Tensor, importance: Tensor | None) -> None:
    op = "search_block_scales"
    check_values(op, values)
    if importance is not None:
        check_tensor(op, "importance", importance, FP32, (values.shape[1],), values.device)


def _search_block_scales_fake(values, importance):
    _check(values, importance)
    rows, channels = values.shape
    return values.new_empty((rows, channels // nvfp4.BLOCK_SIZE), dtype=torch.uint8)


search_block_scales = define(
    "search_block_scales(Tensor values, Tensor? importance) -> Tensor",
    search_block_scales_eager,
    _search_block_scales_fake,
)
