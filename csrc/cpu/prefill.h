// nvfp4_gemm for many rows, on a level with tile registers.
#pragma once

#include "nvfp4_gemm.h"

namespace arc {

// From how many rows on. Decoding the weights to bf16 takes the time of the dot products of 7 rows
// (measured), half a strip of 32 rows on the tiles that of about 4 (expected, to be measured). On
// either side of the threshold fp32 sums run in another order, so a row's bits differ.
#ifdef ARC_AO_EMULATE_AMX
constexpr int64_t kPrefillRows = 1;  // tests reach every number of rows
#else
constexpr int64_t kPrefillRows = 10;
#endif

// columns [a_blocks]: the block of b that each block of a meets; bias [cols] or null.
void prefill(const TileKernels& tiles, const Gemm& g, const int32_t* columns, const float* bias);

}  // namespace arc
