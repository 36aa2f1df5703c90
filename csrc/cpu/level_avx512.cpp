// AVX-512 with VNNI: 16 rows of a panel in one vector, four vpdpbusd for a block of 16 channels.
#include <immintrin.h>

#include "dot_common.h"
#include "producer_rows.h"

namespace {

// Bytes that weights are prefetched ahead; 2 KiB and 16 KiB measured up to twice slower from memory.
constexpr int64_t kAhead = 6144;

struct BlockWeights {
  __m512i quads[4];  // value * 2 + 12, in the order of Activations::codes
  __m512 scale;
};

inline BlockWeights unpack_block(const uint8_t* codes, const uint8_t* scale) {
  const __m512i low = _mm512_set1_epi8(0xF);
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
  BlockWeights w;
  w.quads[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(first, low));
  w.quads[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(first, 4), low));
  w.quads[2] = _mm512_shuffle_epi8(table, _mm512_and_si512(second, low));
  w.quads[3] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(second, 4), low));
  w.scale = bits<__m512>(panel_scales(scale));
  return w;
}

inline __m512i broadcast_four(const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 dot_block(const BlockWeights& w, const Activations& a, int64_t at, __m512 acc) {
  const int8_t* codes = a.codes + at * kLanes;
  __m512i sum = _mm512_set1_epi32(a.offset[at]);
  sum = _mm512_dpbusd_epi32(sum, w.quads[0], broadcast_four(codes));
  sum = _mm512_dpbusd_epi32(sum, w.quads[1], broadcast_four(codes + 4));
  sum = _mm512_dpbusd_epi32(sum, w.quads[2], broadcast_four(codes + 8));
  sum = _mm512_dpbusd_epi32(sum, w.quads[3], broadcast_four(codes + 12));
  __m512 scale = _mm512_mul_ps(w.scale, _mm512_set1_ps(a.scale[at]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc);
}

// `Rows` rows from `row` on, which are of one group.
template <int Rows>
void dot_rows(
    const Activations& a, int64_t row, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, float* out) {
  int64_t at = a.at(row);
  __m512 acc[Rows];
  for (auto& row : acc) row = _mm512_setzero_ps();
  for (int64_t j = 0; j < a.blocks; ++j, at += a.group_rows) {
    const int64_t column = columns[j];
    const uint8_t* codes = panel_codes + column * kPanelBlockBytes;
    _mm_prefetch(codes + kAhead, _MM_HINT_T0);
    _mm_prefetch(codes + kAhead + 64, _MM_HINT_T0);
    const BlockWeights w = unpack_block(codes, panel_scale + column * kPanel);
    for (int m = 0; m < Rows; ++m) acc[m] = dot_block(w, a, at + m, acc[m]);
  }
  for (int m = 0; m < Rows; ++m) _mm512_storeu_ps(out + m * kPanel, acc[m]);
}

void dot_panel(
    const Activations& a, int64_t rows, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, float* out) {
  using Dot = void (*)(
      const Activations&, int64_t, const uint8_t*, const uint8_t*, const int32_t*, float*);
  static constexpr Dot kByRows[arc::kGroupRows] = {
      dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
      dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  for (int64_t m = 0; m < rows; m += arc::kGroupRows) {
    const int64_t count = rows - m < arc::kGroupRows ? rows - m : arc::kGroupRows;
    kByRows[count - 1](a, m, panel_codes, panel_scale, columns, out + m * kPanel);
  }
}

}  // namespace

namespace arc {

extern const Kernels kAVX512;
const Kernels kAVX512 = {
    "avx512", load_row, store_row, quantize_row, add_row, silu_mul_row, gelu_row, norm_row,
    unpack_activations, pack_panel, dot_panel};

}  // namespace arc
