// As many vectors of 32-bit lanes as one has lanes, transposed in registers by rounds of exchanges.
#pragma once

#include <utility>

#include "simd.h"

namespace {

template <class V>
constexpr int kLanesOf = int(sizeof(V) / 4);

template <int D, class V, int... J>
inline void swap_halves(V& a, V& b, std::integer_sequence<int, J...>) {
  const V low = __builtin_shufflevector(a, b, (J & D ? kLanesOf<V> + J - D : J)...);
  b = __builtin_shufflevector(a, b, (J & D ? kLanesOf<V> + J : J + D)...);
  a = low;
}

template <int D, class V>
inline void transpose_step(V* rows) {
  constexpr std::make_integer_sequence<int, kLanesOf<V>> lanes;
  for (int i = 0; i < kLanesOf<V>; ++i) {
    if (!(i & D)) swap_halves<D>(rows[i], rows[i + D], lanes);
  }
}

template <class V>
inline void transpose(V* rows) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (kLanesOf<V> > 4) transpose_step<4>(rows);
  if constexpr (kLanesOf<V> > 8) transpose_step<8>(rows);
}

}  // namespace
