"""Channel scales: what is hard to quantize in a channel moves between the input and the weight.

    y = (x / s) (w * s)^T            s[k] > 0 per input channel, 1 where nothing is known

SmoothQuant (arXiv 2211.10438) takes s = amax_x^a / amax_w^b; SVDQuant (2411.05007) searches (a, b)
by the layer's output error. AWQ (2306.00978) searches s = mean|x|^a by the error of rounding the
weight alone. SERQ (2603.08185) flattens: s = amax_x.

Scales are rounded to powers of two, so that x / s and every product with it are exact in bf16 and
fp16: scaling at run time, scaling in a norm's weight and scaling a matrix then give the same bits.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

EXPONENTS = 14  # 2^-14 to 2^14: normal numbers of fp16
GRID = 10  # values of a and b are multiples of 1 / GRID
AWQ_GRID = 20  # values of a for AWQ: 0, 0.05, ..., 0.95


def power_of_two(scales: Tensor) -> Tensor:
    """Nearest power of two (by ratio) of scales [K]; 1 for a scale that is 0 or not finite."""
    usable = torch.isfinite(scales) & (scales > 0)
    exponent = torch.log2(torch.where(usable, scales, 1.0)).round().clamp(-EXPONENTS, EXPONENTS)
    return torch.exp2(exponent)


def flatten_scales(act_amax: Tensor) -> Tensor:
    """SERQ's static flattening: every calibrated channel reaches about 1 (0.7 to 1.4)."""
    return power_of_two(act_amax)


def smooth_scales(act_amax: Tensor, weight_amax: Tensor, a: float, b: float) -> Tensor:
    """act_amax^a / weight_amax^b per channel [K], 1 where one of them is 0.

    Centred on a geometric mean of 1, which changes no product but keeps the scales in range.
    """
    usable = (act_amax > 0) & (weight_amax > 0)
    log = a * torch.log2(torch.where(usable, act_amax, 1.0))
    log = log - b * torch.log2(torch.where(usable, weight_amax, 1.0))
    centre = (log * usable).sum() / usable.sum().clamp(min=1)
    return power_of_two(torch.exp2(torch.where(usable, log - centre, 0.0)))


def exponents(grid: int = GRID) -> Iterator[tuple[float, float]]:
    """SVDQuant's candidates for (a, b): none, (a, 0) and (a, 1 - a)."""
    yield 0.0, 0.0
    for i in range(1, grid):
        yield i / grid, 0.0
        yield i / grid, 1 - i / grid
    yield 1.0, 0.0


def search_scales(
    act_amax: Tensor, weight_amax: Tensor, error: Callable[[Tensor], float], grid: int = GRID
) -> Tensor:
    """Of all candidates the scales [K] with the least error of the layer's output.

    Args:
        act_amax, weight_amax: fp32 [K], largest magnitude of the channel's inputs and weights.
        error: of the output under given scales, quantizers on. The first of equals wins; no scaling
            comes first.
    """
    candidates = (smooth_scales(act_amax, weight_amax, a, b) for a, b in exponents(grid))
    return _least(candidates, error)


def awq_scales(act_mean: Tensor, a: float) -> Tensor:
    """AWQ's act_mean^a per channel [K], over the geometric mean of the largest and the smallest of
    them; 1 where act_mean is 0."""
    usable = act_mean > 0
    log = a * torch.log2(torch.where(usable, act_mean, 1.0))
    live = log[usable]
    centre = (live.amax() + live.amin()) / 2 if live.numel() else 0.0
    return power_of_two(torch.exp2(torch.where(usable, log - centre, 0.0)))


def search_awq_scales(
    act_mean: Tensor, error: Callable[[Tensor], float], grid: int = AWQ_GRID
) -> Tensor:
    """Of AWQ's candidates, a = 0, 1 / grid, ..., the scales [K] with the least error.

    Args:
        act_mean: fp32 [K], mean magnitude of the channel's inputs.
        error: of the output under given scales with weights rounded and inputs as they are. The
            first of equals wins; no scaling comes first.
    """
    return _least((awq_scales(act_mean, i / grid) for i in range(grid)), error)


def _least(candidates: Iterable[Tensor], error: Callable[[Tensor], float]) -> Tensor:
    """The first candidate of the least error; the first one where nothing can be measured."""
    best, least = None, float("inf")
    for scales in candidates:
        found = error(scales)
        if best is None or found < least:
            best, least = scales, found
    return best
