"""A dequantized weight that was changed in place, quantized as it was before: what merging needs.

PEFT merges an adapter in three steps: `weight.dequantize()`, an addition in place, and torchao's
`quantize_` on the linear with the model's config. The same blocks and channels keep a residual, in
the same order, under the same input transform; of the low-rank branch only what it leaves is
quantized again. Codes are the nearest under searched block scales: without calibration data there
is no more to go by.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import register_quantize_module_handler

from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.methods.lowrank import LowRank
from arc_ao.methods.prepare import Preparation
from arc_ao.methods.weights import LayerPlan, quantize_weight
from arc_ao.quantized_linear import set_weight
from arc_ao.tensor import ORIGINS, ARCTensor, Origin


@dataclass
class RequantizeConfig(AOBaseConfig):
    """torchao config of a linear whose weight came from `ARCTensor.dequantize()`."""


def requantize(values: Tensor) -> ARCTensor:
    """Quantize what `ARCTensor.dequantize` returned, and what was changed in it, as it was before.

    Raises:
        ValueError: a tensor that it did not return.
    """
    origin = ORIGINS.get(values)
    if origin is None:
        raise ValueError(
            "requantize: expected a tensor that ARCTensor.dequantize() returned, maybe changed in "
            f"place since, found another one of shape {list(values.shape)}. Quantize the merged "
            "model with arc_ao.quantize_ instead"
        )
    return quantize_weight(values, _plan(values, origin)).packed()


def _plan(values: Tensor, origin: Origin) -> LayerPlan:
    tensors = origin.tensors
    branches = ()
    if "down" in tensors:
        branches = (LowRank(tensors["down"], tensors["up"]),)
    prepared = Preparation(tensors.get("input_scale"), tensors.get("rotation"), branches)
    amax = prepared.residual(values, slice(None)).abs().amax()
    before = tensors["outer_scale"][0] * nvfp4.NVFP4_MAX
    kept = ("act_blocks", "weight_blocks", "channel_order", "act_channels", "act_outer_scale")
    return LayerPlan(
        _config(origin),
        amax.maximum(before),
        scale=None,
        **{name: tensors.get(name) for name in kept},
        prepared=prepared,
    )


def _config(origin: Origin) -> ARCConfig:
    scale = origin.attributes["activation_scale"]
    return ARCConfig(
        recipe="balanced",
        activation="bf16" if scale == "none" else "nvfp4",
        activation_scale=scale,
        activation_block_scale=origin.attributes["activation_block_scale"],
        weight_scale="mse",
    ).resolve()


@register_quantize_module_handler(RequantizeConfig)
def _requantize_linear(module: nn.Linear, config: RequantizeConfig) -> nn.Linear:
    set_weight(module, requantize(module.weight))
    return module
