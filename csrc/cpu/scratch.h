// Uninitialised, 64-byte aligned working memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace arc {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : size_(size) {
    if (size == 0) return;
    if (size < 0 || size > (INT64_MAX - 63) / int64_t{sizeof(T)}) throw std::bad_alloc();
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_;
};

}  // namespace arc
