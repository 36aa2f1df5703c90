// Block scales as fp32.
#pragma once

#include "simd.h"

namespace {

// fp32 value of e4m3 bits 0..0x7e; those behind, NaN's and with a sign, are no scales and give NaN.
inline f32x16 e4m3_value(i32x16 code) {
  f32x16 v = bits<f32x16>(code << 20) * splat(0x1p120f);
  return select(less(code, every(0x7F)), v, splat(__builtin_nanf("")));
}

inline float e4m3_scalar(uint8_t code) {
  return code >= 0x7F ? __builtin_nanf("") : bits<float>(uint32_t(code) << 20) * 0x1p120f;
}

// fp32 block scales of the 16 rows of a panel.
inline f32x16 panel_scales(const uint8_t* bytes) {
  return e4m3_value(widen(load<u8x16>(bytes)));
}

}  // namespace
