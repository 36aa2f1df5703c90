// CUTLASS block-scaled NVFP4 GEMM with arc_ao's epilogue, for any architecture family:
//
//   y[m, n] = round((sum_k A[m, k] B[n, k]) * a_outer[m] * b_outer + bias[n])
//
// One kernel serves bf16 and fp16: the epilogue's last step rounds to the type that it is told at
// run time, and its 16 bits travel as bfloat16_t to the store.
#pragma once

#include "cutlass/cutlass.h"

#include "cute/tensor.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler_params.h"
#include "cutlass/util/packed_stride.hpp"

#include "gemm_table.h"
#include "numerics.h"

namespace arc {

using cute::_0;
using cute::_1;
using Bits16 = cutlass::bfloat16_t;  // of bf16 or fp16, whichever the product is in
using Fp4 = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
constexpr int kOperandAlignment = 32;  // elements in 16 bytes
constexpr int kOutputAlignment = 8;

// Node of the epilogue tree: (sum, a_outer, bias) -> rounded output.
struct Finish : cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  struct Arguments {
    const float* b_outer = nullptr;
    Number number = Number::kBFloat16;
    bool has_bias = false;
  };
  using Params = Arguments;

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(
      const Shape&, const Arguments&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Finish() {}
  CUTLASS_HOST_DEVICE Finish(const Params& params, const SharedStorage&) : params(params) {}

  Params params;

  struct ConsumerStoreCallbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE ConsumerStoreCallbacks(float b_outer, Number number, bool has_bias)
        : b_outer(b_outer), number(number), has_bias(has_bias) {}

    float b_outer;
    Number number;
    bool has_bias;

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<Bits16, kSize> visit(
        const cutlass::Array<Accumulator, kSize>&, int, int, int,
        const cutlass::Array<float, kSize>& sum, const cutlass::Array<float, kSize>& a_outer,
        const cutlass::Array<Bits16, kSize>& bias) {
      cutlass::Array<Bits16, kSize> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        float v = finish(sum[i], a_outer[i], b_outer);
        if (has_bias) v = add(v, widen(Bits16(bias[i]).raw(), number));
        out[i] = Bits16::bitcast(narrow(v, number));
      }
      return out;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>&) {
    return ConsumerStoreCallbacks(*params.b_outer, params.number, params.has_bias);
  }
};

// `Kind` has: Arch, MmaTile, CtaTile, Cluster, MainloopSchedule, EpilogueSchedule, Scheduler.
template <class Kind>
struct Gemm {
  // Stride<bool, ...>: one number per row, or the same for all.
  using RowOuter = cutlass::epilogue::fusion::Sm90ColBroadcast<
      0, typename Kind::CtaTile, float, float, cute::Stride<bool, _0, int64_t>, 1>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<
      0, typename Kind::CtaTile, Bits16, Bits16, cute::Stride<_0, _1, int64_t>, kOutputAlignment>;
  using Epilogue = cutlass::epilogue::fusion::Sm90EVT<
      Finish, cutlass::epilogue::fusion::Sm90AccFetch, RowOuter, Bias>;

  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Kind::Arch, cutlass::arch::OpClassBlockScaledTensorOp, typename Kind::MmaTile,
      typename Kind::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      cutlass::layout::RowMajor, kOutputAlignment, Bits16, cutlass::layout::RowMajor,
      kOutputAlignment, typename Kind::EpilogueSchedule, Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Kind::Arch, cutlass::arch::OpClassBlockScaledTensorOp, Fp4,
      cutlass::layout::RowMajor, kOperandAlignment, Fp4, cutlass::layout::ColumnMajor,
      kOperandAlignment, float, typename Kind::MmaTile, typename Kind::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Kind::MainloopSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue,
      typename Kind::Scheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Scales = typename Kernel::CollectiveMainloop::Sm1xxBlkScaledConfig;

  static typename Device::Arguments arguments(const ArcGemm& g, Hardware hardware) {
    const int m = int(g.m), n = int(g.n), k = int(g.blocks * kBlockSize);
    const auto shape = cute::make_shape(m, n, k, 1);
    const auto packed = [](auto stride, int rows, int cols) {
      return cutlass::make_cute_packed_stride(stride, cute::make_shape(rows, cols, 1));
    };
    const auto codes = [](const uint8_t* p) {
      return reinterpret_cast<const typename Fp4::DataType*>(p);
    };
    const auto scales = [](const uint8_t* p) {
      return reinterpret_cast<const typename Fp4::ScaleFactorType*>(p);
    };
    typename Epilogue::Arguments epilogue{
        {},
        {g.a_outer, 0.0f, {g.a_outer_per_row != 0, _0{}, 0}},
        {static_cast<const Bits16*>(g.bias), Bits16(0), {}},
        {g.b_outer, Number(g.y_number), g.bias != nullptr}};
    typename Device::Arguments out{
        cutlass::gemm::GemmUniversalMode::kGemm,
        shape,
        {codes(g.a), packed(typename Kernel::StrideA{}, m, k), codes(g.b),
         packed(typename Kernel::StrideB{}, n, k), scales(g.a_scale),
         Scales::tile_atom_to_shape_SFA(shape), scales(g.b_scale),
         Scales::tile_atom_to_shape_SFB(shape)},
        {epilogue, nullptr, {}, static_cast<Bits16*>(g.y),
         packed(typename Kernel::StrideD{}, m, n)}};
    out.hw_info.device_id = hardware.device;
    out.hw_info.sm_count = hardware.sm_count;
    out.hw_info.cluster_shape = dim3(
        cute::size<0>(typename Kind::Cluster{}), cute::size<1>(typename Kind::Cluster{}), 1);
    out.hw_info.cluster_shape_fallback = out.hw_info.cluster_shape;
    return out;
  }

  static const char* can_implement(const ArcGemm& g) {
    return message(Device::can_implement(arguments(g, {0, 1})));
  }

  static int64_t workspace(const ArcGemm& g, Hardware hardware) {
    return int64_t(Device::get_workspace_size(arguments(g, hardware)));
  }

  static const char* run(const ArcGemm& g, Hardware hardware, void* workspace, void* stream) {
    Device device;
    return message(device.run(arguments(g, hardware), workspace, cudaStream_t(stream)));
  }

  static const char* message(cutlass::Status status) {
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }

  static constexpr GemmConfig config(const char* name) {
    return {name, int(cute::size<0>(typename Kind::MmaTile{})),
            int(cute::size<1>(typename Kind::MmaTile{})),
            int(cute::size<2>(typename Kind::MmaTile{})), can_implement, workspace, run};
  }
};

}  // namespace arc
