// Rows to augmented NVFP4 rows: A_aug = [ Q(x) | Q(R)[act_blocks] | Q'(R[act_channels]) |
// Q(x)[weight_blocks] ], R = x - Q(x). The meaning is arc_ao/ops/quant_augment.py.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace arc {

enum class ScaleMode { kToken, kTensor, kStatic };

struct Ids {
  const int32_t* data = nullptr;
  int64_t size = 0;
};

struct Augmentation {
  int64_t channels = 0;  // K
  Ids act_blocks, weight_blocks, channel_order, act_channels;
  const float* outer_scale = nullptr;  // kStatic only
  ScaleMode mode = ScaleMode::kToken;
  BlockScale block_scale = BlockScale::kAmax;

  int64_t base_blocks() const { return (channels + kBlock - 1) / kBlock; }
  int64_t residual_blocks() const { return act_blocks.size + act_channels.size / kBlock; }
  int64_t all_blocks() const { return base_blocks() + residual_blocks() + weight_blocks.size; }
};

struct Quantized {
  uint8_t* qdata;  // [rows, all_blocks * 8]
  uint8_t* scale;  // [rows, all_blocks]
  float* outer;    // [rows] for kToken, else [1]
};

// Writes row m as fp32 into out [base_blocks * 16], zeros behind the channels, and returns the bits
// of its largest magnitude. Called twice per row in mode kTensor.
using RowProducer = std::function<int32_t(int64_t m, float* out)>;

void quant_augment(
    const RowProducer& produce, int64_t rows, const Augmentation& how, const Quantized& out);

}  // namespace arc
