"""arc::encode_blocks and arc::block_residuals: a weight under known block scales.

q = e2m1(w * (1/s))     the codes, two a byte
r = w - q * s           what they leave
"""

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import BYTES, check_tensor
from arc_ao.ops.registry import define
from arc_ao.ops.search_block_scales import check_values


def encode_blocks_eager(values: Tensor, scale: Tensor) -> Tensor:
    """Encode a weight under known block scales.

    Args:
        values: fp32 [N, K], K a multiple of 16, already multiplied by the inverse outer scale.
        scale: uint8 [N, K/16], e4m3 bits without a sign.

    Returns:
        uint8 [N, K/2], packed codes.

    Raises:
        RuntimeError: other shapes or dtypes.
    """
    return nvfp4.pack(_codes("encode_blocks", values, scale).flatten(1))


def block_residuals_eager(values: Tensor, scale: Tensor) -> Tensor:
    """What `encode_blocks` leaves of fp32 values [N, K]: fp32 [N, K]. Raises as it does.

    `values - residual` is then what the codes stand for, exactly while no magnitude exceeds 12
    times its block's scale.
    """
    codes = _codes("block_residuals", values, scale)
    decoded = nvfp4.decode_blocks(codes, nvfp4.decode_e4m3(scale))
    return values - decoded.flatten(1)


def _codes(op: str, values: Tensor, scale: Tensor) -> Tensor:
    """uint8 [N, K/16, 16]."""
    _check(op, values, scale)
    return nvfp4.encode_blocks(nvfp4.to_blocks(values), nvfp4.decode_e4m3(scale))


def _check(op: str, values: Tensor, scale: Tensor) -> None:
    check_values(op, values)
    expected = (values.shape[0], values.shape[1] // nvfp4.BLOCK_SIZE)
    check_tensor(op, "scale", scale, BYTES, expected, values.device)


def _encode_blocks_fake(values, scale):
    _check("encode_blocks", values, scale)
    return values.new_empty((values.shape[0], values.shape[1] // 2), dtype=torch.uint8)


def _block_residuals_fake(values, scale):
    _check("block_residuals", values, scale)
    return values.new_empty(values.shape)


encode_blocks = define(
    "encode_blocks(Tensor values, Tensor scale) -> Tensor",
    encode_blocks_eager,
    _encode_blocks_fake,
)
block_residuals = define(
    "block_residuals(Tensor values, Tensor scale) -> Tensor",
    block_residuals_eager,
    _block_residuals_fake,
)
