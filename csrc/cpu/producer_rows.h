// The operations that produce a quantizer's input, on rows, with the rounding of the unfused chain:
// every intermediate tensor would be of `dtype`. The meaning is in arc_ao/ops/producers.py.
#pragma once

#include "quantize_rows.h"

namespace {

// e^x by the Cephes expf reduction and polynomial, clamped to [-87, 88]. Separate multiplications
// and additions, as in producers.exp, so that the bits agree.
inline f32x16 exp_lanes(f32x16 x) {
  constexpr float kLog2E = 1.44269504088896341f, kRound = 12582912.0f;  // 1.5 * 2^23
  x = clamp(x, -87.0f, 88.0f);
  f32x16 shifted = x * splat(kLog2E) + splat(kRound);
  f32x16 n = shifted - splat(kRound);
  f32x16 r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  f32x16 y = (p * r) * r + r + splat(1.0f);
  u32x16 power = (bits<u32x16>(shifted) - bits<uint32_t>(kRound) + 127) << 23;
  return y * bits<f32x16>(power);
}

// x Phi(x) by the error function: erfc as in Abramowitz and Stegun 7.1.26.
inline f32x16 gelu_lanes(f32x16 x) {
  f32x16 z = bits<f32x16>(abs_bits(x)) * splat(0.707106781186547524f);
  f32x16 t = splat(1.0f) / (z * splat(0.3275911f) + splat(1.0f));
  f32x16 p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  f32x16 tail = (p * t * splat(0.5f)) * exp_lanes(splat(0.0f) - z * z);
  return x * select(bits<i32x16>(x) >> 31, tail, splat(1.0f) - tail);
}

inline f32x16 tanh_gelu_lanes(f32x16 x) {
  constexpr float kSlope = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  f32x16 inner = x + (x * x * x) * splat(0.044715f);
  return x / (exp_lanes(splat(0.0f) - inner * splat(kSlope)) + splat(1.0f));
}

void add_row(const void* x, const void* y, DType dtype, int64_t channels, float* out) {
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 sum = load_row_lanes(x, i, channels, type, whole) +
                   load_row_lanes(y, i, channels, type, whole);
      store(out + i, round_to(sum, type));
    });
  });
}

int32_t silu_mul_row(
    const void* gate, const void* up, DType dtype, int64_t channels, float* out) {
  LargestBits largest;
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 g = load_row_lanes(gate, i, channels, type, whole);
      f32x16 u = load_row_lanes(up, i, channels, type, whole);
      f32x16 silu = round_to(g / (splat(1.0f) + exp_lanes(splat(0.0f) - g)), type);
      f32x16 v = round_to(silu * u, type);
      largest.add(v);
      store(out + i, v);
    });
  });
  return largest.value();
}

int32_t gelu_row(
    const void* x, const void* up, bool tanh, DType dtype, int64_t channels, float* out) {
  LargestBits largest;
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 v = load_row_lanes(x, i, channels, type, whole);
      v = round_to(tanh ? tanh_gelu_lanes(v) : gelu_lanes(v), type);
      if (up) v = round_to(v * load_row_lanes(up, i, channels, type, whole), type);
      largest.add(v);
      store(out + i, v);
    });
  });
  return largest.value();
}

int32_t norm_row(
    const float* x, const void* weight, DType dtype, float inverse_rms, int64_t channels,
    float* out) {
  LargestBits largest;
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 normed = round_to(load<f32x16>(x + i) * splat(inverse_rms), type);
      f32x16 v = round_to(load_row_lanes(weight, i, channels, type, whole) * normed, type);
      largest.add(v);
      store(out + i, v);
    });
  });
  return largest.value();
}

}  // namespace
