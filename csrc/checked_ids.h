// Block and channel ids as the kernels read them, checked.
#pragma once

#include "cpu/quant_augment.h"
#include "stable_values.h"

namespace arc {

// Of ids of any number, before they are made contiguous.
inline void check_ids(const TensorRef& tensor) {
  if (tensor) tensor.check({int32()}, {kAnySize});
}

// Ids from 0 to limit - 1; none where there is no tensor.
inline Ids ids_of(const TensorRef& tensor, int64_t limit) {
  if (!tensor) return {};
  Ids ids{tensor.data<int32_t>(), tensor.numel()};
  for (int64_t i = 0; i < ids.size; ++i) {
    ARC_CHECK(ids.data[i] >= 0 && ids.data[i] < limit,
          tensor.what() + " holds " + std::to_string(ids.data[i]) + ", expected 0 to " +
              std::to_string(limit - 1));
  }
  return ids;
}

inline TensorRef empty_bytes(int64_t rows, int64_t columns) {
  return TensorRef::empty({rows, columns}, uint8());
}

}  // namespace arc
