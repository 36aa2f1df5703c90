// y[m, n] = (sum_k A_aug[m, k] W_aug[n, k]) * a_outer[m] * b_outer + bias[n]. The meaning is
// arc_ao/ops/nvfp4_gemm.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arc {

struct Gemm {
  int64_t rows, cols;            // M, N
  int64_t a_blocks, b_blocks;    // K_aug / 16 > 0, K_b / 16
  const uint8_t *a, *a_scale;    // [M, a_blocks * 8], [M, a_blocks]
  const uint8_t *b, *b_scale;    // [N, b_blocks * 8], [N, b_blocks], plain or in panels of 16 rows
  bool b_in_panels;
  const float *a_outer, *b_outer;
  bool a_outer_per_row;
  const void* bias;  // of bias_dtype, or null
  DType bias_dtype;
  const int32_t* act_blocks;  // base blocks of b that are read a second time
  int64_t num_act_blocks, base_blocks;
  void* y;  // [M, N] of y_dtype
  DType y_dtype;
};

void nvfp4_gemm(const Gemm& g);

}  // namespace arc
