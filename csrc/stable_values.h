// Between the dispatcher's stack of StableIValues and C++ values.
//
// An operator first takes all its arguments, which cannot fail, so that a refusal further on gives
// back every reference. Then it checks what each of them is, and only then reads memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
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

// What torch said of the call that failed last, from torch 2.13 on.
inline std::string cause() {
  if (!torch_exception_get_what_without_backtrace) return "";
  return std::string(": ") + torch_exception_get_what_without_backtrace();
}

inline void check_call(AOTITorchError error, const char* what) {
  ARC_CHECK(error == 0, std::string("arc: torch refused ") + what + cause());
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

inline int32_t bf16() { return aoti_torch_dtype_bfloat16(); }
inline int32_t fp16() { return aoti_torch_dtype_float16(); }
inline int32_t fp32() { return aoti_torch_dtype_float32(); }
inline int32_t uint8() { return aoti_torch_dtype_uint8(); }
inline int32_t int32() { return aoti_torch_dtype_int32(); }

inline std::string dtype_text(int32_t dtype) {
  if (dtype == bf16()) return "bf16";
  if (dtype == fp16()) return "fp16";
  if (dtype == fp32()) return "fp32";
  if (dtype == uint8()) return "uint8";
  if (dtype == int32()) return "int32";
  return "dtype number " + std::to_string(dtype);  // of torch's ScalarType
}

using Dtypes = std::initializer_list<int32_t>;

inline bool holds(Dtypes dtypes, int32_t dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

// Such as "bf16, fp16 or fp32".
inline std::string names_of(Dtypes dtypes) {
  std::string out;
  size_t left = dtypes.size();
  for (const int32_t dtype : dtypes) {
    --left;
    out += dtype_text(dtype) + (left > 1 ? ", " : left == 1 ? " or " : "");
  }
  return out;
}

inline bool is_floating(int32_t dtype) { return holds({bf16(), fp16(), fp32()}, dtype); }

// Of what is_floating.
inline DType dtype_of(int32_t dtype) {
  return dtype == bf16() ? DType::kBFloat16 : dtype == fp16() ? DType::kHalf : DType::kFloat;
}

// Sizes or strides; the tensor keeps them.
struct Extents {
  const int64_t* data;
  int64_t count;

  int64_t operator[](int64_t i) const { return data[i]; }
  std::vector<int64_t> vector() const { return {data, data + count}; }
};

constexpr int64_t kAnySize = -1;

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    out += i ? ", " : "";
    out += sizes[i] == kAnySize ? "*" : std::to_string(sizes[i]);
  }
  return out + "]";
}

// Owns one reference to a tensor, an argument of an operator or its output.
class TensorRef {
 public:
  TensorRef() = default;
  TensorRef(AtenTensorHandle handle, const char* op, const char* name) noexcept
      : handle_(handle), op_(op), name_(name) {}
  TensorRef(TensorRef&& other) noexcept { *this = std::move(other); }
  TensorRef& operator=(TensorRef&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(op_, other.op_);
    std::swap(name_, other.name_);
    return *this;
  }
  ~TensorRef() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  static TensorRef empty(const std::vector<int64_t>& sizes, int32_t dtype) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (int64_t i = int64_t(sizes.size()) - 2; i >= 0; --i) {
      strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes[i + 1]);
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
    return TensorRef(handle, "arc", "output");
  }

  // Refuses other dtypes or sizes (kAnySize fits all), and what check_memory refuses.
  void check(Dtypes dtypes, std::initializer_list<int64_t> sizes) const {
    const Extents found = this->sizes();
    bool fits = holds(dtypes, dtype()) && found.count == int64_t(sizes.size());
    const int64_t* expected = sizes.begin();
    for (int64_t i = 0; fits && i < found.count; ++i) {
      fits = expected[i] == kAnySize || expected[i] == found[i];
    }
    ARC_CHECK(fits, what() + " must be " + names_of(dtypes) + " " + text(sizes) +
                        ", got " + is());
    check_memory();
  }

  // Refuses what does not lie, by strides, in memory of this processor that is there.
  void check_memory() const {
    int32_t layout = -1, device = -1;
    check_call(aoti_torch_get_layout(handle_, &layout), "a tensor's layout");
    check_call(aoti_torch_get_device_type(handle_, &device), "a tensor's device");
    ARC_CHECK(layout == aoti_torch_layout_strided() && device == aoti_torch_device_type_cpu(),
              what() + " must be a dense tensor on the CPU, got layout number " +
                  std::to_string(layout) + " on device type " + std::to_string(device));
    int64_t bytes = 0;
    check_call(aoti_torch_get_storage_size(handle_, &bytes), "a tensor's storage");
    ARC_CHECK(end() * item_size() <= bytes,
              what() + " is " + is() + ", but only " + std::to_string(bytes) +
                  " bytes of memory are behind it");
  }

  // The same values with standard strides; most tensors have them already.
  TensorRef contiguous() && {
    const Extents sizes = this->sizes(), found = strides();
    int64_t expected = 1;
    bool standard = true;
    for (int64_t i = sizes.count; i-- > 0; expected *= sizes[i]) {
      standard = standard && (sizes[i] == 1 || found[i] == expected);
    }
    if (standard || numel() == 0) return std::move(*this);
    const std::string failure = what() + ": no contiguous copy of " + is();
    StableIValue stack[] = {
        as_value(release()), as_value(aoti_torch_memory_format_contiguous_format())};
    const AOTITorchError error =
        torch_call_dispatcher("aten::contiguous", "", stack, kTorchVersion);
    ARC_CHECK(error == 0, failure + cause());
    return TensorRef(value_as<AtenTensorHandle>(stack[0]), op_, name_);
  }

  // The same values; those of the last dimension lie side by side.
  TensorRef rows_contiguous() && {
    const int64_t last = dim() - 1;
    const bool standard = last < 0 || sizes()[last] == 1 || strides()[last] == 1;
    return standard ? std::move(*this) : std::move(*this).contiguous();
  }

  explicit operator bool() const { return handle_ != nullptr; }

  int64_t dim() const {
    int64_t found = 0;
    check_call(aoti_torch_get_dim(handle_, &found), "a tensor's dimensions");
    return found;
  }
  Extents sizes() const {
    int64_t* found = nullptr;
    check_call(aoti_torch_get_sizes(handle_, &found), "a tensor's sizes");
    return {found, dim()};
  }
  Extents strides() const {
    int64_t* found = nullptr;
    check_call(aoti_torch_get_strides(handle_, &found), "a tensor's strides");
    return {found, dim()};
  }
  int32_t dtype() const {
    int32_t found = -1;
    check_call(aoti_torch_get_dtype(handle_, &found), "a tensor's dtype");
    return found;
  }
  int64_t size(int64_t i) const { return sizes()[i]; }
  int64_t numel() const {
    const Extents found = sizes();
    int64_t count = 1;
    for (int64_t i = 0; i < found.count; ++i) count *= found[i];
    return count;
  }

  // "nvfp4_gemm: b_scale", and "uint8 [16, 4]".
  std::string what() const { return std::string(op_) + ": " + name_; }
  std::string is() const { return dtype_text(dtype()) + " " + text(sizes().vector()); }

  template <typename T>
  T* data() const {
    void* pointer = nullptr;
    check_call(aoti_torch_get_data_ptr(handle_, &pointer), "a tensor's data");
    return static_cast<T*>(pointer);
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  // Of the storage, in elements: behind the last one that belongs to the tensor.
  int64_t end() const {
    if (numel() == 0) return 0;
    int64_t offset = 0;
    check_call(aoti_torch_get_storage_offset(handle_, &offset), "a tensor's offset");
    const Extents found = sizes(), steps = strides();
    for (int64_t i = 0; i < found.count; ++i) offset += (found[i] - 1) * steps[i];
    return offset + 1;
  }

  int64_t item_size() const {
    const int32_t type = dtype();
    if (type == uint8()) return 1;
    return type == bf16() || type == fp16() ? 2 : 4;
  }

  AtenTensorHandle handle_ = nullptr;
  const char *op_ = "arc", *name_ = "a tensor";
};

// Owns a string argument.
class StringRef {
 public:
  explicit StringRef(StringHandle handle) noexcept : handle_(handle) {}
  StringRef(StringRef&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  StringRef& operator=(StringRef&&) = delete;
  ~StringRef() {
    if (handle_) torch_delete_string(handle_);
  }

  std::string text() const {
    size_t length = 0;
    const char* found = nullptr;
    check_call(torch_string_length(handle_, &length), "a string's length");
    check_call(torch_string_c_str(handle_, &found), "a string's text");
    return {found, length};
  }

 private:
  StringHandle handle_;
};

// Takes the arguments of operator `op` off the stack, one after the other, each exactly once.
class Arguments {
 public:
  Arguments(const char* op, StableIValue* stack) noexcept : op(op), next_(stack) {}

  TensorRef tensor(const char* name) noexcept {
    return TensorRef(value_as<AtenTensorHandle>(*next_++), op, name);
  }
  TensorRef optional_tensor(const char* name) noexcept {
    const std::unique_ptr<StableIValue> held(value_as<StableIValue*>(*next_++));
    return held ? TensorRef(value_as<AtenTensorHandle>(*held), op, name) : TensorRef();
  }
  StringRef string() noexcept { return StringRef(value_as<StringHandle>(*next_++)); }

  template <typename T>
  T scalar() noexcept {
    return value_as<T>(*next_++);
  }

  const char* const op;

 private:
  StableIValue* next_;
};

template <class... Refs>
void make_contiguous(Refs&... tensors) {
  const auto make = [](TensorRef& tensor) {
    if (tensor) tensor = std::move(tensor).contiguous();
  };
  (make(tensors), ...);
}

}  // namespace arc
