// Columns of a weight rounded one after the other with error feedback (GPTQ), in vector types:
// included by every dispatch level. Step by step the same as arc_ao/ops/round_columns.py.
#pragma once

#include "quantize_rows.h"

namespace {

// Up to kTileWeightRows rows of one column, zeros behind them.
struct RowTile {
  alignas(64) float lane[arc::kTileWeightRows] = {};

  void read(const float* from, int64_t count) { std::memcpy(lane, from, count * sizeof(float)); }
  f32x16 vector(int64_t v) const { return load<f32x16>(lane + v * kLanes); }
};

// What a column's values become under the scales of its blocks.
struct RoundedLanes {
  i32x16 codes, fine_codes;
  f32x16 value;
};

inline RoundedLanes round_lanes(f32x16 v, f32x16 scale, const f32x16* fine) {
  RoundedLanes rounded;
  rounded.codes = e2m1_codes(v * (splat(1.0f) / scale));
  rounded.value = e2m1_values(rounded.codes) * scale;
  if (fine) {
    rounded.fine_codes = e2m1_codes((v - rounded.value) * (splat(1.0f) / *fine));
    rounded.value = rounded.value + e2m1_values(rounded.fine_codes) * *fine;
  }
  return rounded;
}

// One column of a tile: what it reads, and where its codes and what is fed back go.
struct ColumnStep {
  RowTile value, feedback, scale, fine;
  alignas(64) float error[arc::kTileWeightRows];
  alignas(16) uint8_t codes[arc::kTileWeightRows], fine_codes[arc::kTileWeightRows];
  bool has_fine;

  f32x16 round(int64_t v, f32x16 values) {
    const f32x16 under = fine.vector(v);
    const RoundedLanes rounded = round_lanes(values, scale.vector(v), has_fine ? &under : nullptr);
    store(codes + v * kLanes, low_bytes(rounded.codes));
    if (has_fine) store(fine_codes + v * kLanes, low_bytes(rounded.fine_codes));
    return rounded.value;
  }

  // Rows do not know of each other.
  void alone(float inverse) {
    for (int64_t v = 0; v < arc::kTileWeightRows / kLanes; ++v) {
      const f32x16 w = value.vector(v);
      const f32x16 rounded = round(v, w + feedback.vector(v) * splat(inverse));
      store(error + v * kLanes, w - rounded);
    }
  }

  // Row after row; the error of each goes through its row of `outputs` [64, 64] to those below.
  void together(float inverse, const float* outputs, int64_t count) {
    alignas(64) float passed[arc::kTileWeightRows] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* row = outputs + i * arc::kTileWeightRows;
      const float w = value.lane[i];
      const float wanted = w + (feedback.lane[i] * inverse + passed[i]) / row[i];
      const f32x16 under = splat(fine.lane[i]);
      const RoundedLanes rounded =
          round_lanes(splat(wanted), splat(scale.lane[i]), has_fine ? &under : nullptr);
      codes[i] = uint8_t(rounded.codes[0]);
      if (has_fine) fine_codes[i] = uint8_t(rounded.fine_codes[0]);
      const f32x16 left = splat(w - rounded.value[0]);
      for (int64_t v = i / kLanes; v < arc::kTileWeightRows / kLanes; ++v) {
        f32x16 sum = load<f32x16>(passed + v * kLanes);
        store(passed + v * kLanes, sum + load<f32x16>(row + v * kLanes) * left);
      }
    }
    std::memcpy(error, passed, sizeof(error));
  }
};

void round_columns(const arc::ColumnGroup& group) {
  const int64_t n = group.count, vectors = arc::kTileWeightRows / kLanes;
  const auto at = [&](const auto* data, int64_t column) {
    return data + column * group.rows + group.first;
  };
  float* feedback = group.scratch;
  std::memset(feedback, 0, group.columns * arc::kTileWeightRows * sizeof(float));
  for (int64_t c = 0; c < group.columns; ++c) {
    std::memcpy(feedback + c * arc::kTileWeightRows, at(group.feedback, c), n * sizeof(float));
  }
  ColumnStep step;
  step.has_fine = group.fine != nullptr;
  for (int64_t c = group.columns - 1; c >= 0; --c) {
    const float* lower = group.lower + c * group.columns;
    const float inverse = 1.0f / lower[c];
    step.value.read(at(group.values, c), n);
    step.scale.read(at(group.scale, c), n);
    if (step.has_fine) step.fine.read(at(group.fine, c), n);
    step.feedback.read(feedback + c * arc::kTileWeightRows, n);
    if (group.outputs) {
      step.together(inverse, group.outputs, n);
    } else {
      step.alone(inverse);
    }
    for (int64_t j = 0; j < c; ++j) {
      float* sums = feedback + j * arc::kTileWeightRows;
      for (int64_t v = 0; v < vectors; ++v) {
        const f32x16 error = load<f32x16>(step.error + v * kLanes) * splat(lower[j]);
        store(sums + v * kLanes, load<f32x16>(sums + v * kLanes) + error);
      }
    }
    std::memcpy(group.codes + c * group.rows + group.first, step.codes, n);
    std::memcpy(
        group.errors + c * group.rows + group.first, step.error, n * sizeof(float));
    if (step.has_fine) {
      std::memcpy(group.fine_codes + c * group.rows + group.first, step.fine_codes, n);
    }
  }
}

}  // namespace
