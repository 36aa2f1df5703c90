// quant_augment's arithmetic on rows, in vector types: included by every dispatch level.
// Step by step the same as arc_ao/formats/nvfp4.py; no operation may be contracted to an FMA
// (-ffp-contract=off), so that every level gives the same bits.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "search_scales.h"

namespace {

using arc::BlockScale;
using arc::DType;

// Calls run(std::integral_constant<DType, dtype>): what it does is compiled for each dtype. A vector
// that depends on a branch would be kept in memory where it is wider than a register.
template <class Run>
inline void with_dtype(DType dtype, Run run) {
  if (dtype == DType::kFloat) run(std::integral_constant<DType, DType::kFloat>{});
  else if (dtype == DType::kBFloat16) run(std::integral_constant<DType, DType::kBFloat16>{});
  else run(std::integral_constant<DType, DType::kHalf>{});
}

// Calls step(i, whole) for every 16 channels from i on; `whole` is a type that says whether there
// are 16, for at the end of a row there may be fewer.
template <class Step>
inline void for_vectors(int64_t channels, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) step(i, std::true_type{});
  if (i < channels) step(i, std::false_type{});
}

template <DType kType>
inline f32x16 load_lanes(const void* x, int64_t i) {
  if constexpr (kType == DType::kFloat) return load<f32x16>(static_cast<const float*>(x) + i);
  else {
    u16x16 raw = load<u16x16>(static_cast<const uint16_t*>(x) + i);
    if constexpr (kType == DType::kBFloat16) return from_bf16(raw);
    else return from_half(raw);
  }
}

// Channels i .. i + 15 as fp32, zeros behind the row.
template <class Type, class Whole>
inline f32x16 load_row_lanes(const void* x, int64_t i, int64_t channels, Type, Whole) {
  if constexpr (Whole::value) return load_lanes<Type::value>(x, i);
  else {
    alignas(64) char padded[64] = {};
    const int64_t size = arc::size_of(Type::value);
    std::memcpy(padded, static_cast<const char*>(x) + i * size, (channels - i) * size);
    return load_lanes<Type::value>(padded, 0);
  }
}

template <class Type>
inline f32x16 round_to(f32x16 v, Type) {
  if constexpr (Type::value == DType::kFloat) return v;
  else if constexpr (Type::value == DType::kBFloat16) return from_bf16(to_bf16(v));
  else return from_half(to_half(v));
}

// The largest magnitude so far, by bits: NaN above Inf above every number.
struct LargestBits {
  i32x8 lanes = {};

  void add(f32x16 v) {
    i32x16 magnitude = abs_bits(v);
    lanes = max_of(lanes, max_of(low_half(magnitude), high_half(magnitude)));
  }
  int32_t value() const { return largest_lane(lanes); }
};

int32_t load_row(const void* x, DType dtype, int64_t channels, float* out) {
  LargestBits largest;
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 v = load_row_lanes(x, i, channels, type, whole);
      largest.add(v);
      store(out + i, v);
    });
  });
  return largest.value();
}

template <class Type>
inline void store_lanes(void* out, f32x16 v, Type) {
  if constexpr (Type::value == DType::kFloat) store(out, v);
  else if constexpr (Type::value == DType::kBFloat16) store(out, to_bf16(v));
  else store(out, to_half(v));
}

void store_row(const float* x, DType dtype, int64_t channels, void* out) {
  constexpr std::integral_constant<DType, DType::kFloat> fp32;
  const int64_t size = arc::size_of(dtype);
  with_dtype(dtype, [&](auto type) {
    for_vectors(channels, [&](int64_t i, auto whole) {
      f32x16 v = load_row_lanes(x, i, channels, fp32, whole);
      char* to = static_cast<char*>(out) + i * size;
      if constexpr (decltype(whole)::value) return store_lanes(to, v, type);
      alignas(64) char lanes[64];
      store_lanes(lanes, v, type);
      std::memcpy(to, lanes, (channels - i) * size);
    });
  });
}

// 4-bit codes of v in every lane: nearest, ties to even, saturating at 6; NaN gives 0.
inline i32x16 e2m1_codes(f32x16 v) {
  i32x16 u = bits<i32x16>(v), magnitude = u & 0x7FFFFFFF;
  f32x16 a = bits<f32x16>(min(magnitude, every(bits<int32_t>(8.0f))));
  // Between 2^e and 2^(e+1), and below 2 for e = 0, the unit is 2^(e-1): that of a + 2^(e+22).
  i32x16 exponent = bits<i32x16>(a) & kInfBits;
  exponent = max(exponent, every(bits<int32_t>(1.0f)));
  i32x16 shifter = exponent + (22 << 23);
  i32x16 units = bits<i32x16>(a + bits<f32x16>(shifter)) - shifter;
  i32x16 index = min(units + (exponent >> 22) - (127 << 1), every(7));
  i32x16 code = index | ((u >> 28) & 8);
  return select(less(every(kInfBits), magnitude), i32x16{}, code);
}

// e2m1 values of 4-bit codes.
inline f32x16 e2m1_values(i32x16 code) {
  i32x16 index = code & 7;
  // 0 and 0.5 are index / 2; from 1 on the index is exponent and mantissa bit.
  i32x16 normal = (index << 22) + (126 << 23);
  f32x16 small = bits<f32x16>((index & 1) * bits<int32_t>(0.5f));
  f32x16 magnitude = select(less(index, every(2)), small, bits<f32x16>(normal));
  return bits<f32x16>(bits<u32x16>(magnitude) | (bits<u32x16>(code & 8) << 28));
}

// Two codes a byte, element 2i in the low nibble.
inline u8x8 pack_codes(i32x16 codes) {
  u16x8 pairs = bits<u16x8>(low_bytes(codes));
  return __builtin_convertvector((pairs & 0xF) | (pairs >> 4), u8x8);
}

// Sum of squares as a tree of halves, the order of nvfp4.sum_of_halves.
inline float sum_of_squares(f32x16 error) {
  f32x16 squares = error * error;
  f32x8 t = __builtin_shufflevector(squares, squares, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(squares, squares, 8, 9, 10, 11, 12, 13, 14, 15);
  t = t + __builtin_shufflevector(t, t, 4, 5, 6, 7, 4, 5, 6, 7);
  t = t + __builtin_shufflevector(t, t, 2, 3, 2, 3, 2, 3, 2, 3);
  return t[0] + t[1];
}

// Codes and left-over of one block under one scale.
inline i32x16 encode_block(f32x16 xs, const BlockScales& scales, int64_t b, f32x16& residual) {
  i32x16 codes = e2m1_codes(xs * splat(scales.reciprocal[b]));
  residual = xs - e2m1_values(codes) * splat(scales.value[b]);
  return codes;
}

// One block under a further scale, kept where its error is less.
struct Candidate {
  i32x16 codes;
  f32x16 rest;
  int32_t scale_code;
  float error;

  // As bits rather than by a branch, which would be taken at random.
  void keep_better(const Candidate& other) {
    const int32_t better = -int32_t(other.error < error);
    codes = (other.codes & better) | (codes & ~better);
    rest = bits<f32x16>((bits<i32x16>(other.rest) & better) | (bits<i32x16>(rest) & ~better));
    scale_code = (other.scale_code & better) | (scale_code & ~better);
    error = other.error < error ? other.error : error;
  }
};

inline Candidate candidate(f32x16 xs, const BlockScales& scales, int64_t b) {
  Candidate c;
  c.codes = encode_block(xs, scales, b, c.rest);
  c.scale_code = scales.code[b];
  c.error = sum_of_squares(c.rest);
  return c;
}

// xs of up to 16 blocks from x on, to their largest magnitudes; zero behind the last one.
inline f32x16 largest_magnitudes(const float* x, f32x16 multiplier, int64_t count) {
  alignas(64) int32_t found[kScalesAtOnce] = {};
  for (int64_t b = 0; b < count; ++b) {
    i32x16 magnitude = abs_bits(load<f32x16>(x + b * kLanes) * multiplier);
    found[b] = largest_lane(max_of(low_half(magnitude), high_half(magnitude)));
  }
  return load<f32x16>(found);
}

template <BlockScale kMethod, bool Residual>
void quantize_row_as(
    const float* x, float inverse, int64_t blocks, uint8_t* qdata, uint8_t* scale,
    float* residual) {
  const f32x16 multiplier = splat(inverse);
  for (int64_t first = 0; first < blocks; first += kScalesAtOnce) {
    const int64_t count = blocks - first < kScalesAtOnce ? blocks - first : kScalesAtOnce;
    BlockScales six, four;
    if (kMethod == BlockScale::kMse) {
      Columns columns;
      columns.fill(x + first * kLanes, kLanes, multiplier, count);
      make_scales(columns.largest(), kSixth, six);
      search_scales(columns, six);
    } else {
      const f32x16 largest = largest_magnitudes(x + first * kLanes, multiplier, count);
      make_scales(largest, kSixth, six);
      if (kMethod == BlockScale::kFourOverSix) make_scales(largest, kQuarter, four);
    }
    for (int64_t b = 0; b < count; ++b) {
      const int64_t block = first + b;
      f32x16 xs = load<f32x16>(x + block * kLanes) * multiplier;
      Candidate best = candidate(xs, six, b);
      if (kMethod == BlockScale::kFourOverSix) best.keep_better(candidate(xs, four, b));
      store(qdata + block * arc::kBlockBytes, pack_codes(best.codes));
      scale[block] = uint8_t(best.scale_code);
      if (Residual) store(residual + block * kLanes, best.rest);
    }
  }
}

template <BlockScale kMethod>
void quantize_row_with(
    const float* x, float inverse, int64_t blocks, uint8_t* qdata, uint8_t* scale,
    float* residual) {
  if (residual) quantize_row_as<kMethod, true>(x, inverse, blocks, qdata, scale, residual);
  else quantize_row_as<kMethod, false>(x, inverse, blocks, qdata, scale, residual);
}

void quantize_row(
    const float* x, float inverse, int64_t blocks, BlockScale method, uint8_t* qdata,
    uint8_t* scale, float* residual) {
  constexpr decltype(&quantize_row_with<BlockScale::kAmax>) kMethods[] = {
      quantize_row_with<BlockScale::kAmax>, quantize_row_with<BlockScale::kFourOverSix>,
      quantize_row_with<BlockScale::kMse>};
  kMethods[int(method)](x, inverse, blocks, qdata, scale, residual);
}

}  // namespace
