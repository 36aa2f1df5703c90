// Block and channel ids as the kernels read them, checked.
#pragma once

#include "cpu/quant_augment.h"
#include "stable_values.h"

namespace arc {

// int32 ids from 0 to limit - 1; none where there is no tensor.
inline Ids ids_of(const TensorRef& tensor, const char* op, const char* name, int64_t limit) {
  if (!tensor) return {};
  ARC_CHECK(tensor.dtype() == aoti_torch_dtype_int32() && tensor.dim() == 1,
        std::string(op) + ": " + name + " must be int32 with one dimension");
  Ids ids{tensor.data<int32_t>(), tensor.numel()};
  for (int64_t i = 0; i < ids.size; ++i) {
    ARC_CHECK(ids.data[i] >= 0 && ids.data[i] < limit,
          std::string(op) + ": " + name + " holds " + std::to_string(ids.data[i]) +
              ", expected 0 to " + std::to_string(limit - 1));
  }
  return ids;
}

inline TensorRef empty_bytes(int64_t rows, int64_t columns) {
  return TensorRef::empty({rows, columns}, aoti_torch_dtype_uint8());
}

}  // namespace arc
