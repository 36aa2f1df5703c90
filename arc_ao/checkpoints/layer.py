"""One linear of an NVFP4 checkpoint, whatever its format calls the parts, and ARCTensors as such.

Everywhere a weight [N, K] is the same e2m1 codes, two a byte along K with the even element in the
low nibble, and e4m3 scales of 16 codes, both in the natural channel order, row by row. Formats
differ in names and in which way round their fp32 scales are; here both multiply on dequantize.

An ARCTensor is such a layer (its base), and what only arc_ao computes with: residual columns, the
exact outer scale, how activations are scaled. `split` takes it apart, `join` puts it together
again, bit for bit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arc_ao.formats.nvfp4 import BLOCK_SIZE, E4M3_NAN
from arc_ao.tensor import ARCTensor

# Linears that engines run as one, by the last part of their names: each set has one outer scale.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
RECIPROCAL_TOLERANCE = 1e-6  # of an outer scale that went through its fp32 reciprocal


@dataclass(frozen=True)
class NVFP4Layer:
    """Codes and scales of one linear, as every engine can hold it."""

    qdata: Tensor  # uint8 [N, K/2]
    scale: Tensor  # uint8 [N, K/16], e4m3 bits
    outer_scale: Tensor  # fp32 [1], multiplies on dequantize
    input_outer_scale: Tensor | None  # fp32 [1], of activations; None: dynamic, or not quantized
    quantizes_input: bool = True  # W4A4; W4A16 without

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.qdata.shape[0], 2 * self.qdata.shape[1]


@dataclass(frozen=True)
class Extras:
    """What an ARCTensor has beside its base."""

    outer_scale: Tensor  # fp32 [1], exact where the format stores the reciprocal
    activation_scale: str
    activation_block_scale: str
    act_outer_scale: Tensor | None = None  # fp32 [1], of activation_scale "static"
    act_blocks: Tensor | None = None  # int32 [Ra]
    weight_blocks: Tensor | None = None  # int32 [Rw]
    act_channels: Tensor | None = None  # int32 [multiple of 16]
    residual_qdata: Tensor | None = None  # uint8 [N, 8 R], the columns stored after the base
    residual_scale: Tensor | None = None  # uint8 [N, R]


def refuse_unholdable(tensors: Mapping[str, ARCTensor]) -> None:
    """Refuse layers that no engine but ours can hold.

    Raises:
        ValueError: naming the layers and why.
    """
    found = {name: _unholdable(tensor) for name, tensor in tensors.items()}
    listed = [f"{name}: {reason}" for name, reason in found.items() if reason]
    if listed:
        raise ValueError(
            "expected layers that other engines can hold, found "
            f"{_shortened(listed)}. Quantize the original model with exportable=True, or save this "
            "one with arc_ao.save_pretrained"
        )


def _unholdable(tensor: ARCTensor) -> str:
    """Why a base is no ordinary NVFP4 layer, or ""."""
    reasons = {
        "channels sorted at run time (channel_order)": tensor.channel_order is not None,
        "inputs rotated (rotation)": tensor.rotation is not None,
        "inputs scaled by channel (smooth)": tensor.input_scale is not None,
        f"a low-rank branch (rank={tensor.rank})": tensor.rank > 0,
        f"in_features {tensor.in_features} padded to blocks of {BLOCK_SIZE}": (
            tensor.in_features % BLOCK_SIZE > 0
        ),
    }
    return ", ".join(reason for reason, there in reasons.items() if there)


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Names of linears that engines run as one, in sets of two and more."""
    present, groups = dict.fromkeys(names), []
    for name in present:
        parent, _, last = name.rpartition(".")
        for siblings in FUSED:
            if last != siblings[0]:
                continue
            dot = f"{parent}." if parent else ""
            group = [f"{dot}{sibling}" for sibling in siblings if f"{dot}{sibling}" in present]
            groups += [group] if len(group) > 1 else []
    return groups


def refuse_unshared(layers: Mapping[str, NVFP4Layer], linears: Iterable[str]) -> None:
    """Refuse fused linears of different scales or kinds, which engines run as if they were alike.

    Args:
        linears: names of all linears of the model, quantized or not.

    Raises:
        ValueError: naming the linears.
    """
    listed = []
    for group in fused_groups(linears):
        kinds = {layers[n].quantizes_input if n in layers else None for n in group}
        scales = {_scales(layers[n]) for n in group if n in layers}
        if len(kinds) > 1 or len(scales) > 1:
            listed.append(", ".join(group))
    if listed:
        raise ValueError(
            "expected one outer scale and one kind of quantization for linears that engines fuse, "
            f"found several in {_shortened(listed)}. Quantize the original model with one config "
            "for them, with exportable=True and calibration data"
        )


def _scales(layer: NVFP4Layer) -> tuple[float, float | None]:
    given = layer.input_outer_scale
    return layer.outer_scale.item(), None if given is None else given.item()


def _shortened(listed: list[str], most: int = 8) -> str:
    more = f"; and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more


def split(tensor: ARCTensor, input_outer_scale: Tensor | None) -> tuple[NVFP4Layer, Extras]:
    """The base of an ARCTensor with the outer scale of its input (fp32 [1]), and the rest of it."""
    plain = tensor.to_layout("plain")
    blocks = plain.base_blocks
    columns = blocks * BLOCK_SIZE // 2
    layer = NVFP4Layer(
        plain.qdata[:, :columns].contiguous(),
        plain.scale[:, :blocks].contiguous(),
        plain.outer_scale,
        input_outer_scale if plain.quantizes_input else None,
        plain.quantizes_input,
    )
    return layer, Extras(
        plain.outer_scale,
        plain.activation_scale,
        plain.activation_block_scale,
        plain.act_outer_scale,
        _some(plain.act_blocks),
        _some(plain.weight_blocks),
        plain.act_channels,
        _some(plain.qdata[:, columns:].contiguous()),
        _some(plain.scale[:, blocks:].contiguous()),
    )


def join(
    name: str,
    layer: NVFP4Layer,
    extras: Extras | None,
    dtype: torch.dtype,
    activation_scale: str | None = None,
) -> ARCTensor:
    """ARCTensor of a layer, with its extras or as a plain NVFP4 weight.

    Args:
        dtype: of the weight that it stands for.
        activation_scale: "token" or "static" instead of what the extras or the layer say.

    Raises:
        ValueError: scales that cannot be computed with, or extras of another base, naming the
            layer.
    """
    check_layer(name, layer)
    if extras is None or (activation_scale is not None and layer.quantizes_input):
        scale = _own_scale(name, layer, activation_scale)
        given = layer.input_outer_scale if scale == "static" else None
        extras = extras or Extras(layer.outer_scale, scale, "amax")
        extras = replace(extras, activation_scale=scale, act_outer_scale=given)
    _check_extras(name, layer, extras)
    none = torch.empty(0, dtype=torch.int32)
    return ARCTensor(
        _with_columns(layer.qdata, extras.residual_qdata),
        _with_columns(layer.scale, extras.residual_scale),
        extras.outer_scale.reshape(1),
        none if extras.act_blocks is None else extras.act_blocks,
        none if extras.weight_blocks is None else extras.weight_blocks,
        layer.shape[1],
        dtype,
        extras.activation_scale,
        extras.activation_block_scale,
        act_channels=extras.act_channels,
        act_outer_scale=extras.act_outer_scale,
    ).with_input_plan()


def check_layer(name: str, layer: NVFP4Layer) -> None:
    """Refuse shapes that do not fit and scales that give no numbers.

    Raises:
        ValueError: naming the layer, what was expected and what was found.
    """
    rows, columns = layer.shape
    expected = (rows, columns // BLOCK_SIZE)
    if columns % BLOCK_SIZE or tuple(layer.scale.shape) != expected:
        raise ValueError(
            f"{name}: expected one block scale for {BLOCK_SIZE} channels, found a weight "
            f"[{rows}, {columns}] and scales {list(layer.scale.shape)}"
        )
    if (layer.scale >= E4M3_NAN).any():
        raise ValueError(f"{name}: expected block scales from 0 to 448, found NaN or negative ones")
    scales = {"weight": layer.outer_scale, "input": layer.input_outer_scale}
    for kind, scale in scales.items():
        if scale is not None and not (torch.isfinite(scale).all() and (scale >= 0).all()):
            raise ValueError(
                f"{name}: expected a finite {kind} scale of at least 0, found {scale.tolist()}; "
                "the checkpoint is damaged, or its calibration never reached the layer"
            )


def _own_scale(name: str, layer: NVFP4Layer, asked: str | None) -> str:
    """How activations are scaled: "none", as asked for, or as the checkpoint has it."""
    if not layer.quantizes_input:
        return "none"
    if asked == "static" and layer.input_outer_scale is None:
        raise ValueError(
            f"{name}: expected an input scale for activation_scale='static', found none; take "
            "'token'"
        )
    return asked or ("token" if layer.input_outer_scale is None else "static")


def _check_extras(name: str, layer: NVFP4Layer, extras: Extras) -> None:
    """Refuse what was stored for another base."""
    given, exact = layer.outer_scale.reshape(1), extras.outer_scale.reshape(1)
    same = torch.isclose(given, exact, RECIPROCAL_TOLERANCE, 0.0) | (exact == 0)
    stored = extras.residual_qdata
    if not same.all() or (stored is not None and stored.shape[0] != layer.shape[0]):
        raise ValueError(
            f"{name}: expected the weight that its residual blocks were made for, found another; "
            "the checkpoint was changed after its export. Export it again, or import it with "
            "residuals=False"
        )


def _with_columns(base: Tensor, more: Tensor | None) -> Tensor:
    return base if more is None else torch.cat((base, more), dim=1)


def _some(tensor: Tensor) -> Tensor | None:
    """None for a tensor without elements."""
    return tensor if tensor.numel() else None
