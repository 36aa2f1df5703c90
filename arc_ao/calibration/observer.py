"""ARCObserver: O(K) statistics of what a linear reads.

Per input channel k, over all calibration tokens: the largest magnitude, the sum of squares, and
the sum of squared errors of plain NVFP4 (one outer scale per token). The errors depend on which
channels share a block, so they are kept for each channel order that the layer may get; for "amax"
and "rms" that is the order of what was seen so far, which settles after the first batches. Buffers
merge across batches (`observe`), copies (`merge`) and processes (`all_reduce`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arc_ao.calibration.input_gram import InputGram
from arc_ao.calibration.input_sample import InputSample
from arc_ao.formats import nvfp4
from arc_ao.ops import block_residuals, quant_augment

CHUNK_ELEMENTS = 1 << 18  # bounds the temporaries of one update


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one input, all fp32 [K] in the natural channel order."""

    amax: Tensor  # largest magnitude
    mean_square: Tensor  # E[x^2]
    mean_error: Tensor  # E[(x - Q(x))^2] with blocks formed in `order`
    order: Tensor | None  # int32 [K] permutation, None for the natural order


@dataclass(frozen=True)
class Increment:
    """What the tokens of one input add to the statistics; [K], errors [orders, K]."""

    amax: Tensor
    square_sum: Tensor
    error_sum: Tensor
    count: int
    running_amax: Tensor  # so far, these tokens included: sets the "amax" order
    running_square: Tensor  # likewise, the sum of squares: sets the "rms" order


def sorted_order(size: Tensor) -> Tensor:
    """Channels by decreasing size (int32 [K]); equal ones stay in their natural order."""
    return torch.argsort(size, descending=True, stable=True).int()


class ARCObserver(nn.Module):
    """Running statistics of the input of a linear.

    Args:
        in_features: K.
        channel_orders: orders in which blocks may be formed, of "none", "amax" and "rms".
        name: fully qualified name of the layer, for messages.
        sample_tokens: input rows that `keep` keeps in `sample`.
        sums_products: whether `keep` adds to `gram`. Neither is part of a state_dict.
    """

    def __init__(
        self,
        in_features: int,
        channel_orders: Sequence[str] = ("none",),
        name: str = "",
        sample_tokens: int = 0,
        sums_products: bool = False,
    ) -> None:
        super().__init__()
        self.sums_products = sums_products
        self.sample, self.gram = InputSample(sample_tokens), InputGram()
        self.channel_orders = tuple(channel_orders)
        self.name = name
        self.register_buffer("amax", torch.zeros(in_features, dtype=torch.float32))
        self.register_buffer("square_sum", torch.zeros(in_features, dtype=torch.float64))
        orders = len(self.channel_orders)
        self.register_buffer("error_sum", torch.zeros(orders, in_features, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def observe(self, x: Tensor) -> None:
        """Add the tokens of x [*, K].

        Raises:
            ValueError: x holds NaN or Inf, naming the layer; the statistics are unchanged.
        """
        self.add(self.measure(x))

    @torch.no_grad()
    def measure(self, x: Tensor) -> Increment:
        """What `observe(x)` adds, without adding it."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{self.name}: calibration input holds NaN or Inf; statistics of it would be "
                "meaningless. Check the model's dtype and the calibration data"
            )
        amax = rows.abs().amax(0).float() if rows.shape[0] else torch.zeros_like(self.amax)
        running_amax = torch.maximum(self.amax, amax)
        square_sum, error_sum = torch.zeros_like(self.square_sum), torch.zeros_like(self.error_sum)
        chunks = rows.split(max(1, CHUNK_ELEMENTS // max(1, rows.shape[1])))
        for chunk in chunks:
            square_sum += chunk.float().square().sum(0, dtype=torch.float64)
        running_square = self.square_sum + square_sum
        orders = [
            channel_order_of(name, running_amax, running_square) for name in self.channel_orders
        ]
        for chunk in chunks:
            for total, (error, order) in zip(error_sum, channel_errors(chunk, orders), strict=True):
                total += from_order(error.sum(0, dtype=torch.float64), order)
        count = rows.shape[0]
        return Increment(amax, square_sum, error_sum, count, running_amax, running_square)

    def orders(self) -> list[Tensor | None]:
        """The channel orders of the statistics, by what was seen so far."""
        return [channel_order_of(name, self.amax, self.square_sum) for name in self.channel_orders]

    def fits(self, increment: Increment) -> bool:
        """Whether `measure` would give the same here, after what this layer saw so far."""
        amax = torch.maximum(self.amax, increment.amax)
        square = self.square_sum + increment.square_sum
        same = {
            "amax": torch.equal(amax, increment.running_amax),
            "rms": torch.equal(square, increment.running_square),
        }
        return all(same.get(order, True) for order in self.channel_orders)

    def add(self, increment: Increment) -> None:
        """Add what `measure` found, here or in an observer of the same input."""
        torch.maximum(self.amax, increment.amax, out=self.amax)
        self.square_sum += increment.square_sum
        self.error_sum += increment.error_sum
        self.count += increment.count

    def keep(self, x: Tensor) -> None:
        """Keep rows of x and sum its products, as far as asked for; once for all that read x."""
        self.sample.add(x)
        if self.sums_products:
            self.gram.add(x)

    def merge(self, other: "ARCObserver") -> None:
        """Add the tokens that `other` saw."""
        torch.maximum(self.amax, other.amax, out=self.amax)
        self.square_sum += other.square_sum
        self.error_sum += other.error_sum
        self.count += other.count
        self.sample.merge(other.sample)
        self.gram.merge(other.gram)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge over the processes of `group`: amax by maximum, sums by addition."""
        dist.all_reduce(self.amax, op=dist.ReduceOp.MAX, group=group)
        for total in (self.square_sum, self.error_sum, self.count):
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        self.sample.all_gather(group)
        if self.sums_products:
            self.gram.all_reduce(self.amax, group)

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()
        self.sample.clear()
        self.gram = InputGram()

    def statistics(self, channel_order: str = "none") -> InputStatistics:
        """What was observed, for blocks formed in `channel_order`.

        Raises:
            ValueError: nothing was observed, or not in this order, naming the layer.
        """
        if channel_order not in self.channel_orders:
            raise ValueError(
                f"{self.name}: expected statistics for channel_order {channel_order!r}, found "
                f"{self.channel_orders}; use the same channel_order in prepare and convert"
            )
        if self.count == 0:
            raise ValueError(
                f"{self.name}: expected calibration tokens, found none; run the prepared model on "
                "calibration data before convert, or exclude the layer"
            )
        index = self.channel_orders.index(channel_order)
        return InputStatistics(
            amax=self.amax.float(),
            mean_square=(self.square_sum / self.count).float(),
            mean_error=(self.error_sum[index] / self.count).float(),
            order=channel_order_of(channel_order, self.amax, self.square_sum),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ARCObserver":
        """Moves with the model but keeps its dtypes: `model.bfloat16()` must not round sums."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.amax.shape[0]}, channel_orders={self.channel_orders}"


def channel_order_of(name: str, amax: Tensor, square: Tensor) -> Tensor | None:
    """Order int32 [K] by largest magnitudes or by (sums or means of) squares, None for "none"."""
    by = {"amax": amax, "rms": square}.get(name)
    return None if by is None else sorted_order(by)


def channel_errors(
    rows: Tensor, orders: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor | None]]:
    """(x - Q(x))^2 of rows [M, K] in plain NVFP4 with one outer scale a row, for each order.

    fp32 [M, K], its channels in the order beside it.
    """
    found = []
    for order in orders:
        ordered = rows if order is None else rows.index_select(1, order)
        found.append((plain_error(ordered), order))
    return found


def plain_error(rows: Tensor) -> Tensor:
    """(x - Q(x))^2 of rows [M, K] in plain NVFP4 with one outer scale a row, fp32."""
    no_blocks = torch.empty(0, dtype=torch.int32, device=rows.device)
    _, scale, outer = quant_augment(rows, no_blocks, no_blocks, None, "token")
    inverse = nvfp4.inverse_outer_scale(rows.abs().amax(1, keepdim=True).float())
    values = nvfp4.to_blocks(rows.float() * inverse).flatten(1)
    residual = block_residuals(values, scale)[:, : rows.shape[1]]
    return residual.mul_(outer.unsqueeze(1)).square_()


def from_order(values: Tensor, order: Tensor | None) -> Tensor:
    """Values [K] of channels in `order`, back in their natural order."""
    if order is None:
        return values
    return torch.empty_like(values).scatter_(0, order.long(), values)
