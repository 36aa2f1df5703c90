"""Weights to NVFP4: block scales and error energies first, codes and residuals when decided."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.methods.prepare import UNTOUCHED, Preparation
from arc_ao.methods.scale_search import choose_scale_bits
from arc_ao.ops import block_residuals, encode_blocks
from arc_ao.tensor import ARCTensor

CHUNK_ELEMENTS = 1 << 18  # bounds the temporaries, which are 1 MB each in fp32


@dataclass(frozen=True)
class WeightAnalysis:
    """What quantizing a weight [N, K] to plain NVFP4 keeps and loses, per column in plan order."""

    scale: Tensor  # uint8 [N, K/16], e4m3 bits of the chosen block scales
    column_energy: Tensor  # fp32 [K16], sum over n of Q(w)^2 (times the worth of output n)
    column_error: Tensor  # fp32 [K16], sum over n of (w - Q(w))^2 (likewise)


@dataclass(frozen=True)
class LayerPlan:
    """Everything that turns a weight into an ARCTensor; channel ids are in plan order."""

    config: ARCConfig  # resolved
    amax: Tensor  # fp32 [], sets the outer scale, shared by the linears that share an input
    scale: Tensor | None  # uint8 [N, K/16]; None: chosen when the weight is quantized
    act_blocks: Tensor  # int32 [Ra]
    weight_blocks: Tensor  # int32 [Rw]
    channel_order: Tensor | None = None  # int32 [K]
    act_channels: Tensor | None = None  # int32 [multiple of 16]
    act_outer_scale: Tensor | None = None  # fp32 [1]
    mean_square: Tensor | None = None  # fp32 [K16], importance of weight errors
    mean_error: Tensor | None = None  # fp32 [K16], importance of errors in copied columns
    prepared: Preparation = UNTOUCHED


def rows_of(plan: LayerPlan, rows: slice) -> LayerPlan:
    """The plan of some output rows of its linear."""
    branches = tuple(replace(b, up=b.up[rows]) for b in plan.prepared.branches)
    scale = None if plan.scale is None else plan.scale[rows]
    return replace(plan, scale=scale, prepared=replace(plan.prepared, branches=branches))


def _num_blocks(weight: Tensor) -> int:
    return -(-weight.shape[1] // nvfp4.BLOCK_SIZE)


def in_order(values: Tensor, order: Tensor | None) -> Tensor:
    """Columns [..., K] in plan order, padded with zeros to a multiple of 16: [..., K16]."""
    ordered = values if order is None else values.index_select(-1, order)
    return nvfp4.to_blocks(ordered).flatten(-2)


def analyse_weight(
    weight: Tensor,
    amax: Tensor,
    config: ARCConfig,
    order: Tensor | None = None,
    mean_square: Tensor | None = None,
    prepared: Preparation = UNTOUCHED,
    worth: Tensor | None = None,
) -> WeightAnalysis:
    """Choose the block scales of weight [N, K] and measure the error they leave.

    Args:
        amax: fp32 [], sets the outer scale.
        config: resolved; `weight_scale` is the method.
        order: int32 [K] or None.
        mean_square: fp32 [K16] in plan order, E[x^2] of the calibration data, or None.
        prepared: what the weight goes through first.
        worth: fp32 [N], of the energy of each output; None: 1.
    """
    inverse = nvfp4.inverse_outer_scale(amax)
    outer = nvfp4.outer_scale(amax)
    importance = None if mean_square is None else nvfp4.to_blocks(mean_square)
    scales = weight.new_empty((weight.shape[0], _num_blocks(weight)), dtype=torch.uint8)
    energy, error = 0.0, 0.0
    for rows in nvfp4.row_chunks(weight, CHUNK_ELEMENTS):
        values = in_order(prepared.residual(weight, rows), order) * inverse  # [n, K16]
        scale = choose_scale_bits(nvfp4.to_blocks(values), config.weight_scale, importance)
        left = block_residuals(values, scale)
        values -= left  # what the codes stand for
        ones = values.new_ones(values.shape[0]) if worth is None else worth[rows]
        energy = energy + ones @ values.mul_(outer).square_()
        error = error + ones @ left.mul_(outer).square_()
        scales[rows] = scale
    return WeightAnalysis(scales, energy, error)


def quantize_weight(weight: Tensor, plan: LayerPlan) -> ARCTensor:
    """Quantize weight [N, K] as planned."""
    inverse, scale = nvfp4.inverse_outer_scale(plan.amax), plan.scale
    if scale is None:
        order, importance = plan.channel_order, plan.mean_square
        prepared = plan.prepared
        scale = analyse_weight(weight, plan.amax, plan.config, order, importance, prepared).scale
    copied = 0 if plan.act_channels is None else plan.act_channels.shape[0] // nvfp4.BLOCK_SIZE
    stored = _num_blocks(weight) + copied + plan.weight_blocks.shape[0]
    qdata = weight.new_empty((weight.shape[0], stored * nvfp4.BLOCK_SIZE // 2), dtype=torch.uint8)
    scales = weight.new_empty((weight.shape[0], stored), dtype=torch.uint8)
    for rows in nvfp4.row_chunks(weight, CHUNK_ELEMENTS):
        residual = plan.prepared.residual(weight, rows)
        ordered = in_order(residual, plan.channel_order) * inverse  # [n, K16]
        parts = _stored_parts(ordered, scale[rows], plan)
        torch.cat([encode_blocks(*part) for part in parts], dim=1, out=qdata[rows])
        torch.cat([bits for _, bits in parts], dim=1, out=scales[rows])
    return assemble(weight, plan, qdata, scales)


def assemble(weight: Tensor, plan: LayerPlan, qdata: Tensor, scale: Tensor) -> ARCTensor:
    """ARCTensor of `weight` from its codes and scales under `plan`."""
    branch = plan.prepared.branches[0] if plan.prepared.branches else None
    return ARCTensor(
        qdata,
        scale,
        nvfp4.outer_scale(plan.amax).reshape(1),
        plan.act_blocks,
        plan.weight_blocks,
        weight.shape[1],
        weight.dtype,
        plan.config.activation_scale,
        plan.config.activation_block_scale,
        channel_order=plan.channel_order,
        act_channels=plan.act_channels,
        act_outer_scale=plan.act_outer_scale,
        input_scale=plan.prepared.input_scale,
        rotation=plan.prepared.rotation,
        down=None if branch is None else branch.down,
        up=None if branch is None else branch.up,
    ).with_input_plan()


def _stored_parts(ordered: Tensor, scale: Tensor, plan: LayerPlan) -> list[tuple[Tensor, Tensor]]:
    """(values, scale bits) of the base, of the copied columns and of the residual blocks."""
    parts, method = [(ordered, scale)], plan.config.weight_scale
    if plan.act_channels is not None:
        columns = ordered.index_select(1, plan.act_channels)
        importance = _take(plan.mean_error, plan.act_channels)
        parts.append((columns, choose_scale_bits(nvfp4.to_blocks(columns), method, importance)))
    if plan.weight_blocks.numel():
        chosen = nvfp4.to_blocks(ordered).index_select(1, plan.weight_blocks).flatten(1)
        left = block_residuals(chosen, scale.index_select(1, plan.weight_blocks))
        importance = None
        if plan.mean_square is not None:
            importance = nvfp4.to_blocks(plan.mean_square).index_select(0, plan.weight_blocks)
        parts.append((left, choose_scale_bits(nvfp4.to_blocks(left), method, importance)))
    return parts


def _take(values: Tensor | None, channels: Tensor) -> Tensor | None:
    return None if values is None else nvfp4.to_blocks(values.index_select(0, channels))
