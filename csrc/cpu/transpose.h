// 16 vectors of 16 lanes of 32 bits, transposed in registers: four rounds of exchanges.
#pragma once

#include <utility>

#include "simd.h"

namespace {

template <int D, int... J>
inline void swap_halves(u32x16& a, u32x16& b, std::integer_sequence<int, J...>) {
  const u32x16 low = __builtin_shufflevector(a, b, (J & D ? kLanes + J - D : J)...);
  b = __builtin_shufflevector(a, b, (J & D ? kLanes + J : J + D)...);
  a = low;
}

template <int D>
inline void transpose_step(u32x16 rows[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & D)) swap_halves<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes>{});
  }
}

inline void transpose(u32x16 rows[kLanes]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  transpose_step<4>(rows);
  transpose_step<8>(rows);
}

}  // namespace
