// arc::quant_augment and the fused producers: one thread block per row, each thread whole blocks of
// 16 channels, so that no value crosses threads but the row's largest magnitude (and, of the norms,
// its sum of squares). The row is read once for them and once more, from cache, to be quantized.
#include <cuda_runtime.h>

#include <string>

#include "message.h"
#include "quantize_rows.h"

namespace arc {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kBlocksAtOnce = 3;  // on a multiprocessor: 80 registers for a thread, and none spilled
constexpr int64_t kMaxBaseBlocks = 40 << 10;  // a byte of shared memory each

struct Larger {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return largest(a, b); }
};

struct Plus {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Of one value per thread, for all threads of the block.
template <class T, class Combine>
__device__ T across_block(T mine, Combine combine) {
  __shared__ T parts[kMaxThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    mine = combine(mine, __shfl_xor_sync(~0u, mine, distance));
  }
  __syncthreads();  // the parts of a call before this one have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = mine;
  __syncthreads();
  T all = parts[0];
  for (int warp = 1; warp < blockDim.x / kWarp; ++warp) all = combine(all, parts[warp]);
  return all;
}

template <int kProducer>
__device__ Row<kProducer> prepare(const ArcQuantize& q, Lane lane) {
  Row<kProducer> row{q, int64_t(blockIdx.x)};
  if (kProducer == ARC_RMS_NORM || kProducer == ARC_ADD_RMS_NORM) {
    const double sum = across_block(sum_of_squares(row, lane), Plus{});
    row.inverse_rms = inverse_rms(sum, q.channels, q.eps);
  }
  return row;
}

// Largest magnitude of the whole tensor, for one outer scale.
template <int kProducer>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce) largest_of_rows(const ArcQuantize q) {
  const Lane lane{threadIdx.x, blockDim.x};
  const Row<kProducer> row = prepare<kProducer>(q, lane);
  const uint32_t amax = across_block(amax_bits(row, lane), Larger{});
  if (threadIdx.x == 0) atomicMax(q.amax, amax);
}

template <int kProducer>
__device__ Outer outer_of_row(const Row<kProducer>& row, Lane lane) {
  const ArcQuantize& q = row.q;
  if (q.scale_mode == ARC_SCALE_STATIC) return given_outer(*q.outer_scale);
  if (q.scale_mode == ARC_SCALE_TENSOR) return outer_of(*q.amax);
  return outer_of(across_block(amax_bits(row, lane), Larger{}));
}

template <int kProducer>
__global__ void __launch_bounds__(kMaxThreads, kBlocksAtOnce) quantize_rows(const ArcQuantize q) {
  extern __shared__ uint8_t scales[];  // [base blocks]
  const Lane lane{threadIdx.x, blockDim.x};
  if (q.swizzled) pad_scales(q, blockIdx.x, lane);
  if (blockIdx.x >= q.rows) return;
  const Row<kProducer> row = prepare<kProducer>(q, lane);
  const Outer outer = outer_of_row(row, lane);
  const bool per_row = q.scale_mode == ARC_SCALE_TOKEN;
  if (threadIdx.x == 0 && (per_row || blockIdx.x == 0)) q.outer[per_row ? row.row : 0] = outer.outer;
  quantize_base(row, outer.inverse, lane, scales);
  __syncthreads();
  quantize_extra(row, outer.inverse, lane, scales);
}

template <int kProducer>
cudaError_t launch(const ArcQuantize& q, cudaStream_t stream) {
  const int64_t blocks = base_blocks(q);
  const int threads = int(padded_to(blocks < kMaxThreads ? blocks : kMaxThreads, kWarp));
  if (q.scale_mode == ARC_SCALE_TENSOR) {
    largest_of_rows<kProducer><<<unsigned(q.rows), threads, 0, stream>>>(q);
  }
  const int64_t grid = q.swizzled ? padded_to(q.rows, kTileScaleRows) : q.rows;
  quantize_rows<kProducer><<<unsigned(grid), threads, size_t(blocks), stream>>>(q);
  return cudaGetLastError();
}

const char* refusal(const ArcQuantize& q) {
  constexpr int64_t kMaxRows = 0x7FFFFF80;
  const auto inside = [](int value, int last) { return value >= 0 && value <= last; };
  if (!inside(q.number, 2) || !inside(q.producer, ARC_TANH_GELU) || !inside(q.scale_mode, 2)) {
    return message("quantize: number, producer or scale_mode out of range");
  }
  if (q.rows < 1 || q.rows > kMaxRows) {
    return message("quantize: expected 1 to 2147483520 rows, got " + std::to_string(q.rows));
  }
  if (q.channels < 1 || base_blocks(q) > kMaxBaseBlocks) {
    return message(
        "quantize: expected 1 to " + std::to_string(kMaxBaseBlocks * kBlockSize) +
        " channels, got " + std::to_string(q.channels));
  }
  if (q.num_act_channels % kBlockSize) {
    return message(
        "quantize: act_channels must hold a multiple of 16 channels, got " +
        std::to_string(q.num_act_channels));
  }
  return nullptr;
}

}  // namespace
}  // namespace arc

const char* arc_ao_cuda_quantize(const ArcQuantize* q, int32_t device, void* stream) {
  if (const char* refused = arc::refusal(*q)) return refused;
  constexpr cudaError_t (*kLaunch[])(const ArcQuantize&, cudaStream_t) = {
      arc::launch<ARC_PLAIN>, arc::launch<ARC_RMS_NORM>, arc::launch<ARC_ADD_RMS_NORM>,
      arc::launch<ARC_SILU_MUL>, arc::launch<ARC_GELU>, arc::launch<ARC_TANH_GELU>};
  // This library has a CUDA runtime of its own, which must learn the device, too.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = kLaunch[q->producer](*q, cudaStream_t(stream));
  return error == cudaSuccess ? nullptr
                              : arc::message(std::string("quantize: ") + cudaGetErrorString(error));
}
