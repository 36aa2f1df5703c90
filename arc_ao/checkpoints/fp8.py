"""FP8 weights, which checkpoints of several precisions have beside NVFP4 ones, as plain tensors."""

import torch
from torch import Tensor

TILE = 128  # rows and columns that share a scale, where scales are by tile


def dequantize_fp8(name: str, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 weight [N, K] times its scale, in `dtype`.

    Args:
        name: of the layer, for messages.
        scale: one for all ([] or [1]), one a row ([N] or [N, 1]), or one a tile of 128 x 128.

    Raises:
        ValueError: a scale of another shape, naming the layer.
    """
    rows, columns = weight.shape
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.shape in ((rows,), (rows, 1)):
        scale = scale.reshape(rows, 1)
    elif scale.shape == (-(-rows // TILE), -(-columns // TILE)):
        tall = scale.repeat_interleave(TILE, 0)[:rows]
        scale = tall.repeat_interleave(TILE, 1)[:, :columns]
    else:
        raise ValueError(
            f"{name}: expected one FP8 scale for all, for each row, or for each {TILE} x {TILE} "
            f"tile of a weight [{rows}, {columns}], found scales {list(scale.shape)}"
        )
    return (weight.float() * scale.float()).to(dtype)
