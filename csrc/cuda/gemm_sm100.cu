// Tiles for compute capability 10.x (tensor memory, clusters of two). Built for sm_100f.
#include "gemm_kernel.cuh"

namespace arc {
namespace {

// A tile of 256 rows is shared by a cluster of two multiprocessors.
template <int M, int N, int K, class Scheduler_>
struct Tiles {
  static constexpr bool kPair = M == 256;
  using Arch = cutlass::arch::Sm100;
  using MmaTile = cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<K>>;
  using CtaTile = cute::Shape<cute::Int<kPair ? M / 2 : M>, cute::Int<N>, cute::Int<K>>;
  using Cluster = cute::Shape<cute::Int<kPair ? 2 : 1>, _1, _1>;
  using MainloopSchedule = cute::conditional_t<
      kPair, cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100,
      cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100>;
  using EpilogueSchedule = cute::conditional_t<
      kPair, cutlass::epilogue::TmaWarpSpecialized2Sm, cutlass::epilogue::TmaWarpSpecialized1Sm>;
  using Scheduler = Scheduler_;
};

constexpr GemmConfig kConfigs[] = {
    Gemm<Tiles<256, 256, 256, void>>::config("256x256x256 pair"),
    Gemm<Tiles<128, 128, 256, void>>::config("128x128x256"),
    Gemm<Tiles<128, 64, 256, cutlass::gemm::StreamKScheduler>>::config("128x64x256 stream-K"),
};

}  // namespace

GemmFamily sm100_family() { return {100, kConfigs, int(sizeof(kConfigs) / sizeof(kConfigs[0]))}; }

}  // namespace arc
