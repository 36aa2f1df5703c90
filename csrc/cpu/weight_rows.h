// Block scales of weights and their codes under them, in vector types: included by every dispatch
// level. Step by step the same as arc_ao/ops/search_block_scales.py and encode_blocks.py.
#pragma once

#include "quantize_rows.h"

namespace {

// One block of up to 16 rows: a row in every lane, so that they share the importance of a channel.
template <class Weigh>
inline void search_block(
    const float* values, int64_t rows, int64_t row_blocks, const Weigh& weigh, uint8_t* scale) {
  Columns columns;
  columns.fill(values, row_blocks * kLanes, splat(1.0f), rows);
  BlockScales scales;
  make_scales(columns.largest(), kSixth, scales);
  search_codes(columns, kNeighbours, weigh, scales);
  for (int64_t r = 0; r < rows; ++r) scale[r * row_blocks] = uint8_t(scales.code[r]);
}

void search_weight_rows(
    const float* values, int64_t rows, int64_t blocks, int64_t row_blocks,
    const float* importance, uint8_t* scale) {
  for (int64_t b = 0; b < blocks; ++b, values += kLanes, ++scale) {
    if (importance) {
      search_block(values, rows, row_blocks, WeighedChannels{importance + b * kLanes}, scale);
    } else {
      search_block(values, rows, row_blocks, EqualChannels{}, scale);
    }
  }
}

// step(block, values, scales, index of its scale) for every block of a row.
template <class Step>
inline void for_blocks(const float* values, const uint8_t* scale, int64_t blocks, Step step) {
  for (int64_t first = 0; first < blocks; first += kScalesAtOnce) {
    const int64_t count = blocks - first < kScalesAtOnce ? blocks - first : kScalesAtOnce;
    uint8_t codes[kScalesAtOnce] = {};
    std::memcpy(codes, scale + first, count);
    BlockScales scales;
    fill_scales(widen(load<u8x16>(codes)), scales);
    for (int64_t b = 0; b < count; ++b) {
      step(first + b, load<f32x16>(values + (first + b) * kLanes), scales, b);
    }
  }
}

void encode_row(const float* values, const uint8_t* scale, int64_t blocks, uint8_t* qdata) {
  for_blocks(values, scale, blocks, [&](int64_t block, f32x16 v, const BlockScales& s, int64_t b) {
    store(qdata + block * arc::kBlockBytes, pack_codes(e2m1_codes(v * splat(s.reciprocal[b]))));
  });
}

void residual_row(const float* values, const uint8_t* scale, int64_t blocks, float* residual) {
  for_blocks(values, scale, blocks, [&](int64_t block, f32x16 v, const BlockScales& s, int64_t b) {
    f32x16 rest;
    encode_block(v, s, b, rest);
    store(residual + block * kLanes, rest);
  });
}

}  // namespace
