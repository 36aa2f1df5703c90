// The product by int8 dot products over packed panels.
#pragma once

#include "nvfp4_gemm.h"

namespace arc {

// columns [a_blocks]: the stored block of W that each block of A meets; bias: fp32 [cols], in whole
// vectors of 16, or null.
void dot_gemm(const Gemm& g, const int32_t* columns, const float* bias);

}  // namespace arc
