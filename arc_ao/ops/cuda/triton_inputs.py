"""What a quantizing kernel reads: x itself, or what a fused producer makes of its inputs.

The meaning is arc_ao/ops/producers.py, in the same order of operations.
"""

import math

import triton
import triton.language as tl

from arc_ao.ops import producers
from arc_ao.ops.cuda.triton_nvfp4 import (
    ROUND,
    ROUND_BITS,
    bits_of,
    magnitude_bits,
    round_to,
    widen,
)

# Kinds of input.
PLAIN = tl.constexpr(0)
RMS_NORM = tl.constexpr(1)
ADD_RMS_NORM = tl.constexpr(2)
SILU_MUL = tl.constexpr(3)
GELU = tl.constexpr(4)
GELU_MUL = tl.constexpr(5)
TANH_GELU = tl.constexpr(6)
TANH_GELU_MUL = tl.constexpr(7)

LOG2_E = tl.constexpr(math.log2(math.e))
LN2_HIGH = tl.constexpr(producers.LN2_HIGH)
LN2_LOW = tl.constexpr(producers.LN2_LOW)
EXP_LEAST = tl.constexpr(producers.EXP_RANGE[0])
EXP_MOST = tl.constexpr(producers.EXP_RANGE[1])
P0 = tl.constexpr(producers.EXP_LEADING)
P1 = tl.constexpr(producers.EXP_POLYNOMIAL[0])
P2 = tl.constexpr(producers.EXP_POLYNOMIAL[1])
P3 = tl.constexpr(producers.EXP_POLYNOMIAL[2])
P4 = tl.constexpr(producers.EXP_POLYNOMIAL[3])
P5 = tl.constexpr(producers.EXP_POLYNOMIAL[4])
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
ERFC_P = tl.constexpr(producers.ERFC_P)
E0 = tl.constexpr(producers.ERFC_POLYNOMIAL[0])
E1 = tl.constexpr(producers.ERFC_POLYNOMIAL[1])
E2 = tl.constexpr(producers.ERFC_POLYNOMIAL[2])
E3 = tl.constexpr(producers.ERFC_POLYNOMIAL[3])
E4 = tl.constexpr(producers.ERFC_POLYNOMIAL[4])
TANH_CUBE = tl.constexpr(producers.TANH_CUBE)
TANH_SLOPE = tl.constexpr(producers.TANH_SLOPE)


@triton.jit
def exp(x):
    """e^x of fp32 x: `producers.exp`."""
    x = tl.minimum(tl.maximum(x, EXP_LEAST), EXP_MOST)
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = P0 * r + P1
    p = p * r + P2
    p = p * r + P3
    p = p * r + P4
    p = p * r + P5
    y = (p * r) * r + r + 1.0
    power = (bits_of(shifted) - ROUND_BITS + 127) << 23
    return y * power.to(tl.float32, bitcast=True)


@triton.jit
def gelu(x):
    """fp32 x Phi(x): `producers.gelu`, not rounded to the input's dtype."""
    z = magnitude_bits(x).to(tl.float32, bitcast=True) * SQRT_HALF
    t = tl.math.div_rn(1.0, z * ERFC_P + 1.0)
    p = E0 * t + E1
    p = p * t + E2
    p = p * t + E3
    p = p * t + E4
    tail = (p * t * 0.5) * exp(0.0 - z * z)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def tanh_gelu(x):
    """The same with approximate="tanh"."""
    inner = x + (x * x * x) * TANH_CUBE
    return tl.math.div_rn(x, exp(0.0 - inner * TANH_SLOPE) + 1.0)


@triton.jit
def load_raw(source, channel, mask, kind: tl.constexpr):
    """fp32 input before any norm: x, round(x + residual), or an activation and its gate's product.

    0 where masked. `source` is described in triton_quantize.py.
    """
    first, second, _, _, _, first_stride, second_stride, _ = source
    dtype: tl.constexpr = first.dtype.element_ty
    wide = channel.to(tl.int64)
    value = widen(tl.load(first + wide * first_stride, mask=mask, other=0.0))
    if kind == ADD_RMS_NORM:
        other = widen(tl.load(second + wide * second_stride, mask=mask, other=0.0))
        value = round_to(value + other, dtype)
    if kind == SILU_MUL:
        up = widen(tl.load(second + wide * second_stride, mask=mask, other=0.0))
        silu = round_to(tl.math.div_rn(value, exp(0.0 - value) + 1.0), dtype)
        value = round_to(silu * up, dtype)
    if kind == GELU or kind == GELU_MUL:
        value = round_to(gelu(value), dtype)
    if kind == TANH_GELU or kind == TANH_GELU_MUL:
        value = round_to(tanh_gelu(value), dtype)
    if kind == GELU_MUL or kind == TANH_GELU_MUL:
        up = widen(tl.load(second + wide * second_stride, mask=mask, other=0.0))
        value = round_to(value * up, dtype)
    return value


@triton.jit
def finish(source, raw, channel, mask, inverse_rms, kind: tl.constexpr):
    """The quantizer's fp32 input: raw, normed where `kind` says so."""
    first, _, weight, _, _, _, _, weight_stride = source
    dtype: tl.constexpr = first.dtype.element_ty
    if kind == RMS_NORM or kind == ADD_RMS_NORM:
        normed = round_to(raw * inverse_rms, dtype)
        gain = widen(tl.load(weight + channel * weight_stride, mask=mask, other=0.0))
        # A row with NaN must not put NaN into the padding behind its last channel.
        raw = tl.where(mask, round_to(gain * normed, dtype), 0.0)
    return raw


@triton.jit
def source_channels(source, channel, ordered: tl.constexpr):
    """Where channels lie in the input, and which exist (the rest is padding)."""
    _, _, _, order, channels, _, _, _ = source
    mask = channel < channels
    if ordered:
        channel = tl.load(order + channel, mask=mask, other=0)
    return channel, mask


@triton.jit
def load_channels(source, channel, inverse_rms, kind: tl.constexpr, ordered: tl.constexpr):
    """(the quantizer's input, raw, where the channels lie, which exist)"""
    channel, mask = source_channels(source, channel, ordered)
    raw = load_raw(source, channel, mask, kind)
    return finish(source, raw, channel, mask, inverse_rms, kind), raw, channel, mask


@triton.jit
def inverse_rms_of(square_sum, channels, eps):
    """fp32 1 / sqrt(mean + eps) from the float64 sum of squares."""
    mean = (square_sum / channels).to(tl.float32)
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))
