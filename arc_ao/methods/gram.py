"""E[w x^T x] of what a linear's quantized weight meets, for rounding that looks at errors.

x [M, A] is the input as it is dequantized at run time: base channels in plan order and padded,
activation residual blocks added in, copied channels appended (A = K16 + copied). Sums are fp32,
4 A^2 bytes.
"""

import torch
from torch import Tensor

from arc_ao.calibration.input_gram import InputGram
from arc_ao.formats import nvfp4
from arc_ao.methods.weights import LayerPlan, in_order
from arc_ao.ops import quant_augment


def effective_input(x: Tensor, plan: LayerPlan) -> Tensor:
    """x [M, K] as the stored weight columns of `plan` meet it: fp32 [M, K16 + copied].

    A column of an activation block meets the quantized value plus its quantized residual; the copy
    of a column in `act_channels` meets that residual alone. A weight residual meets the quantized
    value, which is the base column's input wherever the block has no activation residual too.
    Scales and rotations of the input come before; activations in 16 bits are met as they are.
    """
    x = plan.prepared.transform_input(x).to(x.dtype)
    if plan.config.activation == "bf16":
        return in_order(x.float(), plan.channel_order)
    qdata, scale, outer = quant_augment(
        x,
        plan.act_blocks,
        plan.weight_blocks.new_empty(0),
        plan.act_outer_scale,
        plan.config.activation_scale,
        channel_order=plan.channel_order,
        act_channels=plan.act_channels,
        block_scale=plan.config.activation_block_scale,
    )
    values = nvfp4.decode(qdata, scale).mul_(outer.unsqueeze(1))
    base = -(-x.shape[1] // nvfp4.BLOCK_SIZE) * nvfp4.BLOCK_SIZE
    residual = plan.act_blocks.shape[0] * nvfp4.BLOCK_SIZE
    blocks = nvfp4.to_blocks(values[:, :base]).clone()
    blocks.index_add_(1, plan.act_blocks, nvfp4.to_blocks(values[:, base : base + residual]))
    return torch.cat([blocks.flatten(1), values[:, base + residual :]], dim=1)


class Gram(InputGram):
    """Running E[w x^T x] of one input under a plan.

    Args:
        tokens: that will be added, as far as known, for rows held out of all of them.
    """

    def __init__(self, plan: LayerPlan, tokens: int = 0) -> None:
        super().__init__()
        self.plan = plan
        self.held.spread_over(tokens)

    @torch.no_grad()
    def add(self, x: Tensor, keep: Tensor | None = None, *, weights: Tensor | None = None) -> None:
        """Add the rows of x [*, K], or those that `keep`, bool [rows], has; `weights` [rows] as
        InputGram.add has them."""
        rows = x.reshape(-1, x.shape[-1])
        if keep is not None:
            rows, weights = rows[keep], None if weights is None else weights[keep]
        super().add(rows, weights=weights)

    def met(self, rows: Tensor) -> Tensor:
        """rows [M, K] as the weights meet them: fp32 [M, A]."""
        return effective_input(rows, self.plan)
