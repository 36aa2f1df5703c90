#include "nvfp4_gemm.h"

#include <algorithm>
#include <deque>

#include "blocking.h"
#include "dispatch.h"
#include "panel_reader.h"
#include "parallel.h"
#include "prefill.h"
#include "scratch.h"

namespace arc {
namespace {

// Unpacked activations that stay in L2 while a group of panels passes by.
constexpr int64_t kActivationBytes = 512 << 10;
constexpr int64_t kGroupPanels = 8;

// Rows of A that fit kActivationBytes.
int64_t rows_in_cache(const Gemm& g) {
  const int64_t bytes_per_row = std::max<int64_t>(1, g.a_blocks * (kBlock + 8));
  const int64_t rows = kActivationBytes / bytes_per_row / kGroupRows * kGroupRows;
  return std::max(rows, kGroupRows);
}

// Column j of A_aug meets block columns[j] of what is stored of the weight.
void fill_columns(const Gemm& g, int32_t* columns) {
  const int64_t base = g.num_act_blocks ? g.base_blocks : g.b_blocks;
  int64_t j = 0;
  for (int64_t i = 0; i < base; ++i) columns[j++] = int32_t(i);
  for (int64_t i = 0; i < g.num_act_blocks; ++i) columns[j++] = g.act_blocks[i];
  for (int64_t i = base; i < g.b_blocks; ++i) columns[j++] = int32_t(i);
}

// Scales, adds the bias to and stores the products of `rows` rows with one panel.
void store_panel(
    const Gemm& g, const float* bias, int64_t first_row, int64_t rows, int64_t panel, float* out) {
  const int64_t col = panel * kPanel, count = std::min(kPanel, g.cols - col);
  const float b_outer = *g.b_outer;
  for (int64_t m = 0; m < rows; ++m) {
    float* y = out + m * kPanel;
    const float a_outer = g.a_outer[g.a_outer_per_row ? first_row + m : 0];
    for (int64_t n = 0; n < kPanel; ++n) y[n] = y[n] * a_outer * b_outer;
    for (int64_t n = 0; bias && n < count; ++n) y[n] += bias[col + n];
    char* target = static_cast<char*>(g.y) + ((first_row + m) * g.cols + col) * size_of(g.y_dtype);
    kernels().store_row(y, g.y_dtype, count, target);
  }
}

// Rows from `row` on, a multiple of group_rows.
Activations rows_from(const Activations& a, int64_t row) {
  const int64_t at = a.at(row);
  return {a.codes + at * kBlock, a.scale + at, a.offset + at, a.blocks, a.group_rows};
}

void multiply(
    const Gemm& g, const Activations& a, const int32_t* columns, const float* bias,
    int64_t first_row, int64_t rows) {
  const int64_t panels = divide_up(g.cols, kPanel), cached = std::min(rows, rows_in_cache(g));
  // Few rows stay in cache anyway; few panels are shared by the threads first.
  const int64_t shared = divide_up(panels, num_threads());
  const int64_t group = rows == cached ? 1 : std::min(kGroupPanels, shared);
  parallel_for(divide_up(panels, group), 1, [&](int64_t begin, int64_t end) {
    std::deque<PanelReader> readers;
    for (int64_t i = 0; i < group; ++i) readers.emplace_back(g, a.blocks);
    Scratch<float> out(cached * kPanel);
    for (int64_t first = begin * group; first < std::min(end * group, panels); first += group) {
      const int64_t count = std::min(group, panels - first);
      for (int64_t i = 0; i < count; ++i) readers[i].seek(first + i, columns, a.blocks);
      for (int64_t row = 0; row < rows; row += cached) {
        const int64_t some = std::min(cached, rows - row);
        for (int64_t i = 0; i < count; ++i) {
          const PanelReader& panel = readers[i];
          kernels().dot_panel(
              rows_from(a, row), some, panel.codes, panel.scale, panel.columns, out.data());
          store_panel(g, bias, first_row + row, some, first + i, out.data());
        }
      }
    }
  });
}

// By dot products over packed panels, for few rows and for levels without tile registers.
void multiply_by_dots(const Gemm& g, const int32_t* columns, const float* bias) {
  const int64_t pass = std::min(g.rows, kPassRows), group = std::min(pass, kGroupRows);
  const int64_t unpacked = divide_up(pass, group) * group * g.a_blocks;  // blocks
  Scratch<int32_t> offset(unpacked);
  Scratch<int8_t> codes(unpacked * kBlock);
  Scratch<float> scale(unpacked);
  const Activations a{codes.data(), scale.data(), offset.data(), g.a_blocks, group};
  for (int64_t first = 0; first < g.rows; first += pass) {
    const int64_t rows = std::min(pass, g.rows - first);
    parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t source = (first + m) * g.a_blocks;
        kernels().unpack_activations(g.a + source * kBlockBytes, g.a_scale + source, a, m);
      }
    });
    multiply(g, a, columns, bias, first, rows);
  }
}

}  // namespace

void nvfp4_gemm(const Gemm& g) {
  if (g.rows == 0 || g.cols == 0) return;
  Scratch<int32_t> columns(g.a_blocks);
  Scratch<float> bias(g.bias ? g.cols + kBlock : 0);
  fill_columns(g, columns.data());
  if (g.bias) kernels().load_row(g.bias, g.bias_dtype, g.cols, bias.data());
  const TileKernels* tiles = kernels().tiles;
  if (tiles && g.a_blocks > 0 && g.rows >= kPrefillRows) {
    prefill(*tiles, g, columns.data(), bias.data());
  } else {
    multiply_by_dots(g, columns.data(), bias.data());
  }
}

}  // namespace arc
