// Vectors of 16 lanes in the compiler's own vector types: one source becomes AVX-512, AVX2 or
// plain code by the flags of the file that includes it.
//
// Everything is in an unnamed namespace on purpose: the same inline function compiled with other
// flags in another file must not be merged with this one by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;  // also the block size of NVFP4

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V>
inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  To out;
  std::memcpy(&out, &v, sizeof(out));
  return out;
}

inline f32x16 splat(float v) { return v - f32x16{}; }

inline i32x16 max(i32x16 a, i32x16 b) { return a > b ? a : b; }
inline i32x16 min(i32x16 a, i32x16 b) { return a < b ? a : b; }

// Bits of |v|: ordered as integers like the values, with Inf and NaN above every finite number.
inline i32x16 abs_bits(f32x16 v) { return bits<i32x16>(v) & 0x7FFFFFFF; }

// Largest lane, in every lane.
inline i32x16 max_of_lanes(i32x16 v) {
  v = max(v, __builtin_shuffle(v, i32x16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = max(v, __builtin_shuffle(v, i32x16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = max(v, __builtin_shuffle(v, i32x16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  return max(v, __builtin_shuffle(v, i32x16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
}

// Bytes to 32-bit lanes. GCC 12 turns __builtin_convertvector into sixteen scalar moves here.
inline i32x16 widen(u8x16 v) {
#if defined(__AVX512F__)
  return bits<i32x16>(_mm512_cvtepu8_epi32(bits<__m128i>(v)));
#elif defined(__AVX2__)
  __m128i bytes = bits<__m128i>(v);
  __m256i halves[2] = {
      _mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  return load<i32x16>(halves);
#else
  return __builtin_convertvector(v, i32x16);
#endif
}

inline f32x16 from_bf16(u16x16 v) {
  return bits<f32x16>(__builtin_convertvector(v, u32x16) << 16);
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits<float>(sign | 0x7F800000 | ((magnitude & 0x3FF) << 13));
  // Exponent and mantissa moved into place, then 2^112 for the difference of the biases.
  return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float f) {
  uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000;
  u &= 0x7FFFFFFF;
  if (u > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (u >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to 65536 or more
  if (u < 0x38800000) {  // below 2^-14: the unit of the last place is 2^-24, as is that of f + 0.5
    float rounded = bits<float>(u) + 0.5f;
    return uint16_t(sign | (bits<uint32_t>(rounded) - 0x3F000000));
  }
  u += 0xFFF + ((u >> 13) & 1);
  return uint16_t(sign | ((u - 0x38000000) >> 13));
}

inline f32x16 from_half(u16x16 v) {
#if defined(__AVX512F__)
  return bits<f32x16>(_mm512_cvtph_ps(bits<__m256i>(v)));
#elif defined(__F16C__)
  __m256 parts[2] = {
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&v))),
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(&v) + 1))};
  return load<f32x16>(parts);
#else
  f32x16 out;
  for (int i = 0; i < kLanes; ++i) out[i] = half_to_float(v[i]);
  return out;
#endif
}

// NaN gives 0x7e00 with its sign.
inline u16x16 to_half(f32x16 v) {
#if defined(__AVX512F__)
  __m512 x = bits<__m512>(v);
  __m512i quiet = bits<__m512i>((bits<i32x16>(v) & INT32_MIN) | 0x7FC00000);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  x = _mm512_mask_mov_ps(x, nan, _mm512_castsi512_ps(quiet));
  return bits<u16x16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  u16x16 out;
  for (int i = 0; i < kLanes; ++i) out[i] = float_to_half(v[i]);
  return out;
#endif
}

// Nearest, ties to even; NaN gives the canonical 0x7fc0, as in PyTorch.
inline u16x16 to_bf16(f32x16 v) {
  u32x16 u = bits<u32x16>(v);
  u32x16 rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  u32x16 quiet = u32x16{} + 0x7FC0;
  return __builtin_convertvector(v == v ? rounded : quiet, u16x16);
}

}  // namespace
