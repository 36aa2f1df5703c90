// Where block scales lie in the layout of 128x4 tiles that Blackwell's matrix units read: "swizzled"
// in arc_ao (PTX ISA, tcgen05 block scaling; CUTLASS Sm1xxBlockScaledConfig). Tiles are row-major.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ARC_SHARED __host__ __device__ __forceinline__
#else
#define ARC_SHARED inline
#endif

namespace arc {

constexpr int64_t kTileScaleRows = 128;
constexpr int64_t kTileScaleBlocks = 4;

ARC_SHARED int64_t padded_to(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Bytes of the scales of `rows` rows of `blocks` blocks, padding included.
ARC_SHARED int64_t swizzled_size(int64_t rows, int64_t blocks) {
  return padded_to(rows, kTileScaleRows) * padded_to(blocks, kTileScaleBlocks);
}

// Byte of block `block` of row `row`, out of `blocks` in a row.
ARC_SHARED int64_t swizzled_offset(int64_t row, int64_t block, int64_t blocks) {
  const int64_t tile = row / 128 * ((blocks + 3) / 4) + block / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}

}  // namespace arc
