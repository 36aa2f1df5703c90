"""Empty ARCTensors to copy a checkpoint into, their configs, and the layout once it is there."""

from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.config import ARCConfig
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.methods.prepare import branch_dtype
from arc_ao.quantized_linear import set_weight
from arc_ao.summary import arc_tensors
from arc_ao.tensor import ARCTensor


def empty_tensor(module: nn.Linear, config: ARCConfig) -> ARCTensor:
    """Zero ARCTensor of the shape that `config` describes, to copy a checkpoint into.

    `num_act_channels` and `num_weight_channels` count the residual channels; `granularity`,
    `channel_order`, `activation_scale`, `smooth`, `rotation` and `rank` say which optional tensors
    exist.

    Raises:
        ValueError: a budget instead of numbers.
    """
    config = config.resolve()
    if config.has_residuals and not config.explicit:
        raise ValueError(
            "prepare_for_loading: expected num_act_channels and num_weight_channels of the "
            f"checkpoint, found budget={config.budget}; a budget does not tell the shapes"
        )
    act = config.num_act_channels or 0
    weight_blocks = (config.num_weight_channels or 0) // BLOCK_SIZE
    by_channel = config.granularity == "channel" and act > 0
    stored = -(-module.in_features // BLOCK_SIZE) + weight_blocks
    stored += act // BLOCK_SIZE if by_channel else 0

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=module.weight.device)

    is_sorted = config.channel_order != "none"
    is_static = config.activation_scale == "static"
    return ARCTensor(
        zeros(module.out_features, stored * BLOCK_SIZE // 2, dtype=torch.uint8),
        zeros(module.out_features, stored, dtype=torch.uint8),
        zeros(1, dtype=torch.float32),
        zeros(0 if by_channel else act // BLOCK_SIZE),
        zeros(weight_blocks),
        module.in_features,
        module.weight.dtype,
        config.activation_scale,
        config.activation_block_scale,
        channel_order=zeros(module.in_features) if is_sorted else None,
        act_channels=zeros(act) if by_channel else None,
        act_outer_scale=zeros(1, dtype=torch.float32) if is_static else None,
        **_empty_preparation(module, config),
    )


def _empty_preparation(module: nn.Linear, config: ARCConfig) -> dict[str, Tensor]:
    """The tensors of an input transform and of a low-rank branch."""
    new = {"device": module.weight.device}
    size, dtype = config.rotation, branch_dtype(module.weight.dtype)
    rank = min(config.rank, module.in_features)
    found = {}
    if config.smooth != "none":
        found["input_scale"] = torch.zeros(module.in_features, **new)
    if size:
        found["rotation"] = torch.zeros(size, size, dtype=torch.int8, **new)
    if rank:
        found["down"] = torch.zeros(rank, module.in_features, dtype=dtype, **new)
        found["up"] = torch.zeros(module.out_features, rank, dtype=dtype, **new)
    return found


def loading_fields(tensor: ARCTensor) -> dict[str, Any]:
    """The fields of an ARCConfig that a tensor's shapes and attributes settle."""
    return {
        "num_act_channels": tensor.num_act_channels,
        "num_weight_channels": tensor.num_weight_channels,
        "granularity": "channel" if tensor.act_channels is not None else "block",
        "channel_order": "amax" if tensor.channel_order is not None else "none",
        "activation_scale": tensor.activation_scale,
        "activation": "nvfp4" if tensor.quantizes_input else "bf16",
        "activation_block_scale": tensor.activation_block_scale,
        "smooth": "none" if tensor.input_scale is None else "flatten",
        "rotation": 0 if tensor.rotation is None else tensor.rotation.shape[0],
        "rank": tensor.rank,
        "pad_in_features": tensor.in_features % BLOCK_SIZE > 0,
    }


def loading_config(tensor: ARCTensor) -> ARCConfig:
    """The `prepare_for_loading` config that recreates a tensor's shapes. How the weight was
    quantized, which loading does not read, is left open."""
    return ARCConfig(step="prepare_for_loading", **loading_fields(tensor))


def pack_weights_(model: nn.Module) -> nn.Module:
    """Put every quantized weight into the layout that its device's kernels prefer, in place.

    `quantize_` and `from_pretrained` do it themselves; call it after `torch.load` or after moving
    a model to another device. Returns the model.
    """
    for name in arc_tensors(model):
        module = model.get_submodule(name)
        set_weight(module, module.weight.packed())
    return model
