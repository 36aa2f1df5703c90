// The search for block scales of least squared error ("mse" of nvfp4.quantize_blocks), a block in
// every lane: scales are whole vectors then, and the tree of halves adds vectors.
//
// Only errors are computed here, of magnitudes, since signs change no square. Two products are fused
// with a sum where there are instructions for it: both are exact, so that no bit depends on it.
#pragma once

#include "block_scales.h"
#include "transpose.h"

namespace {

#if defined(__AVX512F__)
typedef f32x16 WideFloat;
typedef i32x16 WideInt;
inline WideFloat fused(WideFloat a, WideFloat b, WideFloat c) {
  return WideFloat(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef f32x8 WideFloat;
typedef i32x8 WideInt;
inline WideFloat fused(WideFloat a, WideFloat b, WideFloat c) {
  return WideFloat(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}
#else
typedef float WideFloat __attribute__((vector_size(16)));
typedef int32_t WideInt __attribute__((vector_size(16)));
inline WideFloat fused(WideFloat a, WideFloat b, WideFloat c) { return a * b + c; }
#endif

constexpr int kWide = kLanesOf<WideFloat>;

inline WideInt wide_min(WideInt a, int32_t b) { return a < b ? a : WideInt{} + b; }
inline WideInt wide_max(WideInt a, int32_t b) { return a > b ? a : WideInt{} + b; }

// Magnitudes of 16 blocks: those of channel k in row k, a block in every column.
struct Columns {
  alignas(64) float at[kLanes][kLanes];

  // Of x * multiplier; zeros behind the blocks that are there.
  void fill(const float* x, f32x16 multiplier, int64_t count) {
    alignas(64) float blocks[kLanes][kLanes];
    for (int64_t b = 0; b < kLanes; ++b) {
      f32x16 xs = {};
      if (b < count) xs = load<f32x16>(x + b * kLanes) * multiplier;
      store(blocks[b], abs_bits(xs));
    }
    for (int first = 0; first < kLanes; first += kWide) {
      for (int channel = 0; channel < kLanes; channel += kWide) {
        WideInt tile[kWide];
        for (int i = 0; i < kWide; ++i) tile[i] = load<WideInt>(blocks[first + i] + channel);
        transpose(tile);
        for (int i = 0; i < kWide; ++i) store(at[channel + i] + first, tile[i]);
      }
    }
  }

  // Of every block; as bits, so that NaN is above Inf.
  f32x16 largest() const {
    i32x16 found = load<i32x16>(at[0]);
    for (int k = 1; k < kLanes; ++k) found = max(found, load<i32x16>(at[k]));
    return bits<f32x16>(found);
  }
};

// Squared error of one channel of kWide blocks under one scale each. `reciprocal` is 2^22 times that
// of the scale: the power of two at or below a quotient (or 1) is then the number whose last place
// is e2m1's step there. Quotients of 7 and more need kSaturate.
template <bool kSaturate>
inline WideFloat square_of_error(const float* x, WideFloat reciprocal, WideFloat scale) {
  const WideFloat magnitude = load<WideFloat>(x);
  WideInt quotient = bits<WideInt>(magnitude * reciprocal);
  if (kSaturate) quotient = wide_min(quotient, bits<int32_t>(0x6p22f));
  const WideFloat shifter =
      bits<WideFloat>(wide_max(quotient & kInfBits, bits<int32_t>(0x1p22f)));
  const WideFloat down = WideFloat{} + 0x1p-22f;
  const WideFloat negative = shifter - fused(bits<WideFloat>(quotient), down, shifter);  // -q
  const WideFloat error = fused(negative, scale, magnitude);
  return error * error;
}

// Summed over the channels as a tree of halves, the order of nvfp4.squared_error.
template <bool kSaturate>
inline WideFloat squared_errors(const float* x, WideFloat reciprocal, WideFloat scale) {
  const auto square = [&](int k) {
    return square_of_error<kSaturate>(x + k * kLanes, reciprocal, scale);
  };
  const auto pair = [&](int k) { return square(k) + square(k + 8); };
  const auto four = [&](int k) { return pair(k) + pair(k + 4); };
  const auto eight = [&](int k) { return four(k) + four(k + 2); };
  return eight(0) + eight(1);
}

// Scales of kWide blocks while candidates are tried, in their order.
struct LeastError {
  const float* columns;
  WideInt code;
  WideInt error;  // bits: they order as the numbers, which are not negative

  template <bool kSaturate>
  WideInt error_under(WideInt candidate) const {
    // No NaN here: blocks that have one, or Inf, are set right in the end.
    const WideFloat scale = bits<WideFloat>(candidate << 20) * 0x1p120f;
    return bits<WideInt>(squared_errors<kSaturate>(columns, 0x1p22f / scale, scale));
  }

  template <bool kSaturate>
  void try_code(WideInt candidate) {
    candidate = wide_min(wide_max(candidate, 1), kNanCode - 1);
    const WideInt found = error_under<kSaturate>(candidate);
    const WideInt better = found < error;
    code = better ? candidate : code;
    error = better ? found : error;
  }
};

template <bool kSaturate>
inline WideInt least_error(const float* columns, WideInt first) {
  LeastError least{columns, first, {}};
  least.error = least.error_under<kSaturate>(first);
  // Behind 0, the offsets of nvfp4.CODE_OFFSETS.
  least.try_code<true>(first - 1);
  for (const int offset : {1, 4, 5, 6}) least.try_code<kSaturate>(first + offset);
  return first < kNanCode ? least.code : first;
}

// From the scales of amax/6 to those of least error.
inline void search_scales(const Columns& columns, BlockScales& scales) {
  // Only beyond the largest scale, or rounded down to few steps of the smallest ones.
  i32x16 most = abs_bits(columns.largest() * load<f32x16>(scales.reciprocal));
  const bool saturates =
      largest_lane(max_of(low_half(most), high_half(most))) >= bits<int32_t>(7.0f);
  for (int first = 0; first < kLanes; first += kWide) {
    const float* x = columns.at[0] + first;
    const WideInt code = load<WideInt>(scales.code + first);
    store(scales.code + first, saturates ? least_error<true>(x, code) : least_error<false>(x, code));
  }
  fill_scales(load<i32x16>(scales.code), scales);
}

}  // namespace
