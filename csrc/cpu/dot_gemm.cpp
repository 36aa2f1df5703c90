// By dot products over packed panels of 16 columns: for few rows, and for levels without tiles.
#include "dot_gemm.h"

#include <algorithm>
#include <deque>

#include "blocking.h"
#include "dispatch.h"
#include "panel_reader.h"
#include "parallel.h"
#include "scratch.h"

namespace arc {
namespace {

// Unpacked activations that stay in L2 while a group of panels passes by.
constexpr int64_t kActivationBytes = 512 << 10;
constexpr int64_t kGroupPanels = 8;
// More rows than this pay for decoding a panel once instead of in every pass of kGroupRows. With a
// chunk of 2,048 channels products are added up less often; 512, which fit L1, took 2 % longer.
constexpr int64_t kInlineRows = 96;
constexpr int64_t kDecodedBlocks = 128;

// Rows of A that fit kActivationBytes.
int64_t rows_in_cache(const Gemm& g) {
  const int64_t bytes_per_row = std::max<int64_t>(1, g.a_blocks * (kBlock + 8));
  const int64_t rows = kActivationBytes / bytes_per_row / kGroupRows * kGroupRows;
  return std::max(rows, kGroupRows);
}

// Rows from `row` on, a multiple of group_rows.
Activations rows_from(const Activations& a, int64_t row) {
  const int64_t at = a.at(row);
  return {a.codes + at * kBlock, a.scale + at, a.offset + at, a.blocks, a.group_rows};
}

// Rows of A, unpacked, times all of W.
struct DotPass {
  const Gemm& g;
  const Activations& a;
  const int32_t* columns;
  const float* bias;
  const float* a_outer;  // [rows]
  int64_t first, rows;   // of g

  // Of one panel and some of the rows.
  Output output(int64_t panel, int64_t row, int64_t count) const {
    const int64_t col = panel * kPanel, size = size_of(g.y_dtype);
    Output out{};
    out.rows = count;
    out.cols = std::min(kPanel, g.cols - col);
    out.a_outer = a_outer + row;
    out.b_outer = *g.b_outer;
    out.bias = bias ? bias + col : nullptr;
    out.y_stride = g.cols * size;
    out.y = static_cast<char*>(g.y) + (first + row) * out.y_stride + col * size;
    out.y_dtype = g.y_dtype;
    return out;
  }
};

// Panels that stay in L2 while the rows pass by, as many at a time as L2 holds beside them.
class PackedPanels {
 public:
  PackedPanels(const DotPass& p, int64_t panels, int64_t cached) : p_(p), cached_(cached) {
    for (int64_t i = 0; i < panels; ++i) readers_.emplace_back(p.g, p.a.blocks);
  }

  void multiply(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) readers_[i].seek(first + i, p_.columns, p_.a.blocks);
    for (int64_t row = 0; row < p_.rows; row += cached_) {
      const int64_t rows = std::min(cached_, p_.rows - row);
      for (int64_t i = 0; i < count; ++i) {
        const PanelReader& panel = readers_[i];
        const Output out = p_.output(first + i, row, rows);
        kernels().dot_panel(
            rows_from(p_.a, row), panel.codes, panel.scale, panel.columns, out);
      }
    }
  }

 private:
  const DotPass& p_;
  const int64_t cached_;
  std::deque<PanelReader> readers_;
};

// One or two panels, decoded by chunks of K, each of which meets all rows.
class DecodedPair {
 public:
  explicit DecodedPair(const DotPass& p)
      : p_(p),
        readers_{{p.g, p.a.blocks}, {p.g, p.a.blocks}},
        codes_(kPair * kDecodedBlocks * kDecodedBlockBytes),
        scale_(kPair * kDecodedBlocks * kPanel),
        products_(p.rows * kPair * kPanel) {}

  void multiply(int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) readers_[i].seek(first + i, p_.columns, p_.a.blocks);
    for (int64_t block = 0; block < p_.a.blocks; block += kDecodedBlocks) {
      const DecodedChunk chunk = decode(count, block);
      kernels().decoded->multiply(p_.a, p_.rows, chunk, products_.data());
    }
    for (int64_t i = 0; i < count; ++i) {
      const Output out = p_.output(first + i, 0, p_.rows);
      kernels().store_products(products_.data() + i * kPanel, kPair * kPanel, out);
    }
  }

 private:
  DecodedChunk decode(int64_t panels, int64_t first) {
    const int64_t blocks = std::min(kDecodedBlocks, p_.a.blocks - first);
    const int64_t next_pair = kPair * p_.g.b_blocks * kPanelBlockBytes;
    for (int64_t i = 0; i < panels; ++i) {
      const PanelReader& panel = readers_[i];
      kernels().decoded->decode_panel(
          panel.codes, panel.scale, panel.columns + first, blocks, next_pair,
          codes_.data() + i * blocks * kDecodedBlockBytes, scale_.data() + i * blocks * kPanel);
    }
    return {codes_.data(), scale_.data(), first, blocks, panels};
  }

  const DotPass& p_;
  PanelReader readers_[kPair];
  Scratch<uint8_t> codes_;
  Scratch<float> scale_, products_;
};

// Panels by tasks of `size` of them, each thread with an object that make() gives.
template <typename Make>
void for_panels(int64_t panels, int64_t size, const Make& make) {
  parallel_for(divide_up(panels, size), 1, [&](int64_t begin, int64_t end) {
    auto worker = make();
    for (int64_t first = begin * size; first < std::min(end * size, panels); first += size) {
      worker.multiply(first, std::min(size, panels - first));
    }
  });
}

void multiply(const DotPass& p) {
  const int64_t panels = divide_up(p.g.cols, kPanel);
  if (kernels().decoded && p.rows > kInlineRows) {
    return for_panels(panels, kPair, [&] { return DecodedPair(p); });
  }
  const int64_t cached = std::min(p.rows, rows_in_cache(p.g));
  // Few rows stay in cache anyway; few panels are shared by the threads first.
  const int64_t shared = divide_up(panels, num_threads());
  const int64_t group = p.rows == cached ? 1 : std::min(kGroupPanels, shared);
  for_panels(panels, group, [&] { return PackedPanels(p, group, cached); });
}

}  // namespace

void dot_gemm(const Gemm& g, const int32_t* columns, const float* bias) {
  const int64_t pass = std::min(g.rows, kPassRows), group = std::min(pass, kGroupRows);
  const int64_t unpacked = divide_up(pass, group) * group * g.a_blocks;  // blocks
  Scratch<int32_t> offset(unpacked);
  Scratch<int8_t> codes(unpacked * kBlock);
  Scratch<float> scale(unpacked), a_outer(pass);
  const Activations a{codes.data(), scale.data(), offset.data(), g.a_blocks, group};
  for (int64_t first = 0; first < g.rows; first += pass) {
    const int64_t rows = std::min(pass, g.rows - first);
    parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t source = (first + m) * g.a_blocks;
        kernels().unpack_activations(g.a + source * kBlockBytes, g.a_scale + source, a, m);
        a_outer.data()[m] = g.a_outer[g.a_outer_per_row ? first + m : 0];
      }
    });
    multiply({g, a, columns, bias, a_outer.data(), first, rows});
  }
}

}  // namespace arc
