"""arc::rms_norm_quant_augment and its kin: what makes a linear's input, and its quantization.

    rms_norm       round(round(x * rms) * weight)     rms = 1 / sqrt(mean(x^2) + eps)
    add_rms_norm   the same of round(x + residual), which is returned too
    silu_mul       round(round(silu(gate)) * up)
    gelu           round(gelu(x)), and round(round(gelu(x)) * up) where there is an up

followed by `arc::quant_augment`. Rounding is to the dtype of x, where the unfused chain of a model
in that dtype would store a tensor. The mean is taken in float64, so that no order of summation
shows in the bits; the exponential is a fixed polynomial, so that every kernel gives the same bits
(within 1 ulp of fp32 of the true value).
"""

import math

import torch
from torch import Tensor

from arc_ao.ops.checks import check, check_rows, check_same, check_tensor
from arc_ao.ops.quant_augment import (
    AUGMENTATION,
    check_augmentation,
    quant_augment_eager,
    quant_augment_fake,
)
from arc_ao.ops.registry import define

ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
# Cephes expf: ln 2 in two parts, and the polynomial for e^r on |r| <= ln(2) / 2.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_LEADING = 1.9875691500e-4
EXP_POLYNOMIAL = (  # behind the leading coefficient
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
EXP_RANGE = (-87.0, 88.0)
# erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2) for z >= 0, t = 1 / (1 + p z), within 1.5e-7: Abramowitz
# and Stegun, Handbook of Mathematical Functions, 7.1.26. From a5 to a1.
ERFC_P = 0.3275911
ERFC_POLYNOMIAL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
TANH_CUBE, TANH_SLOPE = 0.044715, 2 * math.sqrt(2 / math.pi)
APPROXIMATIONS = ("none", "tanh")


def exp(x: Tensor) -> Tensor:
    """e^x of fp32 x, clamped to EXP_RANGE, in single multiplications and additions."""
    x = x.clamp(*EXP_RANGE)
    shifted = x * _constant(math.log2(math.e), x) + ROUND
    n = shifted - ROUND
    r = x - n * _constant(LN2_HIGH, x)
    r = r - n * _constant(LN2_LOW, x)
    p = _constant(EXP_LEADING, x).expand_as(r)
    for coefficient in EXP_POLYNOMIAL:
        p = p * r + _constant(coefficient, x)
    y = (p * r) * r + r + 1.0
    power = (shifted.view(torch.int32) - _constant(ROUND, x).view(torch.int32) + 127) << 23
    return y * power.view(torch.float32)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each step rounded to the dtype of gate."""
    g = gate.float()
    silu = (g / (exp(0.0 - g) + 1.0)).to(gate.dtype)
    return (silu.float() * up.float()).to(gate.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), rounded to the dtype of x.

    By the error function ("none", within 1e-7 |x|), or by its usual approximation ("tanh"),
    x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))).
    """
    v = x.float()
    if approximate == "tanh":
        inner = v + (v * v * v) * _constant(TANH_CUBE, v)
        return (v / (exp(0.0 - inner * _constant(TANH_SLOPE, v)) + 1.0)).to(x.dtype)
    z = v.abs() * _constant(math.sqrt(0.5), v)
    t = (z * _constant(ERFC_P, v) + 1.0).reciprocal()
    p = _constant(ERFC_POLYNOMIAL[0], v).expand_as(v)
    for coefficient in ERFC_POLYNOMIAL[1:]:
        p = p * t + _constant(coefficient, v)
    tail = (p * t * 0.5) * exp(0.0 - z * z)  # Phi(-|x|)
    return (v * torch.where(v < 0, tail, 1.0 - tail)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over its root mean square, rounded, times weight [K], rounded to the dtype of x."""
    values = x.float()
    mean = values.double().square().mean(-1, keepdim=True).float()
    # sqrt in float64: that of fp32 is not rounded correctly by every math library behind PyTorch.
    inverse = (mean + _constant(eps, values)).double().sqrt().float().reciprocal()
    normed = (values * inverse).to(x.dtype)
    return (weight.float() * normed.float()).to(x.dtype)


def _constant(value: float, like: Tensor) -> Tensor:
    """fp32 [] on the device of `like`: a Python number would be taken in double by some kernels."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def rms_norm_quant_augment_eager(x, weight, eps, *augmentation) -> tuple[Tensor, Tensor, Tensor]:
    """quant_augment of `rms_norm(x, weight, eps)`.

    Args:
        x: bf16, fp16 or fp32 [*, K]; weight: [K] of the same dtype; eps: added to the mean square.
        augmentation: the arguments of `quant_augment` behind x.

    Raises:
        RuntimeError: a weight of another shape or dtype; what `quant_augment` refuses.
    """
    check_augmentation("rms_norm_quant_augment", x, *augmentation)
    check_norm("rms_norm_quant_augment", x, weight)
    return quant_augment_eager(rms_norm(x, weight, eps), *augmentation)


def add_rms_norm_quant_augment_eager(
    x, residual, weight, eps, *augmentation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quant_augment of the norm of `x + residual`, and that sum [*, K] in the dtype of x.

    Args and Raises as in `rms_norm_quant_augment_eager`; residual has the shape and dtype of x.
    """
    check_augmentation("add_rms_norm_quant_augment", x, *augmentation)
    check_add_norm(x, residual, weight)
    total = (x.float() + residual.float()).to(x.dtype)
    return *quant_augment_eager(rms_norm(total, weight, eps), *augmentation), total


def silu_mul_quant_augment_eager(gate, up, *augmentation) -> tuple[Tensor, Tensor, Tensor]:
    """quant_augment of `silu_mul(gate, up)`, both [*, K] of one dtype.

    Raises:
        RuntimeError: shapes or dtypes that differ; what `quant_augment` refuses.
    """
    check_augmentation("silu_mul_quant_augment", gate, *augmentation)
    check_same("silu_mul_quant_augment", "up", gate, up)
    return quant_augment_eager(silu_mul(gate, up), *augmentation)


def gelu_quant_augment_eager(x, up, approximate, *augmentation) -> tuple[Tensor, Tensor, Tensor]:
    """quant_augment of `gelu(x, approximate)`, times `up` where it is not None.

    Args:
        x: bf16, fp16 or fp32 [*, K]; up: the same, or None; approximate: "none" or "tanh".

    Raises:
        RuntimeError: shapes or dtypes that differ; another approximation; what `quant_augment`
            refuses.
    """
    check_augmentation("gelu_quant_augment", x, *augmentation)
    check_gelu(x, up, approximate)
    y = gelu(x, approximate)
    if up is not None:
        y = (y.float() * up.float()).to(x.dtype)
    return quant_augment_eager(y, *augmentation)


def check_gelu(x: Tensor, up: Tensor | None, approximate: str) -> None:
    """Refuse an unknown approximation, or an `up` that does not fit x."""
    check(
        approximate in APPROXIMATIONS,
        f"gelu_quant_augment: approximate must be one of {APPROXIMATIONS}, got {approximate!r}",
    )
    if up is not None:
        check_same("gelu_quant_augment", "up", x, up)


def check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    """Refuse a norm's weight that does not fit x."""
    check_rows(op, "x", x)
    check_tensor(op, "weight", weight, (x.dtype,), (x.shape[-1],), x.device)


def check_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    """Refuse a residual or a norm's weight that does not fit x."""
    check_norm("add_rms_norm_quant_augment", x, weight)
    check_same("add_rms_norm_quant_augment", "residual", x, residual)


def _rms_norm_fake(x, weight, eps, *augmentation):
    results = quant_augment_fake("rms_norm_quant_augment", x, *augmentation)
    check_norm("rms_norm_quant_augment", x, weight)
    return results


def _add_rms_norm_fake(x, residual, weight, eps, *augmentation):
    results = quant_augment_fake("add_rms_norm_quant_augment", x, *augmentation)
    check_add_norm(x, residual, weight)
    return *results, torch.empty_like(x, memory_format=torch.contiguous_format)


def _silu_mul_fake(gate, up, *augmentation):
    results = quant_augment_fake("silu_mul_quant_augment", gate, *augmentation)
    check_same("silu_mul_quant_augment", "up", gate, up)
    return results


def _gelu_fake(x, up, approximate, *augmentation):
    results = quant_augment_fake("gelu_quant_augment", x, *augmentation)
    check_gelu(x, up, approximate)
    return results


rms_norm_quant_augment = define(
    f"rms_norm_quant_augment(Tensor x, Tensor weight, float eps, {AUGMENTATION}) -> "
    "(Tensor, Tensor, Tensor)",
    rms_norm_quant_augment_eager,
    _rms_norm_fake,
)
add_rms_norm_quant_augment = define(
    "add_rms_norm_quant_augment(Tensor x, Tensor residual, Tensor weight, float eps, "
    f"{AUGMENTATION}) -> (Tensor, Tensor, Tensor, Tensor)",
    add_rms_norm_quant_augment_eager,
    _add_rms_norm_fake,
)
silu_mul_quant_augment = define(
    f"silu_mul_quant_augment(Tensor gate, Tensor up, {AUGMENTATION}) -> (Tensor, Tensor, Tensor)",
    silu_mul_quant_augment_eager,
    _silu_mul_fake,
)
gelu_quant_augment = define(
    f"gelu_quant_augment(Tensor x, Tensor? up, str approximate, {AUGMENTATION}) -> "
    "(Tensor, Tensor, Tensor)",
    gelu_quant_augment_eager,
    _gelu_fake,
)
