// What NVIDIA's own headers say, on the host: CUTLASS's layout of block scales, its reference
// block-scaled product, and the conversions of CUTLASS and of the CUDA toolkit.
#include <cstdint>
#include <cstring>

#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/numeric_conversion.h"
#include "cutlass/numeric_types.h"
#include "cutlass/util/packed_stride.hpp"
#include "cutlass/util/reference/host/gett.hpp"

namespace {

using Config = cutlass::detail::Sm1xxBlockScaledConfig<16>;
using Code = cutlass::float_e2m1_t;
using Scale = cutlass::float_ue4m3_t;
using Stride = cutlass::gemm::TagToStrideA_t<cutlass::layout::RowMajor>;

auto matrix(int rows, int cols) {
  auto stride = cutlass::make_cute_packed_stride(Stride{}, cute::make_shape(rows, cols, 1));
  return cute::make_layout(cute::make_shape(rows, cols, 1), stride);
}

template <class To>
uint8_t converted(float v) {
  return cutlass::NumericConverter<To, float, cutlass::FloatRoundStyle::round_to_nearest>::convert(v)
      .raw();
}

}  // namespace

extern "C" {

// Byte of the scale of block b of row r of A [m, k] (of B [n, k]): out[r * k / 16 + b].
void cutlass_offsets_a(int m, int n, int k, int64_t* out) {
  const auto layout = Config::tile_atom_to_shape_SFA(cute::make_shape(m, n, k, 1));
  for (int r = 0; r < m; ++r) {
    for (int b = 0; b < k / 16; ++b) *out++ = layout(cute::make_coord(r, 16 * b, 0));
  }
}

void cutlass_offsets_b(int m, int n, int k, int64_t* out) {
  const auto layout = Config::tile_atom_to_shape_SFB(cute::make_shape(m, n, k, 1));
  for (int r = 0; r < n; ++r) {
    for (int b = 0; b < k / 16; ++b) *out++ = layout(cute::make_coord(r, 16 * b, 0));
  }
}

// d [m, n] = a b^T in fp32, codes packed two a byte, scales in CUTLASS's layout.
void cutlass_gemm(
    int m, int n, int k, const void* a, const void* a_scale, const void* b, const void* b_scale,
    float* d) {
  const auto shape = cute::make_shape(m, n, k, 1);
  auto codes = [](const void* p, auto layout) {
    return cute::make_tensor(cute::recast_ptr<Code>(const_cast<void*>(p)), layout);
  };
  auto scales = [](const void* p, auto layout) {
    return cute::make_tensor(static_cast<Scale*>(const_cast<void*>(p)), layout);
  };
  auto A = codes(a, matrix(m, k));
  auto SfA = scales(a_scale, Config::tile_atom_to_shape_SFA(shape));
  auto B = codes(b, matrix(n, k));
  auto SfB = scales(b_scale, Config::tile_atom_to_shape_SFB(shape));
  auto C = cute::make_tensor(d, matrix(m, n));
  cutlass::reference::host::GettBlockScalingMainloopParams<
      float, decltype(A), decltype(SfA), decltype(B), decltype(SfB)>
      mainloop{A, SfA, B, SfB};
  cutlass::reference::host::GettBlockScalingEpilogueParams<
      float, float, float, decltype(C), decltype(C)>
      epilogue{1.0f, 0.0f, C, C};
  cutlass::reference::host::Gemm3x(mainloop, epilogue);
}

void cutlass_e2m1(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = converted<cutlass::float_e2m1_t>(v[i]);
}

void cutlass_e4m3(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = converted<cutlass::float_e4m3_t>(v[i]);
}

void cuda_e2m1(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = __nv_cvt_float_to_fp4(v[i], __NV_E2M1, cudaRoundNearest);
  }
}

void cuda_e4m3(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = __nv_cvt_float_to_fp8(v[i], __NV_SATFINITE, __NV_E4M3);
  }
}
}
