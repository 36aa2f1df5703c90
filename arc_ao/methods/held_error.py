"""The error that a rounded weight leaves on rows kept aside, so that no row judges what it fitted.

    sum over rows x of w |x (W - Q(W))^T S|^2        x as the stored columns of the plan meet it

with the token weights w of the sums (calibration/input_gram.py), so that no massive token decides,
and S the factor of the outputs (output_factor.py), where one is known.
"""

import torch
from torch import Tensor

from arc_ao.calibration.input_gram import InputGram, row_chunks, token_weights
from arc_ao.formats import nvfp4
from arc_ao.methods.gram import effective_input
from arc_ao.methods.output_factor import OutputFactor, tile_chunks
from arc_ao.methods.weights import LayerPlan, in_order
from arc_ao.tensor import ARCTensor

CHUNK_ELEMENTS = 1 << 20  # of a weight at a time: 4 MiB in fp32


def held_rows(gram: InputGram, plan: LayerPlan) -> Tensor | None:
    """sqrt(w) x, fp32 [M, A], of the rows that a sum kept aside, handed over; None without any."""
    rows, held_weights = gram.held.rows(), gram.held.row_weights()
    gram.held.clear()
    if rows is None:
        return None
    if held_weights is None or not held_weights.any():  # whose errors cost nothing: of any token
        held_weights = token_weights(rows)
    weights = held_weights.sqrt()
    parts = [effective_input(chunk, plan) for chunk in row_chunks(rows)]
    return torch.cat(parts).mul_(weights.unsqueeze(1))


def held_error(
    weight: Tensor,
    tensor: ARCTensor,
    plan: LayerPlan,
    rows: Tensor,
    outputs: OutputFactor | None = None,
) -> float:
    """The error on `rows` [M, A] of weight [N, K] quantized to `tensor` under `plan`."""
    total, columns = 0.0, rows.shape[1]
    for chunk in tile_chunks(weight.shape[0], columns, CHUNK_ELEMENTS):
        target = in_order(plan.prepared.residual(weight, chunk), plan.channel_order)
        if plan.act_channels is not None:
            target = torch.cat([target, target.index_select(1, plan.act_channels)], dim=1)
        stored = nvfp4.decode(tensor.qdata[chunk], tensor.scale[chunk]).mul_(tensor.outer_scale)
        error = nvfp4.to_blocks(target - stored[:, :columns])
        error.index_add_(1, plan.weight_blocks, nvfp4.to_blocks(stored[:, columns:]), alpha=-1)
        left = rows @ error.flatten(1).t()
        if outputs is not None:
            left = outputs.of_rows(chunk).through(left)
        total += left.square_().sum(dtype=torch.float64).item()
    return total
