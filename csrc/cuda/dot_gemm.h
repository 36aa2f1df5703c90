#pragma once

#include "arc_ao_cuda.h"

namespace arc {

// Any m, n, dtypes and even number of blocks; null, or what the launch says.
const char* dot_gemm(const ArcGemm& g, void* stream);

}  // namespace arc
