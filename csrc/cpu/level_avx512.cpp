// AVX-512 with VNNI: 16 rows of a panel in one vector, four vpdpbusd for a block of 16 channels.
#include <immintrin.h>

#include "attention_tile.h"
#include "dot_common.h"
#include "linear_rows.h"
#include "producer_rows.h"
#include "round_columns.h"
#include "weight_rows.h"

namespace {

using arc::DecodedChunk;
using arc::kPair;

// Bytes that weights are prefetched ahead; 2 KiB and 16 KiB measured up to twice slower from memory.
constexpr int64_t kAhead = 6144;

inline __m512i e2m1_table(const __m128i values) { return _mm512_broadcast_i32x4(values); }

// Four blocks at once: the low and the high nibbles of every four bytes side by side, as index.
inline __m512i unpack_four(const uint8_t* qdata) {
  const __m512i table = e2m1_table(bits<__m128i>(kTwiceValues));
  const __m512i low = _mm512_set1_epi64(0x0F0F0F0F), high = _mm512_set1_epi64(0x0F0F0F0FLL << 32);
  const __m512i v = _mm512_cvtepu32_epi64(load<__m256i>(qdata));
  const __m512i index = _mm512_or_si512(
      _mm512_and_si512(v, low), _mm512_and_si512(_mm512_slli_epi64(v, 28), high));
  return _mm512_shuffle_epi8(table, index);
}

// -12 times the sum of each block's 16 codes, in the lowest lane of its quarter.
inline __m512i offsets_of_four(__m512i codes) {
  __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(12), codes);
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
  sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));
  return _mm512_sub_epi32(_mm512_setzero_si512(), sum);
}

void unpack_row(const uint8_t* qdata, const uint8_t* scale, const Activations& a, int64_t row) {
  int64_t at = a.at(row), b = 0;
  for (; b + kLanes <= a.blocks; b += kLanes) {
    alignas(64) float scales[kLanes];
    store(scales, e4m3_value(widen(load<u8x16>(scale + b))) * splat(0.25f));
    for (int i = 0; i < kLanes; i += 4) {
      alignas(64) int8_t codes[4 * kLanes];
      alignas(64) int32_t offsets[kLanes];
      const __m512i four = unpack_four(qdata + (b + i) * arc::kBlockBytes);
      _mm512_store_si512(codes, four);
      _mm512_store_si512(offsets, offsets_of_four(four));
      for (int k = 0; k < 4; ++k, at += a.group_rows) {
        std::memcpy(a.codes + at * kLanes, codes + k * kLanes, kLanes);
        a.offset[at] = offsets[4 * k];
        a.scale[at] = scales[i + k];
      }
    }
  }
  unpack_blocks(qdata, scale, a, row, b);
}

struct BlockWeights {
  __m512i quads[4];  // value * 2 + 12, in the order of Activations::codes
  __m512 scale;
};

inline BlockWeights unpack_block(const uint8_t* codes, const uint8_t* scale) {
  const __m512i low = _mm512_set1_epi8(0xF);
  const __m512i table =
      e2m1_table(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
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

// What a pass over a panel fetches for later: `step` bytes for each block.
struct Ahead {
  const uint8_t* codes;
  int64_t step;

  void fetch(int64_t block) const {
    _mm_prefetch(codes + block * step, _MM_HINT_T0);
    _mm_prefetch(codes + block * step + step / 2, _MM_HINT_T0);
  }
};

// `Rows` rows from `row` on, which are of one group.
template <int Rows>
void dot_rows(
    const Activations& a, int64_t row, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, const Ahead& ahead, const Output& out) {
  int64_t at = a.at(row);
  __m512 acc[Rows];
  for (auto& row : acc) row = _mm512_setzero_ps();
  for (int64_t j = 0; j < a.blocks; ++j, at += a.group_rows) {
    const int64_t column = columns[j];
    ahead.fetch(j);
    const BlockWeights w =
        unpack_block(panel_codes + column * kPanelBlockBytes, panel_scale + column * kPanel);
    for (int m = 0; m < Rows; ++m) acc[m] = dot_block(w, a, at + m, acc[m]);
  }
  for (int m = 0; m < Rows; ++m) store_lanes_of(bits<f32x16>(acc[m]), out, row + m, 0);
}

// Several passes over a panel fetch the whole next one between them.
void dot_panel(
    const Activations& a, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, const Output& out) {
  using Dot = void (*)(
      const Activations&, int64_t, const uint8_t*, const uint8_t*, const int32_t*, const Ahead&,
      const Output&);
  static constexpr Dot kByRows[arc::kGroupRows] = {
      dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
      dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  const int64_t passes = (out.rows + arc::kGroupRows - 1) / arc::kGroupRows;
  Ahead ahead{panel_codes + kAhead, kPanelBlockBytes};
  if (passes > 1) {
    ahead = {panel_codes + a.blocks * kPanelBlockBytes, kPanelBlockBytes / passes};
  }
  for (int64_t m = 0; m < out.rows; m += arc::kGroupRows, ahead.codes += a.blocks * ahead.step) {
    const int64_t count = std::min(arc::kGroupRows, out.rows - m);
    kByRows[count - 1](a, m, panel_codes, panel_scale, columns, ahead, out);
  }
}

void decode_panel(
    const uint8_t* panel_codes, const uint8_t* panel_scale, const int32_t* columns, int64_t blocks,
    int64_t ahead, uint8_t* codes, float* scale) {
  for (int64_t j = 0; j < blocks; ++j) {
    const uint8_t* packed = panel_codes + columns[j] * kPanelBlockBytes;
    _mm_prefetch(packed + ahead, _MM_HINT_T1);
    _mm_prefetch(packed + ahead + 64, _MM_HINT_T1);
    const BlockWeights w = unpack_block(packed, panel_scale + columns[j] * kPanel);
    for (int i = 0; i < 4; ++i) _mm512_store_si512(codes + (4 * j + i) * 64, w.quads[i]);
    _mm512_store_ps(scale + j * kPanel, w.scale);
  }
}

inline BlockWeights load_block(const DecodedChunk& w, int64_t panel, int64_t j) {
  const int64_t block = panel * w.blocks + j;
  BlockWeights out;
  for (int i = 0; i < 4; ++i) out.quads[i] = _mm512_load_si512(w.codes + (4 * block + i) * 64);
  out.scale = _mm512_load_ps(w.scale + block * kPanel);
  return out;
}

// One group of `Rows` rows times a chunk of `Panels` panels: 16 accumulators, and each number of A is
// broadcast once for both panels.
template <int Rows, int Panels>
void multiply_group(const Activations& a, int64_t row, const DecodedChunk& w, float* products) {
  int64_t at = a.at(row) + w.first * a.group_rows;
  __m512 acc[Rows][Panels];
  for (int m = 0; m < Rows; ++m) {
    for (int p = 0; p < Panels; ++p) {
      const float* before = products + (m * kPair + p) * kPanel;
      acc[m][p] = w.first ? _mm512_load_ps(before) : _mm512_setzero_ps();
    }
  }
  const int64_t next = a.blocks * a.group_rows;  // the next group's, while this one is multiplied
  for (int64_t j = 0; j < w.blocks; ++j, at += a.group_rows) {
    _mm_prefetch(a.codes + (at + next) * kLanes, _MM_HINT_T0);
    _mm_prefetch(a.codes + (at + next) * kLanes + 64, _MM_HINT_T0);
    _mm_prefetch(a.scale + at + next, _MM_HINT_T0);
    _mm_prefetch(a.offset + at + next, _MM_HINT_T0);
    BlockWeights block[Panels];
    for (int p = 0; p < Panels; ++p) block[p] = load_block(w, p, j);
    for (int m = 0; m < Rows; ++m) {
      for (int p = 0; p < Panels; ++p) acc[m][p] = dot_block(block[p], a, at + m, acc[m][p]);
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int p = 0; p < Panels; ++p) {
      _mm512_store_ps(products + (m * kPair + p) * kPanel, acc[m][p]);
    }
  }
}

template <int Panels>
void multiply_rows(const Activations& a, int64_t rows, const DecodedChunk& w, float* products) {
  using Group = void (*)(const Activations&, int64_t, const DecodedChunk&, float*);
  static constexpr Group kByRows[arc::kGroupRows] = {
      multiply_group<1, Panels>, multiply_group<2, Panels>, multiply_group<3, Panels>,
      multiply_group<4, Panels>, multiply_group<5, Panels>, multiply_group<6, Panels>,
      multiply_group<7, Panels>, multiply_group<8, Panels>};
  for (int64_t m = 0; m < rows; m += arc::kGroupRows) {
    const int64_t count = std::min(arc::kGroupRows, rows - m);
    kByRows[count - 1](a, m, w, products + m * kPair * kPanel);
  }
}

void multiply(const Activations& a, int64_t rows, const DecodedChunk& w, float* products) {
  if (w.panels == kPair) multiply_rows<kPair>(a, rows, w, products);
  else multiply_rows<1>(a, rows, w, products);
}

const arc::DecodedKernels kDecoded = {decode_panel, multiply};

const arc::PairKernels kPairs = {pack_values, attend<PlainDot>, linear_rows<PlainDot>};

}  // namespace

namespace arc {

extern const Kernels kAVX512;
const Kernels kAVX512 = {
    "avx512", load_row, store_row, quantize_row, search_weight_rows, encode_row, residual_row,
    round_columns, add_row, silu_mul_row, gelu_row, norm_row,
    unpack_row, pack_panel, dot_panel, store_products, &kPairs, &kDecoded};

}  // namespace arc
