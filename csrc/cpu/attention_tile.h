// One tile of queries against the keys of its head: included by every dispatch level.
//
// Queries are lanes. Scores and sums are kept transposed, [keys, queries] and [channels, queries], so
// that keys are read where they lie, four bytes (two channels) at a time, and the softmax runs down
// the vectors.
#pragma once

#include <algorithm>
#include <cmath>

#include "pair_products.h"
#include "transpose.h"

namespace {

using arc::AttentionTile;
using arc::DType;
using arc::kChunkKeys;
constexpr int kVectors = arc::kTileQueries / kLanes;
constexpr float kLog2E = 1.44269504088896341f;
constexpr int32_t kMinusInf = int32_t(0xFF800000);

// 2^x for x <= 0, 0 below -126.5; relative error 2e-7. Polynomial of Cephes' exp2f.
inline f32x16 exp2_lanes(f32x16 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  x = clamp(x, -127.0f, 127.0f);
  const f32x16 shifted = x + splat(kRound);
  const f32x16 r = x - (shifted - splat(kRound));
  f32x16 p = splat(1.535336188319500e-4f);
  p = p * r + splat(1.339887440266574e-3f);
  p = p * r + splat(9.618437357674640e-3f);
  p = p * r + splat(5.550332471162809e-2f);
  p = p * r + splat(2.402264791363012e-1f);
  p = p * r + splat(6.931472028550421e-1f);
  p = p * r + splat(1.0f);
  const u32x16 power = (bits<u32x16>(shifted) - bits<uint32_t>(kRound) + 127) << 23;
  return p * bits<f32x16>(power);
}

inline u32x16 rounded_to_bf16(f32x16 v) {  // in the upper half; of what is not negative
  const u32x16 u = bits<u32x16>(v);
  return u + 0x7FFF + ((u >> 16) & 1);
}

// What masks and causality leave of a chunk of keys.
enum class Seen { kNothing, kSome, kAll };

template <class Dot, int V>
class TileOfQueries {
 public:
  explicit TileOfQueries(const AttentionTile& t) : t_(t) {
    for (int v = 0; v < V; ++v) largest_[v] = splat(-INFINITY), total_[v] = f32x16{};
  }

  void attend() {
    pack_queries();
    std::memset(t_.sums, 0, t_.value_channels * V * kLanes * sizeof(float));
    for (int64_t first = 0; first < t_.keys; first += kChunkKeys) {
      add_chunk(first, std::min(kChunkKeys, t_.keys - first));
    }
    store_rows();
  }

 private:
  // [channels / 2, V * 16, 2]; lanes behind the last row are zeros.
  void pack_queries() {
    for (int v = 0; v < V; ++v) {
      for (int64_t c = 0; c < t_.channels; c += 2 * kLanes) {
        u32x16 rows[kLanes] = {};
        for (int i = 0; i < kLanes && v * kLanes + i < t_.rows; ++i) {
          rows[i] = load_some(t_.query[v * kLanes + i] + c, 2 * (t_.channels - c));
        }
        transpose(rows);
        const int64_t pairs = std::min<int64_t>(kLanes, (t_.channels - c) / 2);
        for (int64_t i = 0; i < pairs; ++i) {
          store(t_.queries + ((c / 2 + i) * V + v) * 2 * kLanes, rows[i]);
        }
      }
    }
  }

  void add_chunk(int64_t first, int64_t keys) {
    const Seen seen = seen_of(first, keys);
    if (seen == Seen::kNothing) return;
    const bool scaled = seen == Seen::kSome || t_.scale < 0;  // before the maximum is taken
    multiply_pairs<Dot, V>(
        {t_.key + first * t_.key_stride, t_.key_stride, 2, keys, t_.channels / 2, t_.queries,
         t_.scores, false});
    if (scaled) add_mask(first, keys);
    weigh(keys, scaled ? 1.0f : t_.scale * kLog2E);
    multiply_pairs<Dot, V>(
        {t_.values + first * t_.value_channels, 2, 2 * t_.value_channels, t_.value_channels,
         (keys + 1) / 2, t_.weights, t_.sums, true});
  }

  Seen seen_of(int64_t first, int64_t keys) const {
    bool any = false, all = true;
    const void* last = nullptr;
    for (int64_t r = 0; r < t_.rows; ++r) {
      const int64_t count = std::min(keys, t_.seen[r] - first);
      all = all && count == keys;
      if (count <= 0) continue;
      if (!t_.mask[r]) {
        any = true;
        continue;
      }
      if (t_.mask[r] == last) continue;  // the row before had the same
      last = t_.mask[r];
      const Seen row = seen_of_row(last, first, count);
      any = any || row != Seen::kNothing;
      all = all && row == Seen::kAll;
      if (any && !all) return Seen::kSome;
    }
    return !any ? Seen::kNothing : all ? Seen::kAll : Seen::kSome;
  }

  Seen seen_of_row(const void* mask, int64_t first, int64_t keys) const {
    i32x16 zeros = every(-1), infinities = every(-1);
    for (int64_t k = 0; k < keys; k += kLanes) {
      const i32x16 lanes = bits<i32x16>(mask_lanes(mask, first + k, keys - k));
      const i32x16 outside = keys - k >= kLanes ? i32x16{} : behind(keys - k);
      zeros &= (lanes == 0) | outside;
      infinities &= (lanes == kMinusInf) | outside;
    }
    if (all_of(zeros)) return Seen::kAll;
    return all_of(infinities) ? Seen::kNothing : Seen::kSome;
  }

  static i32x16 behind(int64_t count) {  // -1 in the lanes from `count` on
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane >= int32_t(count);
  }

  static bool all_of(i32x16 v) {
    i32x8 both = low_half(v) & high_half(v);
    int32_t out = -1;
    for (int i = 0; i < 8; ++i) out &= both[i];
    return out == -1;
  }

  f32x16 mask_lanes(const void* mask, int64_t key, int64_t count) const {
    if (t_.mask_dtype == DType::kFloat) {
      return bits<f32x16>(load_some(static_cast<const float*>(mask) + key, 4 * count));
    }
    const uint16_t* halves = static_cast<const uint16_t*>(mask) + key;
    if (count >= kLanes) return from_bf16(load<u16x16>(halves));
    uint16_t padded[kLanes] = {};
    std::memcpy(padded, halves, 2 * count);
    return from_bf16(load<u16x16>(padded));
  }

  // scores = scale * scores + mask, times log2 e; -inf where a row does not see a key.
  void add_mask(int64_t first, int64_t keys) {
    for (int v = 0; v < V; ++v) {
      for (int64_t k = 0; k < keys; k += kLanes) {
        u32x16 masks[kLanes] = {};
        for (int i = 0; i < kLanes && v * kLanes + i < t_.rows; ++i) {
          masks[i] = bits<u32x16>(mask_of(v * kLanes + i, first + k, keys - k));
        }
        transpose(masks);
        const int64_t count = std::min<int64_t>(kLanes, keys - k);
        for (int64_t i = 0; i < count; ++i) {
          float* scores = t_.scores + ((k + i) * V + v) * kLanes;
          const f32x16 scaled = load<f32x16>(scores) * splat(t_.scale * kLog2E);
          const f32x16 mask = bits<f32x16>(masks[i]);
          const i32x16 hidden = bits<i32x16>(masks[i]) == kMinusInf;  // whatever the score is
          store(scores, select(hidden, mask, scaled + mask * splat(kLog2E)));
        }
      }
    }
  }

  f32x16 mask_of(int64_t row, int64_t key, int64_t count) const {
    const int64_t seen = std::min(count, t_.seen[row] - key);
    if (seen <= 0) return splat(-INFINITY);
    f32x16 lanes = t_.mask[row] ? mask_lanes(t_.mask[row], key, seen) : f32x16{};
    return seen < kLanes ? select(behind(seen), splat(-INFINITY), lanes) : lanes;
  }

  // Rows of products so large that a subtraction fused with them would show their rounding, by more
  // than a weight bears, get them rounded, and the factor 1.
  f32x16 round_large(int v, int64_t keys, f32x16 factor, f32x16 largest) {
    const i32x16 large = less(every(bits<int32_t>(0x1p24f)), abs_bits(largest));
    if (all_of(~large)) return factor;
    for (int64_t k = 0; k < keys; ++k) {
      const f32x16 score = scores(k, v);
      store(t_.scores + (k * V + v) * kLanes, select(large, score * factor, score));
    }
    return select(large, splat(1.0f), factor);
  }

  // Weights 2^(factor * score - largest) as pairs of bf16; sums and totals follow the maximum.
  void weigh(int64_t keys, float factor) {
    for (int v = 0; v < V; ++v) {
      f32x16 chunk = splat(-INFINITY);
      for (int64_t k = 0; k < keys; ++k) chunk = larger(chunk, scores(k, v));
      const f32x16 before = largest_[v], largest = chunk * splat(factor);
      largest_[v] = larger(before, largest);
      f32x16 multiplier = splat(factor);
      if (factor != 1.0f) multiplier = round_large(v, keys, multiplier, largest);
      const f32x16 reference = finite(largest_[v]);
      rescale(v, exp2_lanes(before - reference));
      for (int64_t k = 0; k < keys; k += 2) {
        const f32x16 even = exp2_lanes(scores(k, v) * multiplier - reference);
        const f32x16 odd =
            k + 1 < keys ? exp2_lanes(scores(k + 1, v) * multiplier - reference) : f32x16{};
        total_[v] = total_[v] + even + odd;
        const u32x16 pair = rounded_to_bf16(even) >> 16 | (rounded_to_bf16(odd) & 0xFFFF0000);
        store(t_.weights + (k / 2 * V + v) * 2 * kLanes, pair);
      }
    }
  }

  f32x16 scores(int64_t k, int v) const { return load<f32x16>(t_.scores + (k * V + v) * kLanes); }

  static f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

  // 0 in the place of -inf: a row that has seen nothing yet has no maximum.
  static f32x16 finite(f32x16 v) { return v == splat(-INFINITY) ? f32x16{} : v; }

  void rescale(int v, f32x16 factor) {
    if (all_of(bits<i32x16>(factor) == int32_t(0x3F800000))) return;
    total_[v] = total_[v] * factor;
    for (int64_t c = 0; c < t_.value_channels; ++c) {
      float* sums = t_.sums + (c * V + v) * kLanes;
      store(sums, load<f32x16>(sums) * factor);
    }
  }

  void store_rows() const {
    for (int v = 0; v < V; ++v) {
      const f32x16 inverse = total_[v] == f32x16{} ? f32x16{} : splat(1.0f) / total_[v];
      for (int64_t c = 0; c < t_.value_channels; c += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, t_.value_channels - c);
        u32x16 rows[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) {
          rows[i] = bits<u32x16>(load<f32x16>(t_.sums + ((c + i) * V + v) * kLanes) * inverse);
        }
        transpose(rows);
        for (int i = 0; i < kLanes && v * kLanes + i < t_.rows; ++i) {
          const u16x16 y = to_bf16(bits<f32x16>(rows[i]));
          std::memcpy(t_.y[v * kLanes + i] + c, &y, 2 * count);
        }
      }
    }
  }

  const AttentionTile& t_;
  f32x16 largest_[V], total_[V];  // of each row: maximum of the scores so far, sum of its weights
};

template <class Dot>
void attend(const AttentionTile& tile) {
  static_assert(kVectors == 4, "one case for each number of vectors");
  switch ((tile.rows + kLanes - 1) / kLanes) {
    case 1: return TileOfQueries<Dot, 1>(tile).attend();
    case 2: return TileOfQueries<Dot, 2>(tile).attend();
    case 3: return TileOfQueries<Dot, 3>(tile).attend();
    default: return TileOfQueries<Dot, 4>(tile).attend();
  }
}

void pack_values(
    const uint16_t* first, const uint16_t* second, int64_t channels, uint16_t* packed) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const u32x16 low = bits<u32x16>(from_bf16(load<u16x16>(first + c))) >> 16;
    const u32x16 high = second ? bits<u32x16>(from_bf16(load<u16x16>(second + c))) : u32x16{};
    store(packed + 2 * c, low | high);
  }
  for (; c < channels; ++c) {
    packed[2 * c] = first[c];
    packed[2 * c + 1] = second ? second[c] : 0;
  }
}

}  // namespace
