"""The largest magnitude of every input channel, and which channels have residuals.

A map of them has at most COLUMNS columns of equally many neighbouring channels; the last may hold
fewer. Channels are those of the layer's input as the model gives it, in their natural order.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.calibration.padding import without_padding
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.tensor import ARCTensor

COLUMNS = 256


class ChannelAmax:
    """Forward pre-hook that keeps the largest magnitude of each input channel, fp32 [K].

    Padding does not count where the model is watched (calibration/padding.py). Zeros until a token
    reaches the layer.
    """

    def __init__(self, in_features: int) -> None:
        self.amax = torch.zeros(in_features)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        x = without_padding(args[0] if args else kwargs["input"])
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0]:
            self.amax = torch.maximum(self.amax, rows.abs().amax(0).float().cpu())


@contextmanager
def channel_amax(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, ChannelAmax]]:
    """Inside, what reaches the linears is measured, by their names."""
    meters = {name: ChannelAmax(linear.in_features) for name, linear in linears.items()}
    handles = [
        linears[name].register_forward_pre_hook(meter, with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        yield meters
    finally:
        for handle in handles:
            handle.remove()


def channels_per_column(in_features: int) -> int:
    """Of a map: 1 up to COLUMNS channels."""
    return -(-in_features // COLUMNS)


def column_amax(amax: Tensor) -> list[float]:
    """The largest of each column's channels [K], to four digits."""
    columns = amax.split(channels_per_column(len(amax)))
    return [float(f"{column.max().item():.4g}") for column in columns]


def residual_columns(tensor: ARCTensor) -> dict[str, list[int]]:
    """Columns that hold a channel with an activation residual, and with a weight residual.

    Where the input is rotated, the channels are those after it, which mix their neighbours.
    """
    gathered = [] if tensor.act_channels is None else tensor.act_channels.tolist()
    positions = {
        "act_columns": [*_channels_of(tensor.act_blocks), *gathered],
        "weight_columns": _channels_of(tensor.weight_blocks),
    }
    width = channels_per_column(tensor.in_features)
    return {
        kind: sorted({channel // width for channel in _natural(tensor, found)})
        for kind, found in positions.items()
    }


def _channels_of(blocks: Tensor) -> list[int]:
    """Positions in the blocks of BLOCK_SIZE."""
    return [block * BLOCK_SIZE + i for block in blocks.tolist() for i in range(BLOCK_SIZE)]


def _natural(tensor: ARCTensor, positions: Iterable[int]) -> list[int]:
    """Channels at positions of the order that blocks are formed in, not those of padding."""
    inside = [position for position in positions if position < tensor.in_features]
    if tensor.channel_order is None:
        return inside
    order = tensor.channel_order.tolist()
    return [order[position] for position in inside]
