"""GPTQ: round a weight column by column, later columns making up for the error of earlier ones.

Rounding w [K] of one output row to q costs, on inputs x with H = E[x^T x],

    (w - q) H (w - q)^T = |(w - q) R|^2,    H = R R^T, R upper triangular in processing order.

Component i of (w - q) R holds columns 0..i only. Taken in order, the grid point next to

    v_i = w_i + sum_{j < i} (w_j - q_j) R[j, i] / R[i, i]

makes component i as small as it can be. This equals GPTQ (arXiv 2210.17323), whose update with the
Cholesky factor of the inverse is the same elimination, and needs no inverse. Feedback from columns
of earlier groups of COLUMNS is one matrix product per group.

Fixed beforehand: block scales, and the order. Columns with a residual come last and the others by
falling H[i, i]; a column of a residual block is one whose quantizer has two stages, and only what
both leave is an error. Its grid is some ten times finer, so that what ends there costs little.
Copied columns are columns of their own, whose input is the quantized activation residual. Damping
adds to the diagonal, `damping` times its mean, against directions that calibration has not seen.
The fewer tokens for each column, the more of H is noise, and the more damping leaves the least
error on other tokens (`damping_for`).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.methods.cholesky import damped_cholesky
from arc_ao.methods.output_factor import OutputFactor, tile_chunks
from arc_ao.methods.scale_search import choose_scales
from arc_ao.methods.weights import LayerPlan, assemble, in_order
from arc_ao.ops import block_residuals, encode_blocks, round_columns
from arc_ao.tensor import ARCTensor

COLUMNS = 128  # rounded before their feedback to the other groups is one matrix product
CHUNK_ELEMENTS = 1 << 21  # rows rounded at a time: 8 MiB per fp32 temporary
SCALE_ELEMENTS = 1 << 18  # rows whose scales are searched at a time: 1 MiB
DAMPING, LEAST, MOST = 1.5, 0.1, 1.0  # DAMPING / (tokens for each column), and its limits
LITTLE = 0.02  # damping for inputs of a few strong directions, which few tokens show
# Of the error, which little damping has to stay below. Tokens kept aside have neighbours that are
# fitted: on SmolLM2 they favour LITTLE by a factor down to .85 where other text of the same kind
# disagrees, and by .66 and less where it agrees.
MARGIN = 0.75


def damping_for(tokens: int, columns: int) -> float:
    """Damping of a Hessian [columns, columns] of so many tokens, over its mean diagonal.

    Measured on linears of SmolLM2-135M, by the output error on tokens of the calibration's kind and
    of another (books): about the least of both at 2.7, 7, 11 and 28 tokens a column. With more
    tokens less damping is better for the calibration's kind alone.
    """
    return min(MOST, max(LEAST, DAMPING * columns / max(1, tokens)))


@dataclass(frozen=True)
class Rounding:
    """What rounding the weights of one input needs of its tokens, A = K16 + copied columns."""

    order: Tensor  # int64 [A], columns from the last rounded to the first
    lower: Tensor | None  # fp32 [A, A], H[order][:, order] = lower lower^T; None: to nearest
    local: Tensor  # fp32 [A/16, 16, 16], diagonal blocks of H in plan order
    damping: float = 0.0  # over the mean diagonal


def prepare_rounding(
    take: Callable[[], Tensor | None],
    plan: LayerPlan,
    names: list[str],
    tokens: int | None = None,
    error: Callable[[Rounding], float] | None = None,
) -> Rounding | None:
    """Factorize H for linears of one input.

    Where no token was seen or damping does not make H positive definite, a warning names the
    layers, and they are rounded to nearest.

    Args:
        take: hands over H, fp32 [A, A] (see methods/gram.py), or None. A function, so that
            nobody holds H while its factor is made: two such matrices are the most there are.
        names: of the linears, for warnings.
        tokens: that H was summed over, for a damping that the config leaves open; None: enough.
        error: that a rounding leaves on other tokens. With it, an open damping is LITTLE where
            that leaves clearly less.
    """
    gram = take()
    if gram is None or not torch.isfinite(gram).all():
        found = "no token" if gram is None else "NaN or Inf"
        _warn_nearest(names, f"expected finite calibration inputs, found {found}")
        return None
    diagonal = gram.diagonal().clone()
    rounding = Rounding(_order(diagonal, plan), None, _diagonal_blocks(gram))
    if plan.config.rounding != "gptq" or not diagonal.amax() > 0:
        return rounding
    gram = gram.index_select(0, rounding.order)
    gram = gram.index_select(1, rounding.order)
    dampings = [plan.config.damping]
    if dampings == [None]:
        rule = LEAST if tokens is None else damping_for(tokens, gram.shape[0])
        dampings = [rule] if error is None else [rule, LITTLE]
    found = _least_error(gram, rounding, dampings, error)
    if found.lower is None:
        _warn_nearest(names, "the damped Hessian is not positive definite")
    return found


def _least_error(
    gram: Tensor,
    rounding: Rounding,
    dampings: list[float],
    error: Callable[[Rounding], float] | None,
) -> Rounding:
    """`rounding` with a factor of `gram`, its Hessian in order, and the first of the dampings or
    one that leaves less than MARGIN of its error; overwrites the diagonal.

    Factors are made again for the last damping: one at a time is in memory.
    """
    diagonal = gram.diagonal().clone()
    mean = diagonal[diagonal > 0].mean()  # of live channels

    def factorized(damping: float) -> Rounding:
        lower = damped_cholesky(gram, diagonal, damping * mean)
        return replace(rounding, lower=lower, damping=damping)

    best = dampings[0]
    if len(dampings) > 1:
        least = MARGIN * error(factorized(best))
        for damping in dampings[1:]:
            left = error(factorized(damping))
            if left < least:
                best, least = damping, left
    return factorized(best)


def _warn_nearest(names: list[str], reason: str) -> None:
    warnings.warn(f"{', '.join(names)}: {reason}; rounding to nearest instead", stacklevel=3)


def _diagonal_blocks(gram: Tensor) -> Tensor:
    """[A/16, 16, 16]"""
    blocks = gram.unflatten(0, (-1, nvfp4.BLOCK_SIZE)).unflatten(2, (-1, nvfp4.BLOCK_SIZE))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _order(diagonal: Tensor, plan: LayerPlan) -> Tensor:
    """Columns from the last rounded to the first: with residual, then by rising diagonal."""
    fine = torch.zeros_like(diagonal, dtype=torch.bool)
    nvfp4.to_blocks(fine)[plan.weight_blocks.long()] = True
    by_diagonal = torch.argsort(diagonal, descending=True, stable=True)
    first_to_last = torch.cat([by_diagonal[~fine[by_diagonal]], by_diagonal[fine[by_diagonal]]])
    return first_to_last.flip(0)


def round_weight(
    weight: Tensor, plan: LayerPlan, rounding: Rounding, outputs: OutputFactor | None = None
) -> ARCTensor:
    """Quantize weight [N, K] as planned, with fixed scales and error feedback: among the columns
    of a row, and with `outputs` among the rows of a tile, too."""
    inverse = nvfp4.inverse_outer_scale(plan.amax)
    columns = rounding.order.shape[0]
    qdata, scales = [], []
    for rows in tile_chunks(weight.shape[0], columns, CHUNK_ELEMENTS):
        residual = plan.prepared.residual(weight, rows)
        target = in_order(residual, plan.channel_order) * inverse  # [n, K16]
        if plan.act_channels is not None:
            target = torch.cat([target, target.index_select(1, plan.act_channels)], dim=1)
        some = None if outputs is None else outputs.of_rows(rows)
        codes, scale = _round_rows(target, plan, rounding, some)
        qdata.append(nvfp4.pack(codes))
        scales.append(nvfp4.encode_e4m3(scale))
    return assemble(weight, plan, torch.cat(qdata), torch.cat(scales))


def _round_rows(
    target: Tensor, plan: LayerPlan, rounding: Rounding, outputs: OutputFactor | None
) -> tuple[Tensor, Tensor]:
    """Codes [n, A + 16 Rw] and block scales [n, A/16 + Rw] of outer-scaled rows target [n, A]."""
    parts = [
        _scales(nvfp4.to_blocks(target[rows]), plan, rounding.local)
        for rows in nvfp4.row_chunks(target, SCALE_ELEMENTS)
    ]
    scale, fine = (torch.cat(part) for part in zip(*parts, strict=True))
    if rounding.lower is None:
        codes = _nearest(target, scale, fine, plan.weight_blocks)
    elif outputs is None:
        codes = _round_columns(target, scale, fine, plan.weight_blocks, rounding, None)
    else:
        ordered = (t.index_select(0, outputs.order) for t in (target, scale, fine))
        codes = _round_columns(*ordered, plan.weight_blocks, rounding, outputs.upper)
        codes = torch.empty_like(codes).index_copy_(0, outputs.order, codes)
    return codes, torch.cat([scale, fine], dim=1)


def _scales(blocks: Tensor, plan: LayerPlan, local: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of blocks [n, A/16, 16] and of what they leave in the residual blocks."""
    method, chosen = plan.config.weight_scale, plan.weight_blocks
    scale = choose_scales(blocks, method, local)
    kept = blocks.index_select(1, chosen).flatten(1)
    kept_scale = nvfp4.encode_e4m3(scale.index_select(1, chosen))
    left = nvfp4.to_blocks(block_residuals(kept, kept_scale))
    return scale, choose_scales(left, method, local[chosen.long()])


def _nearest(target: Tensor, scale: Tensor, fine: Tensor, chosen: Tensor) -> Tensor:
    """What `_round_columns` gives where no column makes up for another."""
    bits = nvfp4.encode_e4m3(scale)
    kept = nvfp4.to_blocks(target).index_select(1, chosen).flatten(1)
    left = block_residuals(kept, bits.index_select(1, chosen))
    packed = encode_blocks(target, bits), encode_blocks(left, nvfp4.encode_e4m3(fine))
    return nvfp4.unpack(torch.cat(packed, dim=1))


def _round_columns(
    target: Tensor,
    scale: Tensor,
    fine: Tensor,
    chosen: Tensor,
    rounding: Rounding,
    outputs: Tensor | None,
) -> Tensor:
    """Codes [n, A + 16 Rw] of target [n, A] under scales [n, A/16] and, of the residual blocks
    `chosen`, [n, Rw]; the error of both is fed back.

    Columns are rows here: what one step reads lies together.
    """
    order, columns = rounding.order, rounding.order.shape[0]
    device = torch.device("cpu") if outputs is not None else target.device  # whose steps are small
    values = target.T[order].to(device)  # [A, n]
    grid = _Grid(scale.to(device), fine.to(device), chosen.to(device))
    lower, order = rounding.lower.to(device), order.to(device)
    outputs = None if outputs is None else outputs.to(device)
    codes = torch.empty_like(values, dtype=torch.uint8)
    fine_codes = codes.new_empty((fine.shape[1] * nvfp4.BLOCK_SIZE, codes.shape[1]))
    errors = torch.zeros_like(values)
    for stop in range(columns, 0, -COLUMNS):
        group = slice(max(0, stop - COLUMNS), stop)
        feedback = lower[stop:, group].T @ errors[stop:]  # [COLUMNS, n]
        under, fine_under = grid.of_columns(order[group])
        codes[order[group]], fines, errors[group] = round_columns(
            values[group], feedback, lower[group, group], under, fine_under, outputs
        )
        if fine_under is not None:
            has, places = grid.residuals(order[group])
            fine_codes[places] = fines[has]
    return torch.cat([codes, fine_codes]).T.to(target.device)


class _Grid:
    """Scales [n, A/16] of columns, and of those in `chosen` blocks their residuals', [n, Rw]."""

    def __init__(self, scale: Tensor, fine: Tensor, chosen: Tensor) -> None:
        self.scale, self.fine = scale.T.contiguous(), fine.T.contiguous()  # [blocks, n]
        self.stage = torch.full((self.scale.shape[0],), -1, device=scale.device)
        self.stage[chosen.long()] = torch.arange(len(chosen), device=scale.device)

    def of_columns(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """fp32 [C, n] each: scales, and those of residuals, 0 for columns without; None if all."""
        blocks = columns // nvfp4.BLOCK_SIZE
        stage = self.stage[blocks]
        if not (stage >= 0).any():
            return self.scale[blocks], None
        fine = self.fine[stage.clamp(min=0)]
        return self.scale[blocks], fine.masked_fill_((stage < 0).unsqueeze(1), 0)

    def residuals(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the columns have a residual, bool [C], and where the codes of those go."""
        stage = self.stage[columns // nvfp4.BLOCK_SIZE]
        has = stage >= 0
        return has, stage[has] * nvfp4.BLOCK_SIZE + columns[has] % nvfp4.BLOCK_SIZE
