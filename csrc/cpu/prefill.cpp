// Activations are decoded to bf16 once, block scales included; each thread decodes a slab of the
// weight, some columns by some chunks of K, that stays in its L2, and multiplies all rows with it.
// C stays in tiles until K is through, then gets the outer scales and the bias.
#include "prefill.h"

#include <cstring>

#include "blocking.h"
#include "panel_reader.h"
#include "parallel.h"
#include "scratch.h"

namespace arc {
namespace {

constexpr int64_t kStepBlocks = kStepChannels / kBlock;
constexpr int64_t kStripPanels = kStripRows / kPanel;
constexpr int64_t kChunkBlocks = kChunkSteps * kStepBlocks;

// Tile registers are a thread's own.
struct ConfiguredTiles {
  explicit ConfiguredTiles(const TileKernels& kernels) : kernels(kernels) { kernels.configure(); }
  ~ConfiguredTiles() { kernels.release(); }
  ConfiguredTiles(const ConfiguredTiles&) = delete;
  const TileKernels& kernels;
};

// Rows [first, first + rows) of a product whose A is decoded.
struct Pass {
  const TileKernels& tiles;
  const Gemm& g;
  const int32_t* columns;
  const float* bias;
  int64_t first, rows;
  const float* a_outer;  // [rows]
  uint16_t* a;           // strips

  int64_t steps() const { return divide_up(g.a_blocks, kStepBlocks); }
  int64_t chunks() const { return divide_up(steps(), kChunkSteps); }
  int64_t steps_of(int64_t chunk) const {
    return std::min(kChunkSteps, steps() - chunk * kChunkSteps);
  }
  uint16_t* a_at(int64_t strip, int64_t chunk) const {
    return a + (strip * steps() + chunk * kChunkSteps) * kStepHalves;
  }
};

void decode_activations(const Pass& p) {
  parallel_for(divide_up(p.rows, kStripRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      uint16_t* target = p.a_at(strip, 0);
      const int64_t rows = std::min(kStripRows, p.rows - strip * kStripRows);
      if (rows < kStripRows) std::memset(target, 0, p.steps() * kStepHalves * sizeof(uint16_t));
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t source = (p.first + strip * kStripRows + m) * p.g.a_blocks;
        p.tiles.decode_row(
            p.g.a + source * kBlockBytes, p.g.a_scale + source, p.g.a_blocks, m, target);
      }
    }
  });
}

// Strips of W by chunks of K: [chunks, strips, steps, 2, 512].
class Slab {
 public:
  Slab(const Pass& p, Range strips, int64_t max_chunks)
      : p_(p),
        strips_(strips),
        reader_(p.g, max_chunks * kChunkBlocks),
        tiles_(max_chunks * strips.size() * kChunkSteps * kStepHalves) {}

  // `strip` counts from the slab's first.
  uint16_t* at(int64_t strip, int64_t chunk) {
    const int64_t before = (chunk - chunks_.begin) * strips_.size() * kChunkSteps;
    return tiles_.data() + (before + strip * p_.steps_of(chunk)) * kStepHalves;
  }

  void decode(Range chunks) {
    chunks_ = chunks;
    const int64_t first = chunks.begin * kChunkBlocks;
    const int64_t blocks = std::min(chunks.end * kChunkBlocks, p_.g.a_blocks) - first;
    for (int64_t i = 0; i < strips_.size() * kStripPanels; ++i) {
      const int64_t panel = strips_.begin * kStripPanels + i;
      if (panel * kPanel >= p_.g.cols) {
        clear(i);
        continue;
      }
      reader_.seek(panel, p_.columns + first, blocks);
      for (int64_t done = 0; done < blocks; done += kChunkBlocks) {
        const int64_t count = std::min(kChunkBlocks, blocks - done);
        p_.tiles.decode_panel(
            reader_.codes, reader_.scale, reader_.columns + done, count,
            panel_at(i, chunks.begin + done / kChunkBlocks));
      }
    }
  }

 private:
  uint16_t* panel_at(int64_t panel, int64_t chunk) {
    return at(panel / kStripPanels, chunk) + panel % kStripPanels * kTileHalves;
  }

  // The second panel of the last strip, where W has none.
  void clear(int64_t panel) {
    for (int64_t chunk = chunks_.begin; chunk < chunks_.end; ++chunk) {
      for (int64_t step = 0; step < p_.steps_of(chunk); ++step) {
        std::memset(panel_at(panel, chunk) + step * kStepHalves, 0, kTileHalves * sizeof(uint16_t));
      }
    }
  }

  const Pass& p_;
  Range strips_, chunks_{};
  PanelReader reader_;
  Scratch<uint16_t> tiles_;
};

// One part of C: some strips of rows by some strips of columns.
class Part {
 public:
  Part(const Pass& p, Range rows, Range cols)
      : p_(p),
        rows_(rows),
        cols_(cols),
        slabs_(divide_up(p.chunks(), slab_chunks(p.rows, cols.size()))),
        slab_(p, cols, divide_up(p.chunks(), slabs_)),
        c_(rows.size() * cols.size() * kBlockFloats) {}

  void multiply() {
    for (int64_t i = 0; i < slabs_; ++i) {
      const Range chunks = part_of(p_.chunks(), slabs_, i);
      slab_.decode(chunks);
      for (int64_t strip = rows_.begin; strip < rows_.end; ++strip) {
        for (int64_t col = 0; col < cols_.size(); col += kGroupStrips) {
          const Range group{col, std::min(col + kGroupStrips, cols_.size())};
          multiply_group(strip, group, chunks);
          if (i + 1 == slabs_) store_group(strip, group);
        }
      }
    }
  }

 private:
  float* c_at(int64_t strip, int64_t col) {
    return c_.data() + ((strip - rows_.begin) * cols_.size() + col) * kBlockFloats;
  }

  // While a group is multiplied, its share of the next strip of A and of C comes into L2.
  void multiply_group(int64_t strip, Range group, Range chunks) {
    const int64_t next = std::min(strip + 1, rows_.end - 1);
    const char* next_c = reinterpret_cast<const char*>(c_at(next, group.begin));
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      TileProduct product{};
      product.a = p_.a_at(strip, chunk);
      product.w = slab_.at(group.begin, chunk);
      product.c = c_at(strip, group.begin);
      product.steps = p_.steps_of(chunk);
      product.w_strips = group.size();
      product.upper_only = p_.rows - strip * kStripRows <= kTileRows;
      product.add = chunk > 0;
      const int64_t steps = product.steps * kNextBytes;
      product.next_a = reinterpret_cast<const char*>(p_.a_at(next, chunk)) + group.begin * steps;
      product.next_c = next_c + (chunk - chunks.begin) * group.size() * steps;
      p_.tiles.multiply(product);
    }
  }

  void store_group(int64_t strip, Range group) {
    const int64_t row = strip * kStripRows, size = size_of(p_.g.y_dtype);
    const int64_t col = (cols_.begin + group.begin) * kStripRows;
    Output out{};
    out.rows = std::min(kStripRows, p_.rows - row);
    out.cols = std::min(group.size() * kStripRows, p_.g.cols - col);
    out.a_outer = p_.a_outer + row;
    out.b_outer = *p_.g.b_outer;
    out.bias = p_.bias ? p_.bias + col : nullptr;
    out.y_stride = p_.g.cols * size;
    out.y = static_cast<char*>(p_.g.y) + (p_.first + row) * out.y_stride + col * size;
    out.y_dtype = p_.g.y_dtype;
    p_.tiles.store_strip(c_at(strip, group.begin), out);
  }

  const Pass& p_;
  const Range rows_, cols_;
  const int64_t slabs_;
  Slab slab_;
  Scratch<float> c_;
};

void multiply(const Pass& p) {
  const int64_t row_strips = divide_up(p.rows, kStripRows);
  const int64_t col_strips = divide_up(p.g.cols, kStripRows);
  const Parts parts = make_parts(p.rows, col_strips, num_threads());
  parallel_for(parts.rows * parts.cols, 1, [&](int64_t begin, int64_t end) {
    const ConfiguredTiles configured(p.tiles);
    for (int64_t i = begin; i < end; ++i) {
      const Range rows = part_of(row_strips, parts.rows, i % parts.rows);
      Part(p, rows, part_of(col_strips, parts.cols, i / parts.rows)).multiply();
    }
  });
}

}  // namespace

void prefill(const TileKernels& tiles, const Gemm& g, const int32_t* columns, const float* bias) {
  Pass pass{tiles, g, columns, bias, 0, std::min(g.rows, kPassRows), nullptr, nullptr};
  const int64_t strips = divide_up(pass.rows, kStripRows);
  Scratch<uint16_t> a(strips * pass.steps() * kStepHalves);
  Scratch<float> a_outer(pass.rows);
  pass.a = a.data();
  pass.a_outer = a_outer.data();
  for (; pass.first < g.rows; pass.first += kPassRows) {
    pass.rows = std::min(kPassRows, g.rows - pass.first);
    for (int64_t m = 0; m < pass.rows; ++m) {
      a_outer.data()[m] = g.a_outer[g.a_outer_per_row ? pass.first + m : 0];
    }
    decode_activations(pass);
    multiply(pass);
  }
}

}  // namespace arc
