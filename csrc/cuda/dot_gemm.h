#pragma once

#include "arc_ao_cuda.h"

namespace arc {

// Any m, n, dtypes and even number of blocks; null, or what the launch says.
const char* dot_gemm(const ArcGemm& g, void* stream);

// Tells this library's own CUDA runtime the device; null, or what the runtime says.
const char* use_device(int device);

}  // namespace arc
