// Operands in the layout that Blackwell reads, and back: the meaning is in arc_ao/ops/layout.py. No
// CPU kernel works in it; weights that were stored for a GPU still run here.
#pragma once

#include <cstring>

#include "../scale_layout.h"
#include "kernels.h"

namespace arc {

// Rows of `blocks` blocks of codes to rows of `padded` blocks, zeros behind.
inline void pad_rows(
    const uint8_t* plain, int64_t rows, int64_t blocks, int64_t padded, uint8_t* out) {
  if (padded == 0) return;
  for (int64_t r = 0; r < rows; ++r, plain += blocks * kBlockBytes, out += padded * kBlockBytes) {
    std::memcpy(out, plain, blocks * kBlockBytes);
    std::memset(out + blocks * kBlockBytes, 0, (padded - blocks) * kBlockBytes);
  }
}

inline void swizzle_scales(const uint8_t* plain, int64_t rows, int64_t blocks, uint8_t* out) {
  const int64_t size = swizzled_size(rows, blocks);
  if (size == 0) return;  // no memory behind `out`
  std::memset(out, 0, size);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) out[swizzled_offset(r, b, blocks)] = *plain++;
  }
}

inline void unswizzle_scales(const uint8_t* scale, int64_t rows, int64_t blocks, uint8_t* plain) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) *plain++ = scale[swizzled_offset(r, b, blocks)];
  }
}

}  // namespace arc
