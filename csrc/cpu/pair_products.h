// Small matrix products of bf16 pairs, both operands in cache.
#pragma once

#include "pairs.h"

namespace {

// Rows of numbers against packed pairs [steps, V * 16, 2]: c [rows, V * 16] += a b, or = a b.
struct PairProduct {
  const uint16_t* a;
  int64_t row_stride, step_stride, rows, steps;
  const uint16_t* b;
  float* c;
  bool add;
};

template <class Dot, int V, int Rows>
inline void multiply_pair_rows(const PairProduct& p, int64_t row) {
  f32x16 acc[Rows][V];
  float* c = p.c + row * V * kLanes;
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < V; ++v) {
      acc[r][v] = p.add ? load<f32x16>(c + (r * V + v) * kLanes) : f32x16{};
    }
  }
  const uint16_t* a = p.a + row * p.row_stride;
  for (int64_t s = 0; s < p.steps; ++s, a += p.step_stride) {
    u32x16 pairs[V];
    for (int v = 0; v < V; ++v) pairs[v] = load<u32x16>(p.b + (s * V + v) * 2 * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const u32x16 pair = u32x16{} + load<uint32_t>(a + r * p.row_stride);
      for (int v = 0; v < V; ++v) acc[r][v] = Dot::add(acc[r][v], pair, pairs[v]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < V; ++v) store(c + (r * V + v) * kLanes, acc[r][v]);
  }
}

template <class Dot, int V>
void multiply_pairs(const PairProduct& p) {
  constexpr int kRows = V == 1 ? 16 : 24 / V;  // as many accumulators as registers hold
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows) multiply_pair_rows<Dot, V, kRows>(p, row);
  for (; row + 4 <= p.rows; row += 4) multiply_pair_rows<Dot, V, 4>(p, row);
  for (; row < p.rows; ++row) multiply_pair_rows<Dot, V, 1>(p, row);
}

}  // namespace
