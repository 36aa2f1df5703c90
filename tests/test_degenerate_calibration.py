"""Calibration data that says nothing, or one thing: finite layers, or an error that names one."""

import warnings

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn

from arc_ao import ARCConfig, ARHQConfig, NVFP4Config, SERQConfig, SVDQuantConfig, quantize_
from arc_ao.summary import arc_tensors

BALANCED = {"recipe": "balanced", "budget": 0.2}
METHODS = {
    "auto": ARCConfig(),
    "best": ARCConfig(recipe="best"),
    "paper": ARCConfig(recipe="paper"),
    "paper's rule": ARCConfig(recipe="paper", budget=None),
    "balanced, static": ARCConfig(**BALANCED, activation_scale="static"),
    "Fisher layer weights": ARCConfig(**BALANCED, layer_weights="fisher"),
    "sorted channels": ARCConfig(**BALANCED, channel_order="amax", activation_block_scale="mse"),
    "single channels": ARCConfig(**BALANCED, granularity="channel"),
    "NVFP4": NVFP4Config(),
    "SERQ": SERQConfig(budget=0.1),
    "SERQ, unsorted": SERQConfig(budget=0.1, channel_order="none"),
    "SERQ, published": SERQConfig(num_weight_channels=32, selection="threshold"),
    "SVDQuant": SVDQuantConfig(rank=4, branch_iterations=2),
    "ARHQ": ARHQConfig(rank=4),
    "ARHQ, more rank than channels": ARHQConfig(rank=128, branch_iterations=2),
    "searched scales": ARCConfig(**BALANCED, smooth="search"),
    "flattened": ARCConfig(**BALANCED, smooth="flatten"),
    "AWQ": ARCConfig(**BALANCED, smooth="awq"),
    "W4A16, AWQ": ARCConfig(**BALANCED, activation="bf16", smooth="awq"),
    "rotated": ARCConfig(**BALANCED, rotation=32),
    "GPTQ": ARCConfig(**BALANCED, rounding="gptq"),
    "GPTQ, little damping": ARCConfig(**BALANCED, rounding="gptq", damping=1e-6),
    "local Hessian": ARCConfig(**BALANCED, weight_scale="local_hessian"),
    "everything": ARHQConfig(
        rank=4, budget=0.1, rotation=16, channel_order="amax", rounding="gptq"
    ),
}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
DATA = {
    "zeros": torch.zeros(16, 64),
    "constant": torch.ones(16, 64),
    "equal tokens": torch.linspace(-2, 3, 64).expand(16, 64),
    "rank one": torch.outer(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 64)),
    "one token": torch.linspace(-3, 3, 64).unsqueeze(0),
    "dead channels": torch.eye(64)[:16],
}


def mlp() -> nn.Sequential:
    """Two linears; ReLU makes some channels of the second one's input dead."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).requires_grad_(False)


def in_one_call(model: nn.Module, config: ARCConfig, data: list[Tensor]) -> None:
    quantize_(model, config, calibration_data=data, progress=False)


def in_three_steps(model: nn.Module, config: ARCConfig, data: list[Tensor]) -> None:
    quantize_(model, config.with_step("prepare"), progress=False)
    for batch in data:
        model(batch)
    quantize_(model, config.with_step("convert"), progress=False)


def generalises(config: ARCConfig) -> bool:
    """Not where a static scale, flattening, or scales searched for GPTQ fit the one token that was
    shown, as asked for: there finite is all."""
    fitted = config.smooth == "flatten" or (config.smooth == "search" and config.rounding == "gptq")
    return config.activation_scale != "static" and not fitted


def assert_finite(model: nn.Module) -> None:
    """All that is stored: scales, transforms, branches."""
    assert arc_tensors(model)
    for name, tensor in arc_tensors(model).items():
        for inner in tensor.__tensor_flatten__()[0]:
            stored = getattr(tensor, inner)
            assert not stored.is_floating_point() or stored.isfinite().all(), (name, inner)
        assert tensor.dequantize().isfinite().all(), name


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@methods
def test_layers_stay_near_the_original(config, data):
    """On ordinary tokens, which calibration did not show."""
    model, x = mlp(), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    if config.activation_scale == "static" and not data.any():
        with pytest.raises(ValueError, match="^0: expected calibration inputs other than zeros"):
            in_one_call(model, config, [data])
        return
    in_one_call(model, config, [data])
    assert_finite(model)
    y, expected = model(x), mlp()(x)
    assert y.isfinite().all()
    if generalises(config):
        assert (y - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("data", [DATA["zeros"], DATA["one token"]], ids=["zeros", "one token"])
@pytest.mark.parametrize("name", ["best", "GPTQ", "local Hessian", "W4A16, AWQ", "everything"])
@pytest.mark.filterwarnings("ignore:the three steps cannot measure")
def test_the_three_steps_stay_near_the_original(name, data):
    model, x = mlp(), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    in_three_steps(model, METHODS[name], [data])
    assert_finite(model)
    if generalises(METHODS[name]):
        assert (model(x) - mlp()(x)).norm() < 0.5 * mlp()(x).norm()


@methods
def test_a_language_model_calibrated_on_one_token(config):
    """Again and again: logits stay finite, in every layer of a Llama."""
    model = tiny_llama(num_hidden_layers=1)
    in_one_call(model, config, [torch.full((1, 12), 7)])
    assert_finite(model)
    assert model(torch.arange(24).view(2, 12)).logits.isfinite().all()


@methods
def test_no_token_and_no_finite_token_are_refused_by_name(config):
    """NVFP4 needs no data, so that none is fine; what cannot be finite never is."""
    for flow in (in_one_call, in_three_steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if config.needs_calibration:
                with pytest.raises(ValueError, match="^0: expected calibration tokens, found none"):
                    flow(mlp(), config, [torch.zeros(0, 64)])
            with pytest.raises(ValueError, match="^0: calibration input holds NaN or Inf"):
                flow(mlp(), config, [torch.full((4, 64), torch.nan)])
