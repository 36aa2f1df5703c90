// AMX-bf16: strips of 32 rows of A times strips of 32 rows of W, four accumulators in tile registers.
// A decoded number q * s has at most six significant bits: exact in bf16.
#include <immintrin.h>

#include "amx_tiles.h"
#include "e4m3.h"
#include "kernels.h"
#include "store_products.h"

namespace {

using arc::kBlockFloats;
using arc::kNextBytes;
using arc::kPanel;
using arc::kPanelBlockBytes;
using arc::kStepHalves;
using arc::kTileFloats;
using arc::kTileHalves;
using arc::kTileRows;
using arc::Output;
using arc::TileProduct;

constexpr int64_t kRowBytes = 64;  // of a tile
constexpr int64_t kRowHalves = kRowBytes / 2;
constexpr int64_t kBlockHalves = kTileHalves / 2;  // of a tile of W that one block fills
// How far ahead memory is fetched; to be measured on a machine with AMX.
constexpr int64_t kAheadW = 2 * kStepHalves;  // W into L1
constexpr int64_t kAheadCodes = 2048;         // bytes of a panel that is decoded, into L1

inline __m512 e2m1_table() {
  return _mm512_setr_ps(
      0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
      -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
}

// The permutation reads the low four bits of each index alone, so none is masked.
inline __m512i decode(__m512i index, __m512 table, __m512 scale) {
  return _mm512_castps_si512(_mm512_mul_ps(_mm512_permutexvar_ps(index, table), scale));
}

void decode_row(
    const uint8_t* qdata, const uint8_t* scale, int64_t blocks, int64_t row, uint16_t* strip) {
  const __m512 table = e2m1_table();
  uint16_t* target = strip + row * kRowHalves;  // a strip's second tile follows its first
  for (int64_t b = 0; b < blocks; ++b) {
    __m128i packed = _mm_cvtepu8_epi16(_mm_loadl_epi64(
        reinterpret_cast<const __m128i*>(qdata + b * arc::kBlockBytes)));
    __m128i nibbles = _mm_or_si128(packed, _mm_slli_epi16(packed, 4));  // low, high, low, ...
    __m512i values = decode(
        _mm512_cvtepu8_epi32(nibbles), table, _mm512_set1_ps(e4m3_scalar(scale[b])));
    uint16_t* place = target + b / 2 * kStepHalves + b % 2 * kLanes;
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(place), _mm512_cvtepi32_epi16(_mm512_srli_epi32(values, 16)));
  }
  if (blocks % 2) store(target + blocks / 2 * kStepHalves + kLanes, u16x16{});
}

// One block of 16 rows: eight rows of a tile, each a pair of channels. The low half of a number that
// bf16 holds is zero, NaN's too.
inline void decode_block(const uint8_t* codes, __m512 scale, __m512 table, uint16_t* tile) {
  for (int half = 0; half < 2; ++half) {
    const __m512i packed = _mm512_loadu_si512(codes + 64 * half);
    for (int i = 0; i < 4; ++i) {
      __m512i even = decode(_mm512_srli_epi32(packed, 8 * i), table, scale);
      __m512i odd = decode(_mm512_srli_epi32(packed, 8 * i + 4), table, scale);
      __m512i pair = _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
      _mm512_store_si512(tile + (4 * half + i) * kRowHalves, pair);
    }
  }
}

void decode_panel(
    const uint8_t* panel_codes, const uint8_t* panel_scale, const int32_t* columns, int64_t blocks,
    uint16_t* tiles) {
  const __m512 table = e2m1_table();
  for (int64_t j = 0; j < blocks; ++j) {
    const uint8_t* codes = panel_codes + columns[j] * kPanelBlockBytes;
    _mm_prefetch(codes + kAheadCodes, _MM_HINT_T0);
    _mm_prefetch(codes + kAheadCodes + 64, _MM_HINT_T0);
    const __m512 scale = bits<__m512>(panel_scales(panel_scale + columns[j] * kPanel));
    decode_block(codes, scale, table, tiles + j / 2 * kStepHalves + j % 2 * kBlockHalves);
  }
  if (blocks % 2) {
    uint16_t* rest = tiles + blocks / 2 * kStepHalves + kBlockHalves;
    for (int64_t i = 0; i < kBlockHalves; i += kLanes) store(rest + i, u16x16{});
  }
}

template <int Lines>
inline void fetch_to_l1(const uint16_t* p) {
  for (int i = 0; i < Lines; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + i * kRowBytes, _MM_HINT_T0);
  }
}

inline void fetch_to_l2(const char* p) {
  _mm_prefetch(p, _MM_HINT_T1);
  _mm_prefetch(p + kRowBytes, _MM_HINT_T1);
}

// Tiles 0 and 1 are the upper half of C, 2 and 3 the lower, 4 and 5 A, 6 and 7 W.
template <bool Lower>
inline void multiply_strips(
    const uint16_t* a, const uint16_t* w, float* c, int64_t steps, bool add,
    const char* next_a, const char* next_c) {
  if (add) {
    tile_load(0, c, kRowBytes);
    tile_load(1, c + kTileFloats, kRowBytes);
    if (Lower) tile_load(2, c + 2 * kTileFloats, kRowBytes);
    if (Lower) tile_load(3, c + 3 * kTileFloats, kRowBytes);
  } else {
    tile_zero(0);
    tile_zero(1);
    if (Lower) tile_zero(2);
    if (Lower) tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kStepHalves, w += kStepHalves) {
    tile_load(4, a, kRowBytes);
    tile_load(6, w, kRowBytes);
    tile_dot_bf16(0, 4, 6);
    fetch_to_l1<kTileRows>(w + kAheadW);
    tile_load(7, w + kTileHalves, kRowBytes);
    tile_dot_bf16(1, 4, 7);
    fetch_to_l1<kTileRows>(w + kAheadW + kTileHalves);
    if (Lower) {
      tile_load(5, a + kTileHalves, kRowBytes);
      tile_dot_bf16(2, 5, 6);
      tile_dot_bf16(3, 5, 7);
    }
    fetch_to_l2(next_a + s * kNextBytes);
    fetch_to_l2(next_c + s * kNextBytes);
  }
  tile_store(0, c, kRowBytes);
  tile_store(1, c + kTileFloats, kRowBytes);
  if (Lower) tile_store(2, c + 2 * kTileFloats, kRowBytes);
  if (Lower) tile_store(3, c + 3 * kTileFloats, kRowBytes);
}

template <bool Lower>
void multiply_as(const TileProduct& p) {
  for (int64_t strip = 0; strip < p.w_strips; ++strip) {
    const int64_t done = strip * p.steps;
    multiply_strips<Lower>(
        p.a, p.w + done * kStepHalves, p.c + strip * kBlockFloats, p.steps, p.add,
        static_cast<const char*>(p.next_a) + done * kNextBytes,
        static_cast<const char*>(p.next_c) + done * kNextBytes);
  }
}

void multiply(const TileProduct& p) {
  // The intrinsics do not name the memory that they read.
  __asm__ volatile("" : : : "memory");
  if (p.upper_only) multiply_as<false>(p);
  else multiply_as<true>(p);
}

void store_strip(const float* c, const Output& out) {
  for (int64_t m = 0; m < out.rows; ++m) {
    const float* row = c + m / kTileRows * 2 * kTileFloats + m % kTileRows * kTileRows;
    for (int64_t n = 0; n < out.cols; n += kLanes) {
      const int64_t tile = n / kLanes;
      const float* products = row + tile / 2 * kBlockFloats + tile % 2 * kTileFloats;
      store_lanes_of(load<f32x16>(products), out, m, n);
    }
  }
}

void configure() { tile_configure(); }
void release() { tile_release(); }

}  // namespace

namespace arc {

extern const TileKernels kAMXTiles;
const TileKernels kAMXTiles = {configure, release, decode_row, decode_panel, multiply, store_strip};

}  // namespace arc
