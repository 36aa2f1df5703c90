// Tiles for compute capability 12.x (99 KiB of shared memory, no clusters). Built for sm_120f.
//
// Larger tiles (256x128x128) and the ping-pong schedule were tried with nvcc 13.0: with this epilogue
// both spill registers (64 and 116 bytes), so they are not here.
#include "gemm_kernel.cuh"

namespace arc {
namespace {

template <int M, int N, int K, class Scheduler_>
struct Tiles {
  using Arch = cutlass::arch::Sm120;
  using MmaTile = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<K>>;
  using CtaTile = MmaTile;
  using Cluster = cute::Shape<_1, _1, _1>;
  using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Scheduler = Scheduler_;
};

constexpr GemmConfig kConfigs[] = {
    Gemm<Tiles<128, 128, 128, void>>::config("128x128x128"),
    Gemm<Tiles<128, 128, 128, cutlass::gemm::StreamKScheduler>>::config("128x128x128 stream-K"),
};

}  // namespace

GemmFamily sm120_family() { return {120, kConfigs, int(sizeof(kConfigs) / sizeof(kConfigs[0]))}; }

}  // namespace arc
