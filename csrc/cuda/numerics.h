// NVFP4 arithmetic on single numbers, for device and host alike: step by step what
// arc_ao/formats/nvfp4.py and arc_ao/ops/producers.py mean. Every multiplication, addition and
// division is rounded on its own: by intrinsics on the device, by -ffp-contract=off on the host, so
// that a CPU test of this header speaks for the kernels. Where the device has an instruction for a
// conversion (Blackwell: e2m1), it takes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../scale_layout.h"

namespace arc {

enum class Number : int32_t { kFloat, kBFloat16, kHalf };

constexpr int kBlockSize = 16;
constexpr float kLargest = 2688.0f;          // 6 * 448
constexpr float kTinyAmax = 0x1p-116f;       // below it 2688 / amax could overflow
constexpr float kSixth = 1.0f / 6.0f, kQuarter = 1.0f / 4.0f;
constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr int kNanScale = 0x7F;

template <typename To, typename From>
ARC_SHARED To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__CUDA_ARCH__)
ARC_SHARED float mul(float a, float b) { return __fmul_rn(a, b); }
ARC_SHARED float add(float a, float b) { return __fadd_rn(a, b); }
ARC_SHARED float sub(float a, float b) { return __fsub_rn(a, b); }
ARC_SHARED float divide(float a, float b) { return __fdiv_rn(a, b); }
ARC_SHARED float square_root(float a) { return __fsqrt_rn(a); }
#else
ARC_SHARED float mul(float a, float b) { return a * b; }
ARC_SHARED float add(float a, float b) { return a + b; }
ARC_SHARED float sub(float a, float b) { return a - b; }
ARC_SHARED float divide(float a, float b) { return a / b; }
ARC_SHARED float square_root(float a) { return std::sqrt(a); }
#endif

ARC_SHARED uint32_t abs_bits(float v) { return bits_as<uint32_t>(v) & 0x7FFFFFFF; }

// --- 16-bit numbers: nearest even, NaN stays NaN ---------------------------------------------

ARC_SHARED float from_bf16(uint16_t raw) { return bits_as<float>(uint32_t(raw) << 16); }

#if defined(__CUDA_ARCH__)
ARC_SHARED uint16_t to_bf16(float v) {
  uint16_t raw;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(raw) : "f"(v));
  return raw;
}

ARC_SHARED float from_half(uint16_t raw) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(raw));
  return v;
}

ARC_SHARED uint16_t to_half(float v) {
  uint16_t raw;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(raw) : "f"(v));
  return raw;
}
#else
ARC_SHARED uint16_t to_bf16(float v) {
  const uint32_t u = bits_as<uint32_t>(v);
  if ((u & 0x7FFFFFFF) > kInfinityBits) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

ARC_SHARED float from_half(uint16_t raw) {
  const uint32_t sign = uint32_t(raw & 0x8000) << 16, magnitude = raw & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_as<float>(sign | kInfinityBits | (magnitude & 0x3FF) << 13);
  const float v = bits_as<float>(magnitude << 13) * 0x1p112f;  // subnormals, too: exact
  return bits_as<float>(sign | bits_as<uint32_t>(v));
}

ARC_SHARED uint16_t to_half(float v) {
  const uint32_t u = bits_as<uint32_t>(v), magnitude = u & 0x7FFFFFFF;
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  if (magnitude > kInfinityBits) return sign | 0x7E00;
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and more
  if (magnitude < 0x38800000) {  // below 2^-14 the unit of the last place is 2^-24: that of v + 1/2
    return sign | uint16_t(bits_as<uint32_t>(add(bits_as<float>(magnitude), 0.5f)) - 0x3F000000);
  }
  return sign | uint16_t((magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}
#endif

ARC_SHARED float widen(uint16_t raw, Number number) {
  return number == Number::kHalf ? from_half(raw) : from_bf16(raw);
}

ARC_SHARED uint16_t narrow(float v, Number number) {
  return number == Number::kHalf ? to_half(v) : to_bf16(v);
}

ARC_SHARED int64_t size_of(Number number) { return number == Number::kFloat ? 4 : 2; }

ARC_SHARED float load_number(const void* from, int64_t i, Number number) {
  if (number == Number::kFloat) return static_cast<const float*>(from)[i];
  return widen(static_cast<const uint16_t*>(from)[i], number);
}

ARC_SHARED void store_number(void* to, int64_t i, float v, Number number) {
  if (number == Number::kFloat) static_cast<float*>(to)[i] = v;
  else static_cast<uint16_t*>(to)[i] = narrow(v, number);
}

ARC_SHARED float round_to(float v, Number number) {
  return number == Number::kFloat ? v : widen(narrow(v, number), number);
}

// --- Block scales ---------------------------------------------------------------------------

// e4m3 bits of v >= 0: nearest even in [2^-9, 448]; Inf and NaN give 0x7f.
ARC_SHARED int e4m3_bits(float v) {
  if (abs_bits(v) >= kInfinityBits) return kNanScale;
  v = v < 0x1p-9f ? 0x1p-9f : v > 448.0f ? 448.0f : v;
  const uint32_t u = bits_as<uint32_t>(v);
  if (v < 0x1p-6f) {  // the unit of the last place is 2^-9: that of v + 2^14
    return int(bits_as<uint32_t>(add(v, 0x1p14f)) - 0x46800000);
  }
  return int(((u + 0x7FFFF + (u >> 20 & 1)) >> 20) - (120 << 3));
}

// fp32 value of the bits of a scale; those behind kNanScale have a sign and are none: NaN, too.
ARC_SHARED float e4m3_value(int bits) {
  if (bits >= kNanScale) return bits_as<float>(0x7FC00000u);
  return mul(bits_as<float>(uint32_t(bits) << 20), 0x1p120f);
}

// --- Codes ----------------------------------------------------------------------------------

// 4-bit code of a v that is no NaN: nearest, ties to even, saturating at 6, the sign kept on zeros.
ARC_SHARED int e2m1_code(float v) {
  const uint32_t u = bits_as<uint32_t>(v), limit = 0x41000000;  // 8
  const uint32_t magnitude = abs_bits(v) < limit ? abs_bits(v) : limit;
  // In [2^e, 2^(e+1)), and below 2 as for e = 0, the unit is 2^(e-1): that of a + 2^(e+22).
  uint32_t exponent = magnitude & kInfinityBits;
  if (exponent < 0x3F800000) exponent = 0x3F800000;
  const uint32_t shifter = exponent + (22u << 23);
  const float sum = add(bits_as<float>(magnitude), bits_as<float>(shifter));
  const int index = int(bits_as<uint32_t>(sum) - shifter + (exponent >> 22)) - (127 << 1);
  return (index < 7 ? index : 7) | int(u >> 28 & 8);
}

// Codes of two numbers that are no NaN, the first in the low nibble.
ARC_SHARED uint32_t e2m1_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  uint32_t out;  // the instruction's first operand goes to the high nibble
  asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %2, %1; cvt.u32.u8 %0, pair; }"
      : "=r"(out)
      : "f"(low), "f"(high));
  return out;
#else
  return uint32_t(e2m1_code(low) | e2m1_code(high) << 4);
#endif
}

ARC_SHARED float e2m1_value(uint32_t code) {
  const uint32_t index = code & 7, sign = (code & 8) << 28;
  const uint32_t magnitude = index < 2 ? index * 0x3F000000 : (index << 22) + (126u << 23);
  return bits_as<float>(sign | magnitude);
}

// --- Outer scales ---------------------------------------------------------------------------

struct Outer {
  float inverse, outer;  // multiply on quantize, on dequantize
};

ARC_SHARED Outer outer_of(uint32_t amax_bits) {
  const float amax = bits_as<float>(amax_bits);
  if (amax < kTinyAmax) return {0.0f, 0.0f};
  return {divide(kLargest, amax), divide(amax, kLargest)};
}

ARC_SHARED Outer given_outer(float outer) {
  return {outer == 0.0f ? 0.0f : divide(1.0f, outer), outer};
}

// --- The product's last steps ---------------------------------------------------------------

// Sum over K to output, fp32.
ARC_SHARED float finish(float sum, float a_outer, float b_outer) {
  return mul(mul(sum, a_outer), b_outer);
}

// --- What makes the input of a linear -------------------------------------------------------

// e^x by the Cephes reduction and polynomial of producers.exp, clamped to [-87, 88].
ARC_SHARED float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  const float shifted = add(mul(x, 1.44269504088896341f), kRound);
  const float n = sub(shifted, kRound);
  float r = sub(x, mul(n, 0.693359375f));
  r = sub(r, mul(n, -2.12194440e-4f));
  float p = 1.9875691500e-4f;
  p = add(mul(p, r), 1.3981999507e-3f);
  p = add(mul(p, r), 8.3334519073e-3f);
  p = add(mul(p, r), 4.1665795894e-2f);
  p = add(mul(p, r), 1.6666665459e-1f);
  p = add(mul(p, r), 5.0000001201e-1f);
  const float y = add(add(mul(mul(p, r), r), r), 1.0f);
  const uint32_t power = (bits_as<uint32_t>(shifted) - bits_as<uint32_t>(kRound) + 127) << 23;
  return mul(y, bits_as<float>(power));
}

ARC_SHARED float silu_mul(float gate, float up, Number number) {
  const float silu = divide(gate, add(exponential(sub(0.0f, gate)), 1.0f));
  return round_to(mul(round_to(silu, number), up), number);
}

// x Phi(x) by the error function of producers.gelu.
ARC_SHARED float gelu(float x) {
  const float z = mul(bits_as<float>(abs_bits(x)), 0.707106781186547524f);
  const float t = divide(1.0f, add(mul(z, 0.3275911f), 1.0f));
  float p = 1.061405429f;
  p = add(mul(p, t), -1.453152027f);
  p = add(mul(p, t), 1.421413741f);
  p = add(mul(p, t), -0.284496736f);
  p = add(mul(p, t), 0.254829592f);
  const float tail = mul(mul(mul(p, t), 0.5f), exponential(sub(0.0f, mul(z, z))));
  return mul(x, x < 0.0f ? tail : sub(1.0f, tail));
}

ARC_SHARED float tanh_gelu(float x) {
  constexpr float kSlope = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  const float inner = add(x, mul(mul(mul(x, x), x), 0.044715f));
  return divide(x, add(exponential(sub(0.0f, mul(inner, kSlope))), 1.0f));
}

ARC_SHARED float inverse_rms(double sum_of_squares, int64_t channels, float eps) {
  const float mean = float(sum_of_squares / double(channels));
  return divide(1.0f, square_root(add(mean, eps)));
}

ARC_SHARED float normed(float x, float inverse, float weight, Number number) {
  return round_to(mul(weight, round_to(mul(x, inverse), number)), number);
}

}  // namespace arc
