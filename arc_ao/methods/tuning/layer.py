"""One quantized linear under training: codes become latents, rounding is straight-through.

    y = outer_w * A W^T      A [M, C] effective input, W [N, C] = round(u) * s for trained columns

Columns are those that are stored, as blocks in another order, so that every part is a slice:

    free    base blocks without a weight residual                      trained
    fine    the weight residuals; their base codes are kept            trained
    coarse  base blocks that have a weight residual                    fixed
    copies  of single columns that meet activation residuals alone     fixed

Each weight thus has exactly one trained code. A holds what quantizing the input leaves of x: values
plus the activation residuals that are added to them. Rounding x is passed straight through:
dL/dx = outer_w * (g W) over the base columns (free, fine and coarse), since a residual of x changes
with x by nothing once the value it corrects changes by all.

Memory of a weight: where its latent starts in fp32 and its value in the activations' dtype, 6 bytes
with bf16, and its gradient while it is needed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import rotate
from arc_ao.methods.tuning.grid import round_to_grid, start_latent
from arc_ao.methods.tuning.latent import LowRankLatent
from arc_ao.ops import quant_augment
from arc_ao.tensor import ARCTensor


class TunedWeight:
    """Latents, scales and values of one ARCTensor [N, K].

    Attributes:
        latent: [N, T], in units of the block scales, of the trained columns.
        values: [N, C] in the dtype of products; its first T columns follow the latent by `refresh`.
        parameters: what is trained, by name.
    """

    def __init__(self, tensor: ARCTensor, original: Tensor | None = None, seed: int = 0) -> None:
        """Start at the codes of `tensor`; `original` [N, K] says which neighbour is near, `seed` in
        which directions training begins."""
        plain = tensor.to_layout("plain")
        self.tensor = tensor
        self.order = _block_order(plain)  # stored block of each block here
        self.trained = plain.base_blocks * nvfp4.BLOCK_SIZE  # T
        self.channels = _channel_columns(plain, self.order)
        codes = nvfp4.bytes_of_blocks(plain.qdata).index_select(1, self.order).flatten(1)
        scale = plain.scale.index_select(1, self.order)
        self.scale = scale[:, : plain.base_blocks].contiguous()  # uint8 [N, T/16]
        self.values = nvfp4.decode(codes, scale).to(values_dtype(plain.orig_dtype))  # exact
        self.outer = plain.outer_scale.item()
        start = nvfp4.decode_e2m1(nvfp4.unpack(codes[:, : self.trained // 2]))
        if original is not None:
            start = start_latent(start, self._targets(original))
        self.latent = LowRankLatent(start, self.scale, seed)
        self.parameters = {"left": self.latent.left, "right": self.latent.right}

    def _targets(self, original: Tensor) -> Tensor:
        """The original weight in the latents' units and order, [N, T]."""
        tensor, fine = self.tensor, self.tensor.num_weight_channels
        weight = original.float()
        if tensor.down is not None:
            weight = weight - tensor.up.float() @ tensor.down.float()
        if tensor.input_scale is not None:
            weight = weight / tensor.input_scale
        if tensor.rotation is not None:
            weight = rotate(weight, tensor.rotation)
        if tensor.channel_order is not None:
            weight = weight.index_select(1, tensor.channel_order)
        blocks = nvfp4.to_blocks(weight / (self.outer or 1.0))
        blocks = blocks.index_select(1, _free_then_fine(tensor))
        coarse = self.values[:, self.trained : self.trained + fine].float()
        blocks[:, blocks.shape[1] - fine // nvfp4.BLOCK_SIZE :] -= nvfp4.to_blocks(coarse)
        return (blocks / nvfp4.decode_e4m3(self.scale).unsqueeze(-1)).flatten(1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the latent into `values`."""
        for rows in self.latent.chunks():
            blocks = nvfp4.to_blocks(round_to_grid(self.latent.rows(rows)))
            blocks.mul_(nvfp4.decode_e4m3(self.scale[rows]).unsqueeze(-1))
            self.values[rows, : self.trained] = blocks.flatten(1)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """uint8 [N, T/2], packed codes of the trained columns."""
        chunks = [self.latent.rows(rows) for rows in self.latent.chunks()]
        return torch.cat([nvfp4.pack(nvfp4.encode_e2m1(u)) for u in chunks])

    def finished(self, codes: Tensor) -> ARCTensor:
        """The tensor this began with, the codes [N, T/2] of trained columns put in; same layout."""
        plain = self.tensor.to_layout("plain")
        qdata = plain.qdata.clone()
        count = self.trained // nvfp4.BLOCK_SIZE
        nvfp4.bytes_of_blocks(qdata).index_copy_(
            1, self.order[:count], nvfp4.bytes_of_blocks(codes.to(qdata.device))
        )
        names, attributes = plain.__tensor_flatten__()
        tensors = {name: getattr(plain, name) for name in names} | {"qdata": qdata}
        return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None).to_layout(
            self.tensor.weight_layout
        )

    @torch.no_grad()
    def effective_input(self, x: Tensor) -> Tensor:
        """What the columns meet where x [M, K] is the (transformed) input: [M, C]."""
        tensor = self.tensor
        if not tensor.quantizes_input:
            blocks = nvfp4.to_blocks(x)
            columns = torch.cat((blocks, blocks.index_select(1, tensor.weight_blocks)), dim=1)
            return columns.to(self.values.dtype).index_select(1, self.order).flatten(1)
        qdata, scale, outer = quant_augment(
            x,
            tensor.act_blocks,
            tensor.weight_blocks,
            tensor.act_outer_scale,
            tensor.activation_scale,
            channel_order=tensor.channel_order,
            act_channels=tensor.act_channels,
            block_scale=tensor.activation_block_scale,
        )
        columns = nvfp4.to_blocks(nvfp4.decode(qdata, scale).mul_(outer.unsqueeze(1)))
        base, added = tensor.base_blocks, tensor.act_blocks.shape[0]
        columns[:, :base].index_add_(1, tensor.act_blocks, columns[:, base : base + added])
        stored = self.order + added * (self.order >= base)
        return columns.to(self.values.dtype).index_select(1, stored).flatten(1)


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of products under training, by the model's: in fp16 small gradients would vanish."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _free_then_fine(tensor: ARCTensor) -> Tensor:
    """Base blocks without a weight residual, then those that have one: int64 [K16/16]."""
    blocks = torch.arange(tensor.base_blocks, device=tensor.device)
    fine = tensor.weight_blocks.long()
    return torch.cat((blocks[~torch.isin(blocks, fine)], fine))


def _block_order(tensor: ARCTensor) -> Tensor:
    """Stored block of every block in training order, int64 [C/16]."""
    fine, base = tensor.weight_blocks.shape[0], tensor.base_blocks
    order, stored = _free_then_fine(tensor), tensor.scale.shape[1]
    blocks = torch.arange(stored, device=tensor.device)
    free, coarse = order[: base - fine], order[base - fine :]
    return torch.cat((free, blocks[stored - fine :], coarse, blocks[base : stored - fine]))


def _channel_columns(tensor: ARCTensor, order: Tensor) -> Tensor:
    """int64 [K]: the trained column of every channel of the input."""
    blocks = torch.empty_like(order[: tensor.base_blocks])
    blocks[_free_then_fine(tensor)] = torch.arange(tensor.base_blocks, device=order.device)
    within = torch.arange(nvfp4.BLOCK_SIZE, device=order.device)
    columns = (blocks.unsqueeze(1) * nvfp4.BLOCK_SIZE + within).flatten()  # by plan order
    columns = columns[: tensor.in_features]
    if tensor.channel_order is None:
        return columns
    return torch.empty_like(columns).index_copy_(0, tensor.channel_order.long(), columns)


class _StraightThrough(torch.autograd.Function):
    """outer_w * inputs W^T, with gradients for x, A and B as if nothing were rounded."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, inputs: Tensor, weight: TunedWeight
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.dtype = weight, x.dtype
        y = inputs.new_empty((inputs.shape[0], weight.values.shape[0]))
        return torch.addmm(y, inputs, weight.values.t(), beta=0, alpha=weight.outer).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), weight = ctx.saved_tensors, ctx.weight
        grad, trained = grad.to(inputs.dtype), weight.trained
        grad_x = grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            fine = weight.tensor.num_weight_channels
            columns = grad @ weight.values[:, : trained + fine]
            columns[:, trained - fine : trained] += columns[:, trained:]
            channels = weight.channels.expand(columns.shape[0], -1)
            grad_x = columns.gather(1, channels).mul_(weight.outer).to(ctx.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight = grad.t() @ inputs[:, :trained]
            found = weight.latent.gradients(of_weight)
            grad_left, grad_right = (g.mul_(weight.outer) for g in found)
        return grad_x, grad_left, grad_right, None, None


@dataclass
class InputCache:
    """The last input and what quantizing it gave: q, k and v (gate and up) read one tensor."""

    x: Tensor | None = None
    key: Any = None
    inputs: Tensor | None = None

    def effective(self, x: Tensor, source: Tensor, weight: TunedWeight) -> Tensor:
        """`weight.effective_input(x)`, x made of `source`, or the same as last time."""
        plan = weight.tensor.input_plan
        key = (plan, source._version)
        if not plan or source is not self.x or key != self.key:
            self.x, self.key, self.inputs = source, key, weight.effective_input(x)
        return self.inputs

    def clear(self) -> None:
        """Let the last input go."""
        self.x = self.key = self.inputs = None


class TunedForward:
    """Stands in for the forward of a linear while its weight is trained."""

    def __init__(self, weight: TunedWeight, bias: Tensor | None, cache: InputCache) -> None:
        self.weight, self.bias, self.cache = weight, bias, cache

    def __call__(self, input: Tensor) -> Tensor:
        """input [*, K] to [*, N]."""
        weight, tensor = self.weight, self.weight.tensor
        rows = input.reshape(-1, input.shape[-1])
        x = _transformed(rows, tensor)
        inputs = self.cache.effective(x.detach(), input, weight)
        y = _StraightThrough.apply(x, weight.latent.left, weight.latent.right, inputs, weight)
        if tensor.down is not None:
            hidden = F.linear(rows, tensor.down.to(rows.dtype))
            y = y + F.linear(hidden, tensor.up.to(rows.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*input.shape[:-1], y.shape[1])


def _transformed(rows: Tensor, tensor: ARCTensor) -> Tensor:
    """rows [M, K] scaled and rotated as `arc::transform_input` does, with a gradient."""
    x = rows
    if tensor.input_scale is not None:
        x = x * tensor.input_scale.to(x.dtype)
    return x if tensor.rotation is None else rotate(x, tensor.rotation).to(rows.dtype)
