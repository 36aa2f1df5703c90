// Between the dispatcher's stack of StableIValues and C++ values.
#pragma once

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "torch_shim.h"

namespace arc {

// The stable interface of torch 2.11, which every later torch keeps.
constexpr uint64_t kTorchVersion = (2ULL << 56) | (11ULL << 48);

// A macro, so that the message is put together only where the check fails.
#define ARC_CHECK(condition, message)                          \
  do {                                                         \
    if (!(condition)) throw std::runtime_error(message);       \
  } while (false)

inline void check_call(AOTITorchError error, const char* what) {
  ARC_CHECK(error == 0, std::string("arc: torch refused ") + what);
}

template <typename T>
T value_as(StableIValue value) {
  static_assert(sizeof(T) <= sizeof(value), "passed by pointer");
  T out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

template <typename T>
StableIValue as_value(T in) {
  StableIValue value = 0;
  std::memcpy(&value, &in, sizeof(in));
  return value;
}

// Owns one reference to a tensor.
class TensorRef {
 public:
  TensorRef() = default;
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {
    int64_t dim = 0, *sizes = nullptr;
    check_call(aoti_torch_get_dim(handle, &dim), "a tensor's dimensions");
    check_call(aoti_torch_get_sizes(handle, &sizes), "a tensor's sizes");
    check_call(aoti_torch_get_dtype(handle, &dtype_), "a tensor's dtype");
    sizes_.assign(sizes, sizes + dim);
  }
  TensorRef(TensorRef&& other) noexcept { *this = std::move(other); }
  TensorRef& operator=(TensorRef&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(sizes_, other.sizes_);
    std::swap(dtype_, other.dtype_);
    return *this;
  }
  ~TensorRef() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  static TensorRef empty(std::vector<int64_t> sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) {
      strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
    }
    return empty_strided(sizes, strides, dtype);
  }

  static TensorRef empty_strided(
      const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
    AtenTensorHandle handle = nullptr;
    check_call(
        aoti_torch_empty_strided(
            int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
            aoti_torch_device_type_cpu(), 0, &handle),
        "an output tensor");
    return TensorRef(handle);
  }

  // The same values with standard strides; most tensors have them already.
  TensorRef contiguous() && {
    const std::vector<int64_t> found = strides();
    int64_t expected = 1;
    bool standard = true;
    for (size_t i = sizes_.size(); i-- > 0; expected *= sizes_[i]) {
      standard = standard && (sizes_[i] == 1 || found[i] == expected);
    }
    if (standard || numel() == 0) return std::move(*this);
    StableIValue stack[] = {
        as_value(release()), as_value(aoti_torch_memory_format_contiguous_format())};
    check_call(
        torch_call_dispatcher("aten::contiguous", "", stack, kTorchVersion), "aten::contiguous");
    return TensorRef(value_as<AtenTensorHandle>(stack[0]));
  }

  // The same values; those of the last dimension lie side by side.
  TensorRef rows_contiguous() && {
    const bool standard = dim() == 0 || sizes_.back() == 1 || strides().back() == 1;
    return standard ? std::move(*this) : std::move(*this).contiguous();
  }

  std::vector<int64_t> strides() const {
    int64_t* found = nullptr;
    check_call(aoti_torch_get_strides(handle_, &found), "a tensor's strides");
    return {found, found + dim()};
  }

  explicit operator bool() const { return handle_ != nullptr; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  int64_t size(size_t i) const { return sizes_.at(i); }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int32_t dtype() const { return dtype_; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes_) count *= size;
    return count;
  }

  template <typename T>
  T* data() const {
    void* pointer = nullptr;
    check_call(aoti_torch_get_data_ptr(handle_, &pointer), "a tensor's data");
    return static_cast<T*>(pointer);
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
  std::vector<int64_t> sizes_;
  int32_t dtype_ = -1;
};

// Takes the arguments off the stack, one after the other, each exactly once.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  TensorRef tensor() { return TensorRef(value_as<AtenTensorHandle>(*next_++)).contiguous(); }

  TensorRef optional_tensor() {
    TensorRef found = next_optional();
    return found ? std::move(found).contiguous() : TensorRef();
  }

  // With rows side by side only where the caller has them so.
  TensorRef strided_tensor() {
    return TensorRef(value_as<AtenTensorHandle>(*next_++)).rows_contiguous();
  }
  TensorRef optional_strided_tensor() {
    TensorRef found = next_optional();
    return found ? std::move(found).rows_contiguous() : TensorRef();
  }

  std::string string() {
    StringHandle handle = value_as<StringHandle>(*next_++);
    size_t length = 0;
    const char* text = nullptr;
    check_call(torch_string_length(handle, &length), "a string's length");
    check_call(torch_string_c_str(handle, &text), "a string's text");
    std::string out(text, length);
    torch_delete_string(handle);
    return out;
  }

  template <typename T>
  T scalar() {
    return value_as<T>(*next_++);
  }

 private:
  TensorRef next_optional() {
    std::unique_ptr<StableIValue> held(value_as<StableIValue*>(*next_++));
    return held ? TensorRef(value_as<AtenTensorHandle>(*held)) : TensorRef();
  }

  StableIValue* next_;
};

inline DType dtype_of(int32_t torch_dtype, const std::string& what) {
  if (torch_dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (torch_dtype == aoti_torch_dtype_float16()) return DType::kHalf;
  ARC_CHECK(torch_dtype == aoti_torch_dtype_float32(), what + " must be bf16, fp16 or fp32");
  return DType::kFloat;
}

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

}  // namespace arc
