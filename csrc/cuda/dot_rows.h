// Products of a few rows: sums over blocks of 16 channels, each exact, scaled and added in fp32.
// Device and host take the same steps; the order of the fp32 additions is fixed.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "arc_ao_cuda.h"
#include "numerics.h"

namespace arc {

constexpr int kWarpLanes = 32;
constexpr int kChunkBlocks = 2;  // 16 bytes of codes, what a lane loads at a time

// The 16 values of a block. Products of e2m1 values are multiples of 1/4 of at most 36, so a sum of
// 8 of them, 1152 quarters at most, is exact even in fp16.
struct Values {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  __half2 pairs[8];
#else
  float lanes[kBlockSize];
#endif
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__device__ __forceinline__ void decode_word(uint32_t codes, __half2 out[4]) {
  uint32_t raw[4];  // each instruction takes a byte to a pair of fp16
  asm("{ .reg .b8 b0, b1, b2, b3; mov.b32 {b0, b1, b2, b3}, %4; cvt.rn.f16x2.e2m1x2 %0, b0; "
      "cvt.rn.f16x2.e2m1x2 %1, b1; cvt.rn.f16x2.e2m1x2 %2, b2; cvt.rn.f16x2.e2m1x2 %3, b3; }"
      : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3])
      : "r"(codes));
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_as<__half2>(raw[i]);
}

__device__ __forceinline__ Values decode_values(uint64_t codes) {
  Values out;
  decode_word(uint32_t(codes), out.pairs);
  decode_word(uint32_t(codes >> 32), out.pairs + 4);
  return out;
}

__device__ __forceinline__ float dot(const Values& a, const Values& b) {
  __half2 sum = __hmul2(a.pairs[0], b.pairs[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) sum = __hfma2(a.pairs[i], b.pairs[i], sum);
  return __low2float(sum) + __high2float(sum);
}
#else
ARC_SHARED Values decode_values(uint64_t codes) {
  Values out;
  for (int i = 0; i < kBlockSize; ++i) out.lanes[i] = e2m1_value(uint32_t(codes >> 4 * i) & 15);
  return out;
}

ARC_SHARED float dot(const Values& a, const Values& b) {
  float sum = 0.0f;
  for (int i = 0; i < kBlockSize; ++i) sum += a.lanes[i] * b.lanes[i];
  return sum;
}
#endif

// 16 bytes of codes: two blocks.
struct alignas(16) Chunk {
  uint64_t blocks[kChunkBlocks];
};

ARC_SHARED Chunk chunk_at(const uint8_t* codes, int64_t row, int64_t chunk, int64_t blocks) {
#if defined(__CUDA_ARCH__)
  const auto* p = reinterpret_cast<const ulonglong2*>(codes) + row * (blocks / 2) + chunk;
  const ulonglong2 v = __ldg(p);
  return {{v.x, v.y}};
#else
  return reinterpret_cast<const Chunk*>(codes)[row * (blocks / 2) + chunk];
#endif
}

// sum += product; the product is exact (20 bits), so one rounding or two are the same.
ARC_SHARED float accumulate(float sum, float block, float scales) {
  return add(sum, mul(block, scales));
}

// One lane's part of rows [m, m + kRows) times columns [n, n + kCols); those outside are skipped.
template <int kRows, int kCols>
ARC_SHARED void dot_lane(
    const ArcGemm& g, int64_t m, int64_t n, int lane, float sums[kRows][kCols]) {
  for (int64_t c = lane; c < g.blocks / kChunkBlocks; c += kWarpLanes) {
    Values b[kCols][kChunkBlocks];
    float b_scale[kCols][kChunkBlocks];
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const int64_t col = n + j < g.n ? n + j : g.n - 1;
      const Chunk chunk = chunk_at(g.b, col, c, g.blocks);
#pragma unroll
      for (int h = 0; h < kChunkBlocks; ++h) {
        b[j][h] = decode_values(chunk.blocks[h]);
        b_scale[j][h] =
            e4m3_value(g.b_scale[swizzled_offset(col, c * kChunkBlocks + h, g.blocks)]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (m + i >= g.m) break;
      const Chunk chunk = chunk_at(g.a, m + i, c, g.blocks);
#pragma unroll
      for (int h = 0; h < kChunkBlocks; ++h) {
        const Values a = decode_values(chunk.blocks[h]);
        const float a_scale =
            e4m3_value(g.a_scale[swizzled_offset(m + i, c * kChunkBlocks + h, g.blocks)]);
#pragma unroll
        for (int j = 0; j < kCols; ++j) {
          sums[i][j] = accumulate(sums[i][j], dot(a, b[j][h]), mul(a_scale, b_scale[j][h]));
        }
      }
    }
  }
}

ARC_SHARED void store_output(const ArcGemm& g, int64_t m, int64_t n, float sum) {
  float v = finish(sum, g.a_outer[g.a_outer_per_row ? m : 0], *g.b_outer);
  if (g.bias) v = add(v, load_number(g.bias, n, Number(g.bias_number)));
  store_number(g.y, m * g.n + n, v, Number(g.y_number));
}

}  // namespace arc
