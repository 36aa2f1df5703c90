// The product for few rows, where tiles of 128 rows would be mostly padding: a warp goes over two
// rows of the weight and reads every byte of them once. It takes any size and any dtypes, so it also
// serves what the tiled kernels do not (fp32 output, a bias of another dtype, N no multiple of 8).
#include <cuda_runtime.h>

#include "dot_gemm.h"
#include "dot_rows.h"

namespace arc {
namespace {

constexpr int kWarps = 4;
constexpr int kCols = 2;
constexpr int kBlocksAtOnce = 3;  // on a multiprocessor: 168 registers for a thread, none spilled

template <int kRows>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kBlocksAtOnce) dot_columns(const ArcGemm g) {
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int64_t n = (int64_t(blockIdx.x) * kWarps + warp) * kCols;
  if (n >= g.n) return;
  for (int64_t m = int64_t(blockIdx.y) * kRows; m < g.m; m += int64_t(gridDim.y) * kRows) {
    float sums[kRows][kCols] = {};
    dot_lane<kRows, kCols>(g, m, n, lane, sums);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        float sum = sums[i][j];
        for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
          sum = add(sum, __shfl_xor_sync(~0u, sum, distance));
        }
        if (lane == 0 && m + i < g.m && n + j < g.n) store_output(g, m + i, n + j, sum);
      }
    }
  }
}

template <int kRows>
void launch(const ArcGemm& g, cudaStream_t stream) {
  constexpr int64_t kMaxGridRows = 65535;
  const int64_t row_groups = (g.m + kRows - 1) / kRows;
  const dim3 grid(
      unsigned((g.n + kWarps * kCols - 1) / (kWarps * kCols)),
      unsigned(row_groups < kMaxGridRows ? row_groups : kMaxGridRows));
  dot_columns<kRows><<<grid, kWarps * kWarpLanes, 0, stream>>>(g);
}

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* dot_gemm(const ArcGemm& g, void* stream) {
  const cudaStream_t on = cudaStream_t(stream);
  if (g.m == 1) launch<1>(g, on);
  else if (g.m == 2) launch<2>(g, on);
  else if (g.m <= 4) launch<4>(g, on);
  else launch<8>(g, on);
  return text_of(cudaGetLastError());
}

const char* use_device(int device) { return text_of(cudaSetDevice(device)); }

}  // namespace arc
