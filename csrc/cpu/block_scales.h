// Block scales of 16 blocks at a time, one a lane, and the e4m3 codes they are rounded to.
#pragma once

#include "e4m3.h"
#include "simd.h"

namespace {

constexpr int32_t kInfBits = 0x7F800000;
constexpr float kSixth = 1.0f / 6.0f;
constexpr float kQuarter = 1.0f / 4.0f;
constexpr int32_t kNanCode = 0x7F;

// e4m3 bits of v >= 0, nearest even in [2^-9, 448]; Inf and NaN (which come as lanes that are not
// below Inf) give 0x7f.
inline i32x16 e4m3_bits(f32x16 v) {
  i32x16 magnitude = abs_bits(v);
  i32x16 finite = less(magnitude, every(kInfBits));
  i32x16 clamped = max(magnitude, every(bits<int32_t>(0x1p-9f)));
  clamped = min(clamped, every(bits<int32_t>(448.0f)));
  u32x16 u = bits<u32x16>(clamped);
  u32x16 normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 the unit of the last place is 2^-9: that of v + 2^14.
  u32x16 shifted = bits<u32x16>(bits<f32x16>(clamped) + splat(0x1p14f));
  u32x16 subnormal = shifted - bits<uint32_t>(0x1p14f);
  u32x16 code = select(less(clamped, every(bits<int32_t>(0x1p-6f))), subnormal, normal);
  return select(finite, bits<i32x16>(code), every(kNanCode));
}

constexpr int64_t kScalesAtOnce = kLanes;

struct BlockScales {
  alignas(64) int32_t code[kScalesAtOnce];
  alignas(64) float value[kScalesAtOnce];
  alignas(64) float reciprocal[kScalesAtOnce];
};

inline void fill_scales(i32x16 code, BlockScales& scales) {
  f32x16 value = e4m3_value(code);
  store(scales.code, code);
  store(scales.value, value);
  store(scales.reciprocal, splat(1.0f) / value);
}

inline void make_scales(f32x16 block_max, float factor, BlockScales& scales) {
  fill_scales(e4m3_bits(block_max * splat(factor)), scales);
}

}  // namespace
