"""What happens to a linear before its weight is quantized: channel scales, rotation, low rank.

    y = x W^T = T(x) T'(W - U D)^T + x D^T U^T        T(x) = (x * input_scale) H
                                                      T'(w) = (w / input_scale) H

Linears that read one input share T and D (SVDQuant's joint q/k/v). The low-rank branch reads the
untransformed x, so that T is folded into D once and for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arc_ao.calibration.observer import (
    InputStatistics,
    channel_errors,
    channel_order_of,
    from_order,
)
from arc_ao.calibration.residual_gram import residual_gram
from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import hadamard_signs, rotate
from arc_ao.methods.lowrank import LowRank, iterated, metric_root, sketched_svd, weighted_svd
from arc_ao.methods.scale_search import choose_scale_bits
from arc_ao.methods.smooth import flatten_scales, search_awq_scales, search_scales
from arc_ao.ops import block_residuals

SEARCH_ROWS = 256  # of the sample, on which scales and branches are compared
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Preparation:
    """T and the branches of linears that share an input."""

    input_scale: Tensor | None = None  # fp32 [K], powers of two
    rotation: Tensor | None = None  # int8 [h, h]
    branches: tuple[LowRank, ...] = ()  # one a linear, 16 bits, all with the same `down`

    @property
    def is_trivial(self) -> bool:
        """Whether nothing happens at all."""
        return self.input_scale is None and self.rotation is None and not self.branches

    def transform_input(self, x: Tensor) -> Tensor:
        """T(x) of rows [M, K], fp32."""
        x = x.float() if self.input_scale is None else x.float() * self.input_scale
        return x if self.rotation is None else rotate(x, self.rotation)

    def transform_weight(self, weight: Tensor) -> Tensor:
        """T'(w) of rows [N, K], fp32."""
        w = weight.float() if self.input_scale is None else weight.float() / self.input_scale
        return w if self.rotation is None else rotate(w, self.rotation)

    def residual(self, weight: Tensor, rows: slice, member: int = 0) -> Tensor:
        """T'(W - U D) of some rows of a member's weight [N, K], fp32: what is quantized."""
        w = weight[rows].float()
        if self.branches:
            branch = self.branches[member]
            w = w - branch.up[rows].float() @ branch.down.float()
        return self.transform_weight(w)

    def of_member(self, member: int) -> "Preparation":
        """The same for one linear alone."""
        return replace(self, branches=self.branches[member : member + 1])


UNTOUCHED = Preparation()


def prepare(
    weights: list[Tensor],
    statistics: InputStatistics | None,
    sample: Tensor | None,
    config: ARCConfig,
    error: Callable[[Preparation], float],
) -> Preparation:
    """Choose T and the branches of the linears behind one input.

    Args:
        weights: [N, K] each.
        sample: rows [M, K] of the input, or None where config asks for neither search nor branch.
        config: resolved.
        error: of the linears' output on SEARCH_ROWS rows of the sample, everything on.
    """
    rotation = hadamard_signs(config.rotation) if config.rotation else None
    if rotation is not None:
        rotation = rotation.to(weights[0].device)
    prepared = Preparation(rotation=rotation)
    if config.smooth == "flatten":
        prepared = replace(prepared, input_scale=1 / flatten_scales(statistics.amax))
    if config.smooth == "search":
        prepared = _searched(prepared, weights, statistics, config, error)
    if config.smooth == "awq":
        prepared = _awq(prepared, weights, sample, config)
    if config.rank:
        branch = _branch(prepared, weights, sample, config, error)
        prepared = replace(prepared, branches=_split(branch, weights, prepared))
    return prepared


def _searched(
    prepared: Preparation,
    weights: list[Tensor],
    statistics: InputStatistics,
    config: ARCConfig,
    error: Callable[[Preparation], float],
) -> Preparation:
    """Scales by the output error; with a branch inside (a sketch of it) where it is iterated, as in
    SVDQuant."""
    weight_amax = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()

    def with_scales(scales: Tensor) -> Preparation:
        candidate = replace(prepared, input_scale=1 / scales)
        if config.rank and config.branch_iterations:
            branch = sketched_svd(_joined(candidate, weights), config.rank)
            candidate = replace(candidate, branches=_split(branch, weights, candidate))
        return candidate

    scales = search_scales(statistics.amax, weight_amax, lambda s: error(with_scales(s)))
    return replace(prepared, input_scale=1 / scales)


def _awq(
    prepared: Preparation, weights: list[Tensor], sample: Tensor, config: ARCConfig
) -> Preparation:
    """Scales by the error of rounding weights alone, as AWQ has it also where inputs are quantized:
    a branch and residuals come after it."""
    scaled = lambda scales: replace(prepared, input_scale=1 / scales)
    rows = search_rows(sample)
    error = lambda scales: weight_only_error(scaled(scales), weights, rows, config)
    return scaled(search_awq_scales(sample.float().abs().mean(0), error))


def weight_only_error(
    prepared: Preparation, weights: list[Tensor], rows: Tensor, config: ARCConfig
) -> float:
    """Squared error of the outputs on rows [M, K] where only the weights [N, K] are rounded, each
    relative to its output's energy."""
    x, total = prepared.transform_input(rows), 0.0
    for weight in weights:
        w = prepared.transform_weight(weight)
        error = x @ (dequantized(w, config, x.square().mean(0)) - w).t()
        energy = (x @ w.t()).square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        total += (error.square().sum() / energy).item()
    return total


def search_rows(sample: Tensor) -> Tensor:
    """At most SEARCH_ROWS rows of a sample [M, K], evenly spaced."""
    return sample[:: -(-sample.shape[0] // SEARCH_ROWS)]


def _joined(prepared: Preparation, weights: list[Tensor]) -> Tensor:
    """T'(W) of all members, fp32 [sum of N, K]."""
    return torch.cat([prepared.transform_weight(w) for w in weights])


def _branch(
    prepared: Preparation,
    weights: list[Tensor],
    sample: Tensor,
    config: ARCConfig,
    error: Callable[[Preparation], float],
) -> LowRank:
    """The branch of all members together, for the transformed input."""
    root = None
    if config.branch == "arhq":
        root = metric_root(residual_gram(quantization_residual(prepared.transform_input(sample))))

    def output_error(branch: LowRank) -> float:
        return error(replace(prepared, branches=_split(branch, weights, prepared)))

    return iterated(
        _joined(prepared, weights),
        lambda matrix: weighted_svd(matrix, config.rank, root),
        quantize=lambda weight: dequantized(weight, config),
        error=output_error,
        iterations=config.branch_iterations,
    )


def branch_sweep(
    weights: list[Tensor], sample: Tensor, config: ARCConfig, ranks: Sequence[int]
) -> dict[int, Preparation]:
    """Branches of several ranks from one decomposition, without transform or iterations.

    Only ranks below half of the smallest dimension are there.

    Args:
        weights: [N, K] each, of the linears behind one input; sample: rows [M, K] of it.
        config: `branch` says how to decompose.
    """
    matrix = _joined(UNTOUCHED, weights)
    usable = [rank for rank in ranks if 2 * rank <= min(matrix.shape)]
    if not usable:
        return {}
    root = None
    if config.branch == "arhq":
        root = metric_root(residual_gram(quantization_residual(sample.float())))
    branch = weighted_svd(matrix, max(usable), root)
    split = {rank: _split(branch.truncate(rank), weights, UNTOUCHED) for rank in usable}
    return {rank: Preparation(branches=branches) for rank, branches in split.items()}


def _split(branch: LowRank, weights: list[Tensor], prepared: Preparation) -> tuple[LowRank, ...]:
    """One branch a member, in 16 bits, T folded into `down`, which all of them share."""
    down = branch.down
    if prepared.rotation is not None:
        down = rotate(down, prepared.rotation)
    if prepared.input_scale is not None:
        down = down * prepared.input_scale
    dtype = branch_dtype(weights[0].dtype)
    branch = LowRank(down, branch.up).balanced(dtype)
    ups = branch.up.split([w.shape[0] for w in weights])
    return tuple(LowRank(branch.down, up.contiguous()) for up in ups)


def branch_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """16-bit dtype of the factors: the weight's own, bf16 for fp32."""
    return torch.bfloat16 if weight_dtype == torch.float32 else weight_dtype


def dequantized(weight: Tensor, config: ARCConfig, importance: Tensor | None = None) -> Tensor:
    """Q(w) of fp32 [N, K] with the config's block scales, searched with E[x^2] [K] if given."""
    amax = weight.abs().amax()
    blocks = nvfp4.to_blocks(weight * nvfp4.inverse_outer_scale(amax))
    weights = None if importance is None else nvfp4.to_blocks(importance)
    scale = choose_scale_bits(blocks, config.weight_scale, weights)
    values = blocks.flatten(1)
    values = values - block_residuals(values, scale)
    return values[:, : weight.shape[1]] * nvfp4.outer_scale(amax)


def quantization_residual(rows: Tensor) -> Tensor:
    """x - Q(x) of fp32 rows [M, K], one outer scale a row."""
    amax = rows.abs().amax(1, keepdim=True)
    blocks = nvfp4.to_blocks(rows * nvfp4.inverse_outer_scale(amax))
    residual = blocks - nvfp4.decode_blocks(*nvfp4.quantize_blocks(blocks))
    return residual.flatten(1)[:, : rows.shape[1]] * nvfp4.outer_scale(amax)


def transformed_statistics(
    statistics: InputStatistics | None,
    sample: Tensor | None,
    prepared: Preparation,
    config: ARCConfig,
) -> InputStatistics | None:
    """Statistics of T(x): errors and what a rotation mixes from the sample, the rest exactly.

    Sorting is by the amax of T(x); by that of x itself where flattening has made all alike (SERQ's
    saliency order).
    """
    if statistics is None or (prepared.input_scale is None and prepared.rotation is None):
        return statistics
    rows = prepared.transform_input(sample)
    if prepared.rotation is None:
        amax = statistics.amax * prepared.input_scale
        mean_square = statistics.mean_square * prepared.input_scale.square()
    else:
        amax, mean_square = rows.abs().amax(0), rows.square().mean(0)
    order = None
    if statistics.order is not None:
        order = statistics.order
        if config.smooth != "flatten":
            order = channel_order_of(config.channel_order, amax, mean_square)
    error = torch.zeros_like(amax)
    if config.has_residuals:  # what is chosen by it
        for some in rows.split(CHUNK_ROWS):
            ((squared, _),) = channel_errors(some, [order])
            error += from_order(squared.sum(0), order) / rows.shape[0]
    return InputStatistics(amax, mean_square, error, order)
