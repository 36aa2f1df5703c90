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
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
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

// -1 where a < b, for lanes whose difference does not overflow, such as numbers from 0 on. Without
// masks of its own width, GCC compares a vector that is wider than a register lane by lane; shifts
// and logic it splits into registers.
inline i32x16 less(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
  return a < b;
#else
  return (a - b) >> 31;
#endif
}

// a where mask is -1, b where it is 0.
template <typename V>
inline V select(i32x16 mask, V a, V b) {
#if defined(__AVX512F__)
  return mask ? a : b;
#else
  return bits<V>((bits<i32x16>(a) & mask) | (bits<i32x16>(b) & ~mask));
#endif
}

// Of lanes whose difference does not overflow.
inline i32x16 max(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
  return a > b ? a : b;
#else
  return select(less(a, b), b, a);
#endif
}
inline i32x16 min(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
  return a < b ? a : b;
#else
  return select(less(a, b), a, b);
#endif
}

inline i32x16 every(int32_t v) { return i32x16{} + v; }

// Bits of |v|: ordered as integers like the values, with Inf and NaN above every finite number.
inline i32x16 abs_bits(f32x16 v) { return bits<i32x16>(v) & 0x7FFFFFFF; }

inline i32x8 low_half(i32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
inline i32x8 high_half(i32x16 v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline i32x8 max_of(i32x8 a, i32x8 b) { return a > b ? a : b; }

inline int32_t largest_lane(i32x8 v) {
  v = max_of(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = max_of(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  return v[0] > v[1] ? v[0] : v[1];
}

// x within low and high; NaN stays.
inline f32x16 clamp(f32x16 x, float low, float high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const auto half = [&](f32x8 v) {  // of a NaN in the second operand the result is that operand
    v = f32x8(_mm256_min_ps(_mm256_set1_ps(high), __m256(v)));
    return f32x8(_mm256_max_ps(_mm256_set1_ps(low), __m256(v)));
  };
  f32x8 first = half(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7));
  f32x8 second = half(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  return __builtin_shufflevector(
      first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  x = x > splat(high) ? splat(high) : x;
  return x < splat(low) ? splat(low) : x;
#endif
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

// The low byte of every lane, of lanes from 0 to 255.
inline u8x16 low_bytes(i32x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i words = _mm256_packus_epi32(__m256i(low_half(v)), __m256i(high_half(v)));
  words = _mm256_permute4x64_epi64(words, 0xD8);  // packing works by halves of a register
  __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  return u8x16(_mm_packus_epi16(low, high));
#else
  return __builtin_convertvector(v, u8x16);
#endif
}

// The low 16 bits of every lane.
inline u16x16 low_words(u32x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  i32x16 lanes = bits<i32x16>(v & 0xFFFF);
  __m256i words = _mm256_packus_epi32(__m256i(low_half(lanes)), __m256i(high_half(lanes)));
  return u16x16(_mm256_permute4x64_epi64(words, 0xD8));
#else
  return __builtin_convertvector(v, u16x16);
#endif
}

inline f32x16 from_bf16(u16x16 v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = __m256i(v);
  __m256i halves[2] = {
      _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)),
      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1))};
  return bits<f32x16>(load<u32x16>(halves) << 16);
#else
  return bits<f32x16>(__builtin_convertvector(v, u32x16) << 16);
#endif
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
  u32x16 out = select(less(every(0x7F800000), abs_bits(v)), quiet, rounded);
  return low_words(out);
}

}  // namespace
