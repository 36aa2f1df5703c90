// Pairs of bf16 numbers, 16 in a vector. `Dot` adds the products of two such vectors pair by pair.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

struct PlainDot {
  static f32x16 add(f32x16 sum, u32x16 a, u32x16 b) {
    sum = sum + bits<f32x16>(a << 16) * bits<f32x16>(b << 16);
    return sum + bits<f32x16>(a & 0xFFFF0000) * bits<f32x16>(b & 0xFFFF0000);
  }
};

// As many bytes as there are of a vector, zeros behind them.
inline u32x16 load_some(const void* p, int64_t bytes) {
  if (bytes >= 64) return load<u32x16>(p);
  alignas(64) char padded[64] = {};
  std::memcpy(padded, p, bytes);
  return load<u32x16>(padded);
}

}  // namespace
