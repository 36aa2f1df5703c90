"""compressed-tensors, format `nvfp4-pack-quantized`: tensor names, scales, configuration.

    weight_packed        uint8 [N, K/2]      codes
    weight_scale         e4m3 [N, K/16]      block scales
    weight_global_scale  fp32 [1]            2688 / amax: divides on dequantize
    input_global_scale   fp32 [1]            likewise, of activations; absent in W4A16

llm-compressor, AutoRound (`llm_compressor` and its own form) and vLLM share the names.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arc_ao.checkpoints.layer import NVFP4Layer
from arc_ao.formats.nvfp4 import BLOCK_SIZE

METHOD = "compressed-tensors"
WEIGHT = "weight_packed"  # what tells a layer of this format
SUFFIXES = (WEIGHT, "weight_scale", "weight_global_scale", "input_global_scale")
# Without "scale_dtype" block scales of activations are not rounded to e4m3 in emulation.
WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK_SIZE,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "observer": "minmax",
}
ACTIVATIONS = WEIGHTS | {"dynamic": "local"}  # outer scales are static, block scales are not


def reciprocal_scale(scale: Tensor) -> Tensor:
    """A global scale from an outer scale, or back: one divides where the other multiplies.

    0, the outer scale of nothing but zeros, becomes 1, under which they are the same zeros.
    """
    return torch.where(scale == 0, torch.ones_like(scale), scale.reciprocal())


def layer_tensors(layer: NVFP4Layer) -> dict[str, Tensor]:
    """Tensors of a layer by the suffix of their names."""
    tensors = {
        "weight_packed": layer.qdata,
        "weight_scale": layer.scale.view(torch.float8_e4m3fn),
        "weight_global_scale": reciprocal_scale(layer.outer_scale.reshape(1)),
    }
    if layer.input_outer_scale is not None:
        tensors["input_global_scale"] = reciprocal_scale(layer.input_outer_scale.reshape(1))
    return tensors


def read_layer(tensors: Mapping[str, Tensor], quantizes_input: bool) -> NVFP4Layer:
    """Inverse of `layer_tensors`.

    Raises:
        KeyError: a tensor is missing.
    """
    given = tensors.get("input_global_scale") if quantizes_input else None
    return NVFP4Layer(
        tensors["weight_packed"],
        tensors["weight_scale"].view(torch.uint8),
        reciprocal_scale(tensors["weight_global_scale"].float().reshape(1)),
        None if given is None else reciprocal_scale(given.float().reshape(1)),
        quantizes_input,
    )


def quantization_config(layers: Mapping[str, NVFP4Layer], ignore: Sequence[str]) -> dict[str, Any]:
    """What config.json says about a checkpoint.

    Args:
        layers: by the name of their linear.
        ignore: names, or patterns behind "re:", of what stays unquantized.
    """
    groups = {}
    for quantizes_input in (True, False):
        names = [n for n, layer in layers.items() if layer.quantizes_input == quantizes_input]
        if names:
            groups[f"group_{len(groups)}"] = {
                "targets": ["Linear"] if len(names) == len(layers) else names,
                "weights": dict(WEIGHTS),
                "input_activations": dict(ACTIVATIONS) if quantizes_input else None,
                "output_activations": None,
            }
    return {
        "quant_method": METHOD,
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def quantizes_input(quantization: Mapping[str, Any], name: str) -> bool | None:
    """Whether a linear's activations are quantized; None where its group is not found."""
    if quantization.get("quant_method") == "auto-round":
        return quantization.get("act_bits", 16) < 16
    groups = quantization.get("config_groups", {}).values()
    named = [group for group in groups if _matches(name, group.get("targets", []))]
    if not named:
        named = [group for group in groups if "Linear" in group.get("targets", [])]
    return None if not named else named[0].get("input_activations") is not None


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target == name
        for target in targets
    )


def ignore_pattern(prefix: str) -> str:
    """Pattern for everything below a module."""
    return f"re:{re.escape(prefix)}.*"
