// A few rows of bf16 times a weight that comes from memory: included by every dispatch level.
#pragma once

#include <algorithm>

#include "pairs.h"

namespace {

using arc::LinearRows;
constexpr int64_t kLinearAhead = 6144;  // bytes of w fetched ahead

inline float sum_of(f32x16 v) {
  float sums[kLanes];
  store(sums, v);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  }
  return sums[0];
}

inline uint16_t as_bf16(float v) { return to_bf16(splat(v))[0]; }

// `Rows` rows from `row` on times column `col`. One column at a time, so that the weight is read as one
// stream: four of them side by side came at three quarters of the memory's bandwidth.
template <class Dot, int Rows>
inline void linear_column(const LinearRows& p, int64_t row, int64_t col) {
  constexpr int64_t kStep = 2 * kLanes;
  f32x16 even[Rows] = {}, odd[Rows] = {};  // two chains of sums each
  const uint16_t *x = p.x + row * p.x_stride, *w = p.w + col * p.w_stride;
  int64_t c = 0;
  for (; c + 2 * kStep <= p.channels; c += 2 * kStep) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + c) + kLinearAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(w + c + kStep) + kLinearAhead);
    const u32x16 first = load<u32x16>(w + c), second = load<u32x16>(w + c + kStep);
    for (int m = 0; m < Rows; ++m) {
      even[m] = Dot::add(even[m], load<u32x16>(x + m * p.x_stride + c), first);
      odd[m] = Dot::add(odd[m], load<u32x16>(x + m * p.x_stride + c + kStep), second);
    }
  }
  for (; c < p.channels; c += kStep) {
    const int64_t bytes = 2 * (p.channels - c);
    const u32x16 last = load_some(w + c, bytes);
    for (int m = 0; m < Rows; ++m) {
      even[m] = Dot::add(even[m], load_some(x + m * p.x_stride + c, bytes), last);
    }
  }
  for (int m = 0; m < Rows; ++m) {
    float y = sum_of(even[m] + odd[m]);
    if (p.bias) y += bits<float>(uint32_t(p.bias[col]) << 16);
    p.y[(row + m) * p.y_stride + col] = as_bf16(y);
  }
}

template <class Dot, int Rows>
void linear_some_rows(const LinearRows& p, int64_t row) {
  for (int64_t col = 0; col < p.cols; ++col) linear_column<Dot, Rows>(p, row, col);
}

template <class Dot>
void linear_rows(const LinearRows& p) {
  using Run = void (*)(const LinearRows&, int64_t);
  static constexpr Run kByRows[arc::kLinearRows] = {
      linear_some_rows<Dot, 1>, linear_some_rows<Dot, 2>, linear_some_rows<Dot, 3>,
      linear_some_rows<Dot, 4>, linear_some_rows<Dot, 5>, linear_some_rows<Dot, 6>,
      linear_some_rows<Dot, 7>, linear_some_rows<Dot, 8>};
  for (int64_t row = 0; row < p.rows; row += arc::kLinearRows) {
    kByRows[std::min(arc::kLinearRows, p.rows - row) - 1](p, row);
  }
}

}  // namespace
