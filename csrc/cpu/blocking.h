// How `prefill` cuts a product for the caches and the threads. The bits of a result do not depend on
// it: every element adds up step by step over the whole K in one order.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace arc {

constexpr int64_t kPassRows = 2048;   // rows of A that are decoded at once: bounds its memory
constexpr int64_t kPartRows = 512;    // fewer for each thread, and decoding W again weighs too much
constexpr int64_t kSlabStrips = 16;   // strips of W for a thread: 512 columns, so that A, which comes
                                      // from L3, is read rarely
constexpr int64_t kFewRows = 64;      // W is then decoded about as long as it is multiplied
constexpr int64_t kChunkSteps = 8;    // 256 channels: 16 KiB of a strip of A stay in L1 while
constexpr int64_t kGroupStrips = 4;   // 4 strips of W pass by, with their 16 KiB of C

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Part `i` of `parts` of nearly the same size.
inline Range part_of(int64_t size, int64_t parts, int64_t i) {
  return {size * i / parts, size * (i + 1) / parts};
}

inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 where a virtual machine hides it
  if (found > 0) return found;
#endif
  return int64_t{2} << 20;  // of the first processors with AMX
}

// Chunks of K that are decoded at once for `w_strips` strips: W takes five eighths of L2, the rest
// is for A and C. For few rows a single one, which stays in L1: decoding into L2 took a third longer
// (9.3 instead of 6.9 ns for 16 x 16 weights, one thread).
inline int64_t slab_chunks(int64_t rows, int64_t w_strips) {
  if (rows <= kFewRows) return 1;
  static const int64_t budget = l2_bytes() / 8 * 5;
  const int64_t chunk_bytes = w_strips * kChunkSteps * kStepHalves * int64_t{sizeof(uint16_t)};
  return std::max<int64_t>(1, budget / chunk_bytes);
}

// Parts of C, one task each.
struct Parts {
  int64_t rows, cols;
};

// For few rows single strips of W, which fit L1. Else wide parts first; then rows are shared, as long
// as there are many; then columns.
inline Parts make_parts(int64_t rows, int64_t w_strips, int64_t threads) {
  if (rows <= kFewRows) return {1, w_strips};
  const int64_t cols = divide_up(w_strips, kSlabStrips);
  if (cols >= threads) {
    return {1, std::min(w_strips, divide_up(cols, threads) * threads)};
  }
  const int64_t shared = std::max<int64_t>(1, std::min(rows / kPartRows, threads / cols));
  return {shared, std::min(w_strips, std::max(cols, threads / shared))};
}

}  // namespace arc
