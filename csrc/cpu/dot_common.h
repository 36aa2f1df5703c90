// What the dot products of every level share: unpacked activations and packed panels, in vector
// types, and the plain-code dot product that defines the others.
#pragma once

#include "quantize_rows.h"
#include "store_products.h"

namespace {

using arc::Activations;
using arc::kPanel;
using arc::kPanelBlockBytes;
using arc::Output;

constexpr float kValues[16] = {
    0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
// Twice the e2m1 value of each 4-bit code.
constexpr u8x16 kTwiceValues = {
    0, 1, 2, 3, 4, 6, 8, 12, 0, 0xFF, 0xFE, 0xFD, 0xFC, 0xFA, 0xF8, 0xF4};

// Sum of 16 signed bytes.
inline int32_t sum_of_bytes(u8x16 v) {
#if defined(__SSE2__)
  __m128i sums = _mm_sad_epu8(bits<__m128i>(v ^ 0x80), _mm_setzero_si128());  // of v + 128
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
#else
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += int8_t(v[i]);
  return sum;
#endif
}

// Blocks [first, a.blocks) of a row.
inline void unpack_blocks(
    const uint8_t* qdata, const uint8_t* scale, const Activations& a, int64_t row, int64_t first) {
  const u8x16 order = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
  int64_t at = a.at(row) + first * a.group_rows;
  for (int64_t b = first; b < a.blocks; ++b, at += a.group_rows) {
    uint8_t nibbles[16];
    u8x8 packed = load<u8x8>(qdata + b * arc::kBlockBytes);
    store(nibbles, packed & 0xF);
    store(nibbles + 8, packed >> 4);
    u8x16 index = __builtin_shuffle(load<u8x16>(nibbles), order);
    u8x16 twice = __builtin_shuffle(kTwiceValues, index);
    store(a.codes + at * kLanes, twice);
    a.offset[at] = -12 * sum_of_bytes(twice);
    a.scale[at] = e4m3_scalar(scale[b]) * 0.25f;
  }
}

[[maybe_unused]] void unpack_activations(
    const uint8_t* qdata, const uint8_t* scale, const Activations& a, int64_t row) {
  unpack_blocks(qdata, scale, a, row, 0);
}

void pack_panel(
    const uint8_t* qdata, const uint8_t* scale, int64_t qdata_stride, int64_t scale_stride,
    int64_t blocks, uint8_t* panel_codes, uint8_t* panel_scale) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t row = 0; row < kPanel; ++row) {
      const uint8_t* source = qdata + row * qdata_stride + b * arc::kBlockBytes;
      uint8_t* target = panel_codes + b * kPanelBlockBytes + row * 4;
      std::memcpy(target, source, 4);
      std::memcpy(target + 64, source + 4, 4);
      panel_scale[b * kPanel + row] = scale[row * scale_stride + b];
    }
  }
}

// Some rows against one panel, block by block in fp32. A block's dot product is an integer below
// 2^24, so it is exact.
inline void dot_some_rows(
    const Activations& a, int64_t first, int64_t rows, const uint8_t* panel_codes,
    const uint8_t* panel_scale, const int32_t* columns, float* out) {
  for (int64_t m = 0; m < rows; ++m) store(out + m * kPanel, f32x16{});
  for (int64_t j = 0; j < a.blocks; ++j) {
    const uint8_t* codes = panel_codes + columns[j] * kPanelBlockBytes;
    alignas(64) float values[kLanes][kPanel];  // in the order of Activations::codes
    alignas(64) float row_scales[kPanel];
    for (int row = 0; row < kPanel; ++row) {
      row_scales[row] = e4m3_scalar(panel_scale[columns[j] * kPanel + row]) * 2.0f;
      for (int i = 0; i < 8; ++i) {
        const uint8_t pair = codes[64 * (i / 4) + 4 * row + i % 4];
        values[i / 4 * 8 + i % 4][row] = kValues[pair & 0xF];
        values[i / 4 * 8 + 4 + i % 4][row] = kValues[pair >> 4];
      }
    }
    const f32x16 scales = load<f32x16>(row_scales);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t at = a.at(first + m) + j * a.group_rows;
      f32x16 sum = {};
      for (int k = 0; k < kLanes; ++k) {
        sum += load<f32x16>(values[k]) * splat(float(a.codes[at * kLanes + k]));
      }
      f32x16 total = load<f32x16>(out + m * kPanel) + sum * (scales * splat(a.scale[at]));
      store(out + m * kPanel, total);
    }
  }
}

[[maybe_unused]] void dot_panel_plain(
    const Activations& a, const uint8_t* panel_codes, const uint8_t* panel_scale,
    const int32_t* columns, const Output& out) {
  constexpr int64_t kRows = 32;  // decoding a block takes as long as four of them
  alignas(64) float products[kRows * kPanel];
  for (int64_t m = 0; m < out.rows; m += kRows) {
    const Output some = out.from(m, kRows);
    dot_some_rows(a, m, some.rows, panel_codes, panel_scale, columns, products);
    store_products(products, kPanel, some);
  }
}

}  // namespace
