// quant_augment's arithmetic on rows, in vector types: included by every dispatch level.
// Step by step the same as arc_ao/formats/nvfp4.py; no operation may be contracted to an FMA
// (-ffp-contract=off), so that every level gives the same bits.
#pragma once

#include "e4m3.h"
#include "kernels.h"
#include "simd.h"

namespace {

using arc::DType;

constexpr int32_t kInfBits = 0x7F800000;
constexpr float kSixth = 1.0f / 6.0f;
constexpr float kQuarter = 1.0f / 4.0f;

inline f32x16 load_lanes(const void* x, DType dtype, int64_t i) {
  if (dtype == DType::kFloat) return load<f32x16>(static_cast<const float*>(x) + i);
  u16x16 raw = load<u16x16>(static_cast<const uint16_t*>(x) + i);
  return dtype == DType::kBFloat16 ? from_bf16(raw) : from_half(raw);
}

// The last channels of a row that is no multiple of 16, zeros behind them.
inline f32x16 load_tail(const void* x, DType dtype, int64_t i, int64_t channels) {
  alignas(64) char padded[64] = {};
  const int64_t size = arc::size_of(dtype);
  std::memcpy(padded, static_cast<const char*>(x) + i * size, (channels - i) * size);
  return load_lanes(padded, dtype, 0);
}

inline f32x16 load_any(const void* x, DType dtype, int64_t i, int64_t channels) {
  return i + kLanes <= channels ? load_lanes(x, dtype, i) : load_tail(x, dtype, i, channels);
}

inline f32x16 round_to(f32x16 v, DType dtype) {
  if (dtype == DType::kFloat) return v;
  return dtype == DType::kBFloat16 ? from_bf16(to_bf16(v)) : from_half(to_half(v));
}

int32_t load_row(const void* x, DType dtype, int64_t channels, float* out) {
  i32x16 largest = {};
  for (int64_t i = 0; i < channels; i += kLanes) {
    f32x16 v = load_any(x, dtype, i, channels);
    largest = max(largest, abs_bits(v));
    store(out + i, v);
  }
  return max_of_lanes(largest)[0];
}

void store_row(const float* x, DType dtype, int64_t channels, void* out) {
  for (int64_t i = 0; i < channels; i += kLanes) {
    f32x16 v = load_any(x, DType::kFloat, i, channels);
    alignas(64) char lanes[64];
    if (dtype == DType::kFloat) store(lanes, v);
    else if (dtype == DType::kBFloat16) store(lanes, to_bf16(v));
    else store(lanes, to_half(v));
    const int64_t size = arc::size_of(dtype), count = channels - i < kLanes ? channels - i : kLanes;
    std::memcpy(static_cast<char*>(out) + i * size, lanes, count * size);
  }
}

// e4m3 bits of v >= 0, nearest even in [2^-9, 448]; Inf and NaN (which come as lanes that are not
// below Inf) give 0x7f.
inline i32x16 e4m3_bits(f32x16 v) {
  i32x16 finite = abs_bits(v) < kInfBits;
  v = v < splat(0x1p-9f) ? splat(0x1p-9f) : v;
  v = v > splat(448.0f) ? splat(448.0f) : v;
  u32x16 u = bits<u32x16>(v);
  u32x16 normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the unit of the last place is 2^-9: that of v + 2^14.
  u32x16 subnormal = bits<u32x16>(v + splat(0x1p14f)) - bits<uint32_t>(0x1p14f);
  u32x16 code = u < bits<uint32_t>(0x1p-6f) ? subnormal : normal;
  return finite ? bits<i32x16>(code) : i32x16{} + 0x7F;
}

// 4-bit codes of v in every lane: nearest, ties to even, saturating at 6; NaN gives 0.
inline i32x16 e2m1_codes(f32x16 v) {
  i32x16 u = bits<i32x16>(v), magnitude = u & 0x7FFFFFFF;
  f32x16 a = bits<f32x16>(min(magnitude, i32x16{} + bits<int32_t>(8.0f)));
  // Between 2^e and 2^(e+1), and below 2 for e = 0, the unit is 2^(e-1): that of a + 2^(e+22).
  i32x16 exponent = bits<i32x16>(a) & kInfBits;
  exponent = max(exponent, i32x16{} + bits<int32_t>(1.0f));
  i32x16 shifter = exponent + (22 << 23);
  i32x16 units = bits<i32x16>(a + bits<f32x16>(shifter)) - shifter;
  i32x16 index = min(units + (exponent >> 22) - (127 << 1), i32x16{} + 7);
  i32x16 code = index | ((u >> 28) & 8);
  return magnitude > kInfBits ? i32x16{} : code;
}

// e2m1 values of 4-bit codes.
inline f32x16 e2m1_values(i32x16 code) {
  i32x16 index = code & 7;
  // 0 and 0.5 are index / 2; from 1 on the index is exponent and mantissa bit.
  i32x16 normal = (index << 22) + (126 << 23);
  f32x16 small = bits<f32x16>((index & 1) * bits<int32_t>(0.5f));
  f32x16 magnitude = index < 2 ? small : bits<f32x16>(normal);
  return bits<f32x16>(bits<u32x16>(magnitude) | (bits<u32x16>(code & 8) << 28));
}

// Two codes a byte, element 2i in the low nibble.
inline u8x8 pack_codes(i32x16 codes) {
  u16x8 pairs = bits<u16x8>(__builtin_convertvector(codes, u8x16));
  return __builtin_convertvector((pairs & 0xF) | (pairs >> 4), u8x8);
}

// Sum of squares as a tree of halves, the order of nvfp4.squared_error.
inline float sum_of_squares(f32x16 error) {
  f32x16 t = error * error;
  t = t + __builtin_shuffle(t, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15});
  t = t + __builtin_shuffle(t, i32x16{4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7});
  t = t + __builtin_shuffle(t, i32x16{2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3});
  return t[0] + t[1];
}

constexpr int64_t kScalesAtOnce = kLanes;

struct BlockScales {
  alignas(64) int32_t code[kScalesAtOnce];
  alignas(64) float value[kScalesAtOnce];
  alignas(64) float reciprocal[kScalesAtOnce];
};

inline void make_scales(f32x16 block_max, float factor, BlockScales& scales) {
  i32x16 code = e4m3_bits(block_max * splat(factor));
  f32x16 value = e4m3_value(code);
  store(scales.code, code);
  store(scales.value, value);
  store(scales.reciprocal, splat(1.0f) / value);
}

// Codes and left-over of one block under one scale.
inline i32x16 encode_block(f32x16 xs, const BlockScales& scales, int64_t b, f32x16& residual) {
  i32x16 codes = e2m1_codes(xs * splat(scales.reciprocal[b]));
  residual = xs - e2m1_values(codes) * splat(scales.value[b]);
  return codes;
}

template <bool FourOverSix, bool Residual>
void quantize_row_as(
    const float* x, float inverse, int64_t blocks, uint8_t* qdata, uint8_t* scale,
    float* residual) {
  const f32x16 multiplier = splat(inverse);
  for (int64_t first = 0; first < blocks; first += kScalesAtOnce) {
    const int64_t count = blocks - first < kScalesAtOnce ? blocks - first : kScalesAtOnce;
    alignas(64) int32_t block_max[kScalesAtOnce] = {};
    for (int64_t b = 0; b < count; ++b) {
      f32x16 xs = load<f32x16>(x + (first + b) * kLanes) * multiplier;
      block_max[b] = max_of_lanes(abs_bits(xs))[0];
    }
    BlockScales six, four;
    make_scales(load<f32x16>(block_max), kSixth, six);
    if (FourOverSix) make_scales(load<f32x16>(block_max), kQuarter, four);
    for (int64_t b = 0; b < count; ++b) {
      const int64_t block = first + b;
      f32x16 xs = load<f32x16>(x + block * kLanes) * multiplier, rest;
      i32x16 codes = encode_block(xs, six, b, rest);
      int32_t scale_code = six.code[b];
      if (FourOverSix) {
        f32x16 wide_rest;
        i32x16 wide_codes = encode_block(xs, four, b, wide_rest);
        // As bits rather than by a branch, which would be taken at random.
        const int32_t wide = -int32_t(sum_of_squares(wide_rest) < sum_of_squares(rest));
        codes = (wide_codes & wide) | (codes & ~wide);
        rest = bits<f32x16>((bits<i32x16>(wide_rest) & wide) | (bits<i32x16>(rest) & ~wide));
        scale_code = (four.code[b] & wide) | (scale_code & ~wide);
      }
      store(qdata + block * arc::kBlockBytes, pack_codes(codes));
      scale[block] = uint8_t(scale_code);
      if (Residual) store(residual + block * kLanes, rest);
    }
  }
}

void quantize_row(
    const float* x, float inverse, int64_t blocks, bool four_over_six, uint8_t* qdata,
    uint8_t* scale, float* residual) {
  if (four_over_six && residual) {
    quantize_row_as<true, true>(x, inverse, blocks, qdata, scale, residual);
  } else if (four_over_six) {
    quantize_row_as<true, false>(x, inverse, blocks, qdata, scale, residual);
  } else if (residual) {
    quantize_row_as<false, true>(x, inverse, blocks, qdata, scale, residual);
  } else {
    quantize_row_as<false, false>(x, inverse, blocks, qdata, scale, residual);
  }
}

}  // namespace
