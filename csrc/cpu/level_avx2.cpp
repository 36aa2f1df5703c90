// AVX2, FMA and F16C: the int8 dot product by vpmaddubsw, 8 rows of a panel at a time.
#include <immintrin.h>

#include "attention_tile.h"
#include "dot_common.h"
#include "linear_rows.h"
#include "producer_rows.h"
#include "round_columns.h"
#include "weight_rows.h"

namespace {

// 8 rows of one block as value * 2 + 12, four vectors in the order of Activations::codes.
inline void decode_half_panel(const uint8_t* codes, __m256i w[4]) {
  const __m256i low = _mm256_set1_epi8(0xF);
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  for (int half = 0; half < 2; ++half) {
    __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * half));
    w[2 * half] = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
    w[2 * half + 1] =
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
  }
}

// fp32 block scales of 8 rows. The vector types of 16 lanes would do, but GCC compares and selects
// them lane by lane where they are wider than a register.
inline __m256 half_panel_scales(const uint8_t* bytes) {
  __m256i code =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  __m256 value = _mm256_mul_ps(
      _mm256_castsi256_ps(_mm256_slli_epi32(code, 20)), _mm256_set1_ps(0x1p120f));
  __m256 is_nan = _mm256_castsi256_ps(_mm256_cmpgt_epi32(code, _mm256_set1_epi32(0x7E)));
  return _mm256_or_ps(value, is_nan);  // all bits set: NaN
}

// Dot products of 8 rows with one block of activations. Sums of 16 stay below 2^15: 16 * 24 * 12.
inline __m256 dot_block(const __m256i w[4], const int8_t* a, int32_t offset) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; ++i) {
    int32_t four;
    std::memcpy(&four, a + 4 * i, 4);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], _mm256_set1_epi32(four)));
  }
  __m256i total = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(total, _mm256_set1_epi32(offset)));
}

// `Rows` rows from `row` on, which are of one group.
template <int Rows>
void dot_rows(
    const Activations& a, int64_t row, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, const Output& out) {
  int64_t at = a.at(row);
  __m256 acc[Rows][2];
  for (auto& pair : acc) pair[0] = pair[1] = _mm256_setzero_ps();
  for (int64_t j = 0; j < a.blocks; ++j, at += a.group_rows) {
    const uint8_t* codes = panel_codes + columns[j] * kPanelBlockBytes;
    for (int part = 0; part < 2; ++part) {
      __m256i w[4];
      decode_half_panel(codes + 32 * part, w);
      const __m256 row_scales = half_panel_scales(panel_scale + columns[j] * kPanel + 8 * part);
      for (int m = 0; m < Rows; ++m) {
        __m256 dot = dot_block(w, a.codes + (at + m) * kLanes, a.offset[at + m]);
        __m256 scale = _mm256_mul_ps(row_scales, _mm256_set1_ps(a.scale[at + m]));
        acc[m][part] = _mm256_fmadd_ps(dot, scale, acc[m][part]);
      }
    }
  }
  for (int m = 0; m < Rows; ++m) {
    store_lanes_of(load<f32x16>(acc[m]), out, row + m, 0);
  }
}

void dot_panel(
    const Activations& a, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, const Output& out) {
  using Dot = void (*)(
      const Activations&, int64_t, const uint8_t*, const uint8_t*, const int32_t*, const Output&);
  static constexpr Dot kByRows[] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>};
  for (int64_t m = 0; m < out.rows; m += 4) {
    const int64_t count = std::min<int64_t>(out.rows - m, 4);
    kByRows[count - 1](a, m, panel_codes, panel_scale, columns, out);
  }
}

const arc::PairKernels kPairs = {pack_values, attend<PlainDot>, linear_rows<PlainDot>};

}  // namespace

namespace arc {

extern const Kernels kAVX2;
const Kernels kAVX2 = {
    "avx2", load_row, store_row, quantize_row, search_weight_rows, encode_row, residual_row,
    round_columns, add_row, silu_mul_row, gelu_row, norm_row,
    unpack_activations, pack_panel, dot_panel, store_products, &kPairs};

}  // namespace arc
