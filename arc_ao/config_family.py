"""The neighbouring methods as configs: named defaults of ARCConfig, on the same quantizer.

All take every field of ARCConfig, so that methods combine: `ARCConfig(smooth="search")`,
`ARHQConfig(rank=32, budget=0.06)`. None of them measures recipes unless asked to.

All but NVFP4Config keep 2048 rows of every distinct input while the model is under calibration.
Searching scales tries 20 candidates a linear, a branch decomposes whole weights (with ARHQ also a
K x K matrix in fp64): seconds a linear of a small model, minutes where K is in the thousands.
"""

from dataclasses import dataclass

from arc_ao.config import ARCConfig
from arc_ao.config_budget import BudgetConfig
from arc_ao.recipes import Branch, ChannelOrder, Recipe, Smooth


@dataclass
class NVFP4Config(ARCConfig):
    """Plain NVFP4 W4A4: amax scales, no residuals; needs no calibration data."""

    budget: float | None = 0.0
    recipe: Recipe = "plain"


@dataclass
class SERQConfig(ARCConfig):
    """SERQ (arXiv 2603.08185): inputs flattened to amax 1, channels sorted by the amax they had
    before (saliency), residuals of the salient weight blocks.

    The default spends `budget` on the 16-channel blocks whose weight error costs most. As
    published, 128 channels a layer by saliency:
    `SERQConfig(num_weight_channels=128, selection="threshold")`. Sorting, a gather at run time,
    belongs to it: flattening moves the channels' sizes into the weights, and only sorted do 16 of
    like size share a block. `channel_order="none"` without the gather loses most of the gain. The
    paper uses int4 and MXFP4; NVFP4 is an adaptation (benchmarks/layers/methods.py has all three).
    """

    recipe: Recipe = "balanced"
    channel_order: ChannelOrder | None = "amax"
    exchange_rate: float | str | None = "inf"
    smooth: Smooth = "flatten"


@dataclass
class SVDQuantConfig(ARCConfig):
    """SVDQuant (arXiv 2411.05007): channel scales searched with a 16-bit low-rank branch inside,
    the branch refined as long as the output improves. Linears that share an input share `down`."""

    budget: float | None = 0.0
    recipe: Recipe = "balanced"
    smooth: Smooth = "search"
    rank: int = 32


@dataclass
class ARHQConfig(ARCConfig):
    """ARHQ (arXiv 2605.00140): the branch that takes over most of the activations' quantization
    error, after channel scales searched without it. Linears that share an input share `down`.

    The paper decomposes once; `branch_iterations=100` adds SVDQuant's iterations, which is better.
    """

    budget: float | None = 0.0
    recipe: Recipe = "balanced"
    smooth: Smooth = "search"
    rank: int = 128
    branch: Branch = "arhq"
    branch_iterations: int = 0


CONFIGS = (ARCConfig, NVFP4Config, SERQConfig, SVDQuantConfig, ARHQConfig, BudgetConfig)
