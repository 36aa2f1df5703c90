"""arc::round_columns: a group of a weight's columns rounded in turn, with error feedback.

Column c of the group wants v and becomes Q(v), under the scales of its blocks; where the column's
block has a residual, Q rounds twice, the second time what the first left:

    alone       v = w + f[c] / L[c, c]                              for all rows at once
                e = w - Q(v)
    together    v_i = w_i + (f[c, i] / L[c, c] + p_i) / S[i, i]     row after row of 64,
                p_k += S[i, k] (w_i - Q(v_i)), k >= i
                e = p, when all rows are done
    then        f[j] += L[c, j] e   for the columns j < c, which come after it

See methods/gptq.py for L and methods/output_factor.py for S.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops.checks import FP32, check_tensor
from arc_ao.ops.registry import define

TILE_ROWS = 64  # rows whose errors make up for each other


def round_columns_eager(
    values: Tensor,
    feedback: Tensor,
    lower: Tensor,
    scale: Tensor,
    fine: Tensor | None,
    outputs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns, the last one first.

    Args:
        values: fp32 [C, N], columns of a weight under the outer scale.
        feedback: fp32 [C, N], what columns before the group left for these.
        lower: fp32 [C, C], factor of the products of the inputs.
        scale: fp32 [C, N], block scales.
        fine: fp32 [C, N], block scales of residuals, 0 where a column has none, or None.
        outputs: fp32 [ceil(N/64), 64, 64], upper factors of the products of the outputs of 64 rows
            each, or None: rows do not know of each other.

    Returns:
        Codes uint8 [C, N] of the values and of their residuals ([0, N] without `fine`), and errors
        fp32 [C, N] as they go to the columns that follow.

    Raises:
        RuntimeError: other shapes or dtypes.
    """
    _check(values, feedback, lower, scale, fine, outputs)
    count, rows = values.shape
    waiting, inverse = feedback.clone(), lower.diagonal().reciprocal()
    codes = values.new_empty((count, rows), dtype=torch.uint8)
    fine_codes = values.new_empty((0 if fine is None else count, rows), dtype=torch.uint8)
    errors = torch.empty_like(values)
    for c in range(count - 1, -1, -1):
        under = None if fine is None else fine[c]
        wanted = waiting[c] * inverse[c]
        if outputs is None:
            wanted = values[c] + wanted
            codes[c], residual, rounded = _rounded(wanted, scale[c], under)
            errors[c] = values[c] - rounded
        else:
            codes[c], residual, errors[c] = _together(values[c], wanted, scale[c], under, outputs)
        if residual is not None:
            fine_codes[c] = residual
        waiting[:c] += errors[c] * lower[c, :c].unsqueeze(1)
    return codes, fine_codes, errors


def _rounded(
    wanted: Tensor, scale: Tensor, fine: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes, codes of the residual, and what they stand for."""
    codes = nvfp4.encode_e2m1(wanted * scale.reciprocal())
    value = nvfp4.decode_e2m1(codes) * scale
    if fine is None:
        return codes, None, value
    residual = nvfp4.encode_e2m1((wanted - value) * fine.reciprocal())
    return codes, residual, value + nvfp4.decode_e2m1(residual) * fine


def _together(
    values: Tensor, feedback: Tensor, scale: Tensor, fine: Tensor | None, outputs: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One column [N], tiles of 64 rows side by side: codes, codes of the residual, p."""
    rows = values.shape[0]
    values, feedback, scale = tiled(values), tiled(feedback), tiled(scale)
    fine = None if fine is None else tiled(fine)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    residual = None if fine is None else torch.zeros_like(codes)
    passed = torch.zeros_like(values)
    for i in range(TILE_ROWS):
        wanted = values[:, i] + (feedback[:, i] + passed[:, i]) / outputs[:, i, i]
        under = None if fine is None else fine[:, i]
        codes[:, i], second, rounded = _rounded(wanted, scale[:, i], under)
        if second is not None:
            residual[:, i] = second
        passed[:, i:] += outputs[:, i, i:] * (values[:, i] - rounded).unsqueeze(1)
    done = (t if t is None else t.flatten()[:rows] for t in (codes, residual, passed))
    return tuple(done)


def tiled(outputs: Tensor) -> Tensor:
    """[*, N] as [*, ceil(N/64), 64], zeros behind."""
    return F.pad(outputs, (0, -outputs.shape[-1] % TILE_ROWS)).unflatten(-1, (-1, TILE_ROWS))


def _check(values: Tensor, *others: Tensor | None) -> None:
    """The arguments of the operator, in its order."""
    check_tensor("round_columns", "values", values, FP32, (None, None), values.device)
    columns, rows = values.shape
    same, tiles = (columns, rows), -(-rows // TILE_ROWS)
    expected = {
        "feedback": same,
        "lower": (columns, columns),
        "scale": same,
        "fine": same,
        "outputs": (tiles, TILE_ROWS, TILE_ROWS),
    }
    for (name, shape), tensor in zip(expected.items(), others, strict=True):
        if tensor is not None:
            check_tensor("round_columns", name, tensor, FP32, shape, values.device)


def _round_columns_fake(values, feedback, lower, scale, fine, outputs):
    _check(values, feedback, lower, scale, fine, outputs)
    codes = values.new_empty(values.shape, dtype=torch.uint8)
    fine_codes = codes.new_empty((0 if fine is None else values.shape[0], values.shape[1]))
    return codes, fine_codes, torch.empty_like(values)


round_columns = define(
    "round_columns(Tensor values, Tensor feedback, Tensor lower, Tensor scale, Tensor? fine, "
    "Tensor? outputs) -> (Tensor, Tensor, Tensor)",
    round_columns_eager,
    _round_columns_fake,
)
