// softmax(scale * Q K^T + mask) V on bf16, heads of Q sharing heads of K and V. The meaning is
// arc_ao/ops/attention.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace arc {

// Where a tensor [batch, heads, rows, channels] lies; strides in elements, of channels 1.
template <typename T>
struct Strided {
  T* data;
  int64_t batch, head, row;

  T* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

struct Attention {
  int64_t batch, heads, key_heads, queries, keys, channels, value_channels;
  Strided<const uint16_t> query, key, value;  // bf16
  Strided<const char> mask;  // strides in bytes, 0 where it is the same for all; data may be null
  DType mask_dtype;
  bool causal;  // query t sees keys 0 .. t
  float scale;
  Strided<uint16_t> y;
};

// Rounding of the probabilities to bf16 and the sums' order are those of this kernel; rows that see
// no key are zeros.
void attention(const Attention& a);

}  // namespace arc
