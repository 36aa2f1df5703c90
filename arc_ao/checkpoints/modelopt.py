"""NVIDIA ModelOpt's unified Hugging Face form: tensor names, scales, configuration.

    weight          uint8 [N, K/2]    codes
    weight_scale    e4m3 [N, K/16]    block scales
    weight_scale_2  fp32 []           amax / 2688: multiplies on dequantize, as our outer scales
    input_scale     fp32 []           likewise, of activations; absent in W4A16

The configuration lies in config.json and, for readers of older releases, in hf_quant_config.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arc_ao.checkpoints.layer import NVFP4Layer
from arc_ao.formats.nvfp4 import BLOCK_SIZE

METHOD = "modelopt"
CONFIG_FILE = "hf_quant_config.json"
WEIGHT = "weight"  # a layer of this format has it in uint8
SUFFIXES = (WEIGHT, "weight_scale", "weight_scale_2", "input_scale")
W4A4, W4A16, MIXED = "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"
# Readers tell the form by this name, and this is the release whose form it is.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ARGUMENTS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}


def layer_tensors(layer: NVFP4Layer) -> dict[str, Tensor]:
    """Tensors of a layer by the suffix of their names."""
    tensors = {
        "weight": layer.qdata,
        "weight_scale": layer.scale.view(torch.float8_e4m3fn),
        "weight_scale_2": layer.outer_scale.reshape(()).clone(),
    }
    if layer.input_outer_scale is not None:
        tensors["input_scale"] = layer.input_outer_scale.reshape(()).clone()
    return tensors


def read_layer(tensors: Mapping[str, Tensor], quantizes_input: bool) -> NVFP4Layer:
    """Inverse of `layer_tensors`.

    Raises:
        KeyError: a tensor is missing.
    """
    given = tensors.get("input_scale") if quantizes_input else None
    return NVFP4Layer(
        tensors["weight"],
        tensors["weight_scale"].view(torch.uint8),
        tensors["weight_scale_2"].float().reshape(1),
        None if given is None else given.float().reshape(1),
        quantizes_input,
    )


def quantization_config(layers: Mapping[str, NVFP4Layer], ignore: Sequence[str]) -> dict[str, Any]:
    """What config.json says about a checkpoint.

    Args:
        layers: by the name of their linear.
        ignore: names, or wildcards, of what stays unquantized.
    """
    algorithms = {n: W4A4 if layer.quantizes_input else W4A16 for n, layer in layers.items()}
    kinds = sorted(set(algorithms.values()))
    config: dict[str, Any] = {"config_groups": {}, "ignore": list(ignore)}
    for index, kind in enumerate(kinds):
        names = [name for name, algorithm in algorithms.items() if algorithm == kind]
        group = {"weights": dict(ARGUMENTS), "targets": ["Linear"] if len(kinds) == 1 else names}
        if kind == W4A4:
            group["input_activations"] = dict(ARGUMENTS)
        config["config_groups"][f"group_{index}"] = group
    config["quant_algo"] = kinds[0] if len(kinds) == 1 else MIXED
    if len(kinds) > 1:
        config["quantized_layers"] = {
            name: {"quant_algo": algorithm, "group_size": BLOCK_SIZE}
            for name, algorithm in algorithms.items()
        }
    return config | {"producer": dict(PRODUCER), "quant_method": METHOD}


def legacy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What hf_quant_config.json says, from what config.json says."""
    details = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": None,
        "group_size": BLOCK_SIZE,
        "exclude_modules": config["ignore"],
    }
    if "quantized_layers" in config:
        details["quantized_layers"] = config["quantized_layers"]
    return {"producer": config["producer"], "quantization": details}


def quantizes_input(quantization: Mapping[str, Any], name: str) -> bool | None:
    """Whether a linear's activations are quantized; None where that is not said.

    Raises:
        ValueError: an algorithm that is not plain NVFP4, naming the layer.
    """
    details = quantization.get("quantization", quantization)  # either file's form
    algorithm = str(details.get("quant_algo", "")).upper()
    if algorithm == MIXED:
        layers = details.get("quantized_layers", {})
        algorithm = str(layers.get(name, {}).get("quant_algo", "")).upper()
    if algorithm not in (W4A4, W4A16, ""):
        raise ValueError(
            f"{name}: expected ModelOpt's {W4A4} or {W4A16}, found {algorithm}, whose extra "
            "tensors arc_ao does not compute with; export the model anew as plain NVFP4"
        )
    return None if not algorithm else algorithm == W4A4


def ignore_pattern(prefix: str) -> str:
    """Wildcard for everything below a module."""
    return f"{prefix}*"
