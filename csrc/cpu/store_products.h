// Products times the outer scales, plus the bias, rounded: the last step of every kernel.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

// Rounded to dtype.
inline void store_as(f32x16 v, arc::DType dtype, char* target) {
  if (dtype == arc::DType::kFloat) store(target, v);
  else if (dtype == arc::DType::kBFloat16) store(target, to_bf16(v));
  else store(target, to_half(v));
}

// The products of row m with columns [col, col + 16), or fewer at the end.
inline void store_lanes_of(f32x16 v, const arc::Output& out, int64_t m, int64_t col) {
  const int64_t size = arc::size_of(out.y_dtype), count = out.cols - col;
  char* target = static_cast<char*>(out.y) + m * out.y_stride + col * size;
  v = v * splat(out.a_outer[m]) * splat(out.b_outer);
  if (out.bias) v = v + load<f32x16>(out.bias + col);
  if (count >= kLanes) return store_as(v, out.y_dtype, target);
  alignas(64) char lanes[64];
  store_as(v, out.y_dtype, lanes);
  std::memcpy(target, lanes, count * size);
}

// products [rows, stride] of one panel.
[[maybe_unused]] void store_products(const float* products, int64_t stride, const arc::Output& out) {
  for (int64_t m = 0; m < out.rows; ++m) {
    store_lanes_of(load<f32x16>(products + m * stride), out, m, 0);
  }
}

}  // namespace
