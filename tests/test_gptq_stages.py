"""GPTQ as a stage of the other methods: scaled, rotated, with a low-rank branch, for W4A16."""

import dataclasses

import pytest
import torch
from test_gptq import correlated
from torch import nn

import arc_ao
from arc_ao import ARCConfig, ARHQConfig, SERQConfig, SVDQuantConfig

CHANNELS, OUTPUTS = 128, 64
CONFIGS = {
    "smoothed": ARCConfig(recipe="balanced", budget=0.1, smooth="search"),
    "rotated": ARCConfig(recipe="balanced", budget=0.1, rotation=16),
    "SERQ": SERQConfig(budget=0.1),
    "SVDQuant": SVDQuantConfig(rank=8, branch_iterations=2),
    "ARHQ": ARHQConfig(rank=8, budget=0.1),
    "W4A16": ARCConfig(recipe="balanced", budget=0.1, activation="bf16"),
}


def output_error(config: ARCConfig) -> float:
    """Of one quantized linear, on tokens that calibration has not seen, relative."""
    model = nn.Sequential(nn.Linear(CHANNELS, OUTPUTS, bias=False))
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(OUTPUTS, CHANNELS, generator=generator)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    x, unseen = correlated(1024, CHANNELS), correlated(512, CHANNELS, seed=1)
    expected = unseen @ weight.T
    arc_ao.quantize_(model, config, calibration_data=list(x.split(256)), progress=False)
    return ((model(unseen) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_gptq_improves_every_method(name):
    """Its Hessian is of the transformed input, what it rounds is what the branch leaves."""
    config = CONFIGS[name]
    nearest = output_error(dataclasses.replace(config, rounding="nearest"))
    gptq = output_error(dataclasses.replace(config, rounding="gptq"))
    assert gptq < 0.97 * nearest
