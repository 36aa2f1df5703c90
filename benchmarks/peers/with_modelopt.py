"""nvidia-modelopt's NVFP4 (W4A4): run by run.py inside modelopt's environment.

Recipes are the package's presets: `max`, `mse` (weights' block scales swept over e4m3), `awq_lite`
and `svdquant` (rank 32). Its own NVFP4 kernels want CUDA tensors. `max`, `awq_lite` and `svdquant`
go through `register_quant_backend`, the package's public hook, to its own NVFP4QTensor, which also
works on the CPU: same formula, element by element. The sweep of `mse` does not take that hook.
`max-builtin` is `max` without it. Linears alone are quantized: the presets' wildcards also match
the inputs of nn.LayerNorm, which no other row quantizes (that gives `max` 0.0651 on the encoder).
"""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
    TensorQuantizer,
    register_quant_backend,
)
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from peer_io import NOT_QUANTIZED, Batches, nvfp4_cost, run
from torch import Tensor, nn

PRESETS = {
    "max": mtq.NVFP4_DEFAULT_CFG,
    "max-builtin": mtq.NVFP4_DEFAULT_CFG,
    "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
    "awq_lite": mtq.NVFP4_AWQ_LITE_CFG,
    "svdquant": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
}
BACKEND = "nvfp4_qtensor"
BLOCK_SIZE = 16
NVFP4_MAX = 6.0 * 448.0
NOTE = "fake quantization by modelopt's NVFP4QTensor through register_quant_backend"


def quantize_dequantize(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """NVFP4QTensor there and back, under the calibrated outer scale of `quantizer`."""
    amax = quantizer.amax
    outer = (inputs.abs().amax() if amax is None else amax).float() / NVFP4_MAX
    packed, scale, outer = NVFP4QTensor.quantize(
        inputs, BLOCK_SIZE, weights_scaling_factor_2=outer.reshape(())
    )
    return packed.dequantize(
        inputs.dtype, scale=scale, double_scale=outer, block_sizes={-1: BLOCK_SIZE}
    )


def preset(recipe: str) -> dict[str, Any]:
    """The package's config for a recipe; ValueError for an unknown name."""
    if recipe not in PRESETS:
        raise ValueError(f"modelopt: expected one of {', '.join(PRESETS)}, got {recipe!r}")
    config = copy.deepcopy(PRESETS[recipe])
    off = [{"quantizer_name": f"*{name}*", "enable": False} for name in NOT_QUANTIZED]
    off.append({"parent_class": "nn.LayerNorm", "quantizer_name": "*", "enable": False})
    config["quant_cfg"] = [*config["quant_cfg"], *off]
    if through_hook(recipe):
        for entry in config["quant_cfg"]:
            if "num_bits" in (entry.get("cfg") or {}):
                entry["cfg"]["backend"] = BACKEND
    return config


def through_hook(recipe: str) -> bool:
    return recipe in ("max", "awq_lite", "svdquant")


def quantize(
    model: nn.Module, recipe: str, kind: str, calibration: Batches
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantize in place; the model then computes as in NVFP4."""
    register_quant_backend(BACKEND, quantize_dequantize)
    model = mtq.quantize(model, preset(recipe), lambda m: [m(**batch) for batch in calibration])
    facts = {"note": NOTE} if through_hook(recipe) else {}
    facts |= cost(model)
    mtq.fold_weight(model)  # round each weight once, not in every forward
    return model, facts


def cost(model: nn.Module) -> dict[str, float]:
    """Of quantized linears, their input scales and their low-rank branches in 16 bits."""
    layers, extra, adds = [], 0, 0
    for layer in model.modules():
        weight_quantizer = getattr(layer, "weight_quantizer", None)
        if weight_quantizer is None or not weight_quantizer.is_enabled:
            continue
        layers.append(layer)
        scale = getattr(layer.input_quantizer, "pre_quant_scale", None)
        branch = [getattr(weight_quantizer, f"svdquant_lora_{part}", None) for part in "ab"]
        beside = sum(part.numel() for part in (scale, *branch) if part is not None)
        extra, adds = extra + beside, adds + beside  # each stored value multiplies once a token
    return nvfp4_cost(layers, extra, adds)


if __name__ == "__main__":
    run(quantize, "nvidia-modelopt")
