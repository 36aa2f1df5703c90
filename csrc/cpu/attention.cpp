// Queries by tiles of rows that share the keys of one head: the rows of all its query heads, one head
// after the other. One pass over the keys, with a running maximum (Milakov and Gimelshein,
// arXiv:1805.02867; FlashAttention, arXiv:2205.14135).
#include "attention.h"

#include <algorithm>

#include "blocking.h"
#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace arc {
namespace {

class Heads {
 public:
  Heads(const Attention& a, const PairKernels& kernels)
      : a_(a),
        kernels_(kernels),
        pairs_(divide_up(a.keys, 2)),
        values_(a.batch * a.key_heads * pairs_ * 2 * a.value_channels) {}

  void pack_values() {
    parallel_for(a_.batch * a_.key_heads * pairs_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / pairs_, key = i % pairs_ * 2;
        const auto row = [&](int64_t k) {
          return a_.value.at(head / a_.key_heads, head % a_.key_heads, k);
        };
        kernels_.pack_values(
            row(key), key + 1 < a_.keys ? row(key + 1) : nullptr, a_.value_channels,
            values_.data() + i * 2 * a_.value_channels);
      }
    });
  }

  void attend() {
    const int64_t rows = a_.heads / a_.key_heads * a_.queries;
    const int64_t tiles = divide_up(rows, kTileQueries);
    parallel_for(a_.batch * a_.key_heads * tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch<uint16_t> queries((a_.channels + 1) / 2 * 2 * kTileQueries);
      Scratch<uint16_t> weights(kChunkKeys * kTileQueries);
      Scratch<float> scores(kChunkKeys * kTileQueries), sums(a_.value_channels * kTileQueries);
      AttentionTile tile{};
      tile.queries = queries.data(), tile.weights = weights.data();
      tile.scores = scores.data(), tile.sums = sums.data();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * kTileQueries;
        set_head(tile, i / tiles);
        set_rows(tile, i / tiles, first, std::min(kTileQueries, rows - first));
        kernels_.attend(tile);
      }
    });
  }

 private:
  void set_head(AttentionTile& tile, int64_t head) {
    tile.key = a_.key.at(head / a_.key_heads, head % a_.key_heads, 0);
    tile.values = values_.data() + head * pairs_ * 2 * a_.value_channels;
    tile.keys = a_.keys, tile.key_stride = a_.key.row;
    tile.channels = a_.channels, tile.value_channels = a_.value_channels;
    tile.mask_dtype = a_.mask_dtype, tile.scale = a_.scale;
  }

  void set_rows(AttentionTile& tile, int64_t head, int64_t first, int64_t rows) const {
    const int64_t batch = head / a_.key_heads, group = a_.heads / a_.key_heads;
    tile.rows = rows;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = head % a_.key_heads * group + (first + r) / a_.queries;
      const int64_t t = (first + r) % a_.queries;
      tile.query[r] = a_.query.at(batch, h, t);
      tile.mask[r] = a_.mask.data ? a_.mask.at(batch, h, t) : nullptr;
      tile.seen[r] = a_.causal ? std::min(a_.keys, t + 1) : a_.keys;
      tile.y[r] = a_.y.at(batch, h, t);
    }
  }

  const Attention& a_;
  const PairKernels& kernels_;
  const int64_t pairs_;
  Scratch<uint16_t> values_;
};

}  // namespace

void attention(const Attention& a) {
  Heads heads(a, *kernels().pairs);
  heads.pack_values();
  heads.attend();
}

}  // namespace arc
