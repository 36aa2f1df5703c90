// The searches for block scales of least squared error, a block in every lane: scales are whole
// vectors then, and the tree of halves adds vectors. For activations ("mse" of
// nvfp4.quantize_blocks) and for weights (ops/search_block_scales.py), which differ in the
// candidates and in that each channel of a weight may count by its importance.
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

  // Of x * multiplier, blocks `stride` numbers apart; zeros behind the `count` that are there.
  void fill(const float* x, int64_t stride, f32x16 multiplier, int64_t count) {
    alignas(64) float blocks[kLanes][kLanes];
    for (int64_t b = 0; b < kLanes; ++b) {
      f32x16 xs = {};
      if (b < count) xs = load<f32x16>(x + b * stride) * multiplier;
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

// What the squared error of channel k counts.
struct EqualChannels {
  WideFloat operator()(int, WideFloat square) const { return square; }
};
struct WeighedChannels {
  const float* importance;  // [16]
  WideFloat operator()(int k, WideFloat square) const { return square * importance[k]; }
};

// Summed over the channels as a tree of halves, the order of nvfp4.sum_of_halves.
template <bool kSaturate, class Weigh>
inline WideFloat squared_errors(
    const float* x, WideFloat reciprocal, WideFloat scale, const Weigh& weigh) {
  const auto square = [&](int k) {
    return weigh(k, square_of_error<kSaturate>(x + k * kLanes, reciprocal, scale));
  };
  const auto pair = [&](int k) { return square(k) + square(k + 8); };
  const auto four = [&](int k) { return pair(k) + pair(k + 4); };
  const auto eight = [&](int k) { return four(k) + four(k + 2); };
  return eight(0) + eight(1);
}

// Scales of kWide blocks while candidates are tried, in their order.
template <class Weigh>
struct LeastError {
  const float* columns;
  Weigh weigh;
  WideInt code;
  WideFloat error;

  template <bool kSaturate>
  WideFloat error_under(WideInt candidate) const {
    // No NaN here: blocks that have one, or Inf, are set right in the end.
    const WideFloat scale = bits<WideFloat>(candidate << 20) * 0x1p120f;
    return squared_errors<kSaturate>(columns, 0x1p22f / scale, scale, weigh);
  }

  template <bool kSaturate>
  void try_code(WideInt candidate) {
    candidate = wide_min(wide_max(candidate, 1), kNanCode - 1);
    const WideFloat found = error_under<kSaturate>(candidate);
    const WideInt better = found < error;  // never of NaN
    code = better ? candidate : code;
    error = better ? found : error;
  }
};

// Codes that are tried after that of amax/6, as offsets from it: nvfp4.CODE_OFFSETS, and those of
// ops/search_block_scales.py.
constexpr int kFewOffsets[] = {-1, 1, 4, 5, 6};
constexpr int kNeighbours[] = {-1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6};

template <bool kSaturate, class Offsets, class Weigh>
inline WideInt least_error(
    const float* columns, WideInt first, const Offsets& offsets, const Weigh& weigh) {
  LeastError<Weigh> least{columns, weigh, first, {}};
  least.error = least.template error_under<kSaturate>(first);
  for (const int offset : offsets) {
    if (offset < 0) least.template try_code<true>(first + offset);
    else least.template try_code<kSaturate>(first + offset);
  }
  return first < kNanCode ? least.code : first;
}

// From the scales of amax/6 to the codes of least error.
template <class Offsets, class Weigh>
inline void search_codes(
    const Columns& columns, const Offsets& offsets, const Weigh& weigh, BlockScales& scales) {
  // Only beyond the largest scale, or rounded down to few steps of the smallest ones.
  i32x16 most = abs_bits(columns.largest() * load<f32x16>(scales.reciprocal));
  const bool saturates =
      largest_lane(max_of(low_half(most), high_half(most))) >= bits<int32_t>(7.0f);
  for (int first = 0; first < kLanes; first += kWide) {
    const float* x = columns.at[0] + first;
    const WideInt code = load<WideInt>(scales.code + first);
    store(
        scales.code + first, saturates ? least_error<true>(x, code, offsets, weigh)
                                       : least_error<false>(x, code, offsets, weigh));
  }
}

// Of activations.
inline void search_scales(const Columns& columns, BlockScales& scales) {
  search_codes(columns, kFewOffsets, EqualChannels{}, scales);
  fill_scales(load<i32x16>(scales.code), scales);
}

}  // namespace
