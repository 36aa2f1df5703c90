#include "nvfp4_gemm.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace arc {
namespace {

// Unpacked activations that one pass over the weights works on; a part of a usual L2 cache.
constexpr int64_t kActivationBytes = 512 << 10;

int64_t rows_per_pass(const Gemm& g) {
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

// 16 rows of the weight as one packed panel: in place where the weight is stored so.
class PanelReader {
 public:
  explicit PanelReader(const Gemm& g)
      : g_(g),
        codes_(g.b_in_panels && g.cols % kPanel == 0 ? 0 : g.b_blocks * kPanelBlockBytes),
        scale_(codes_.size() ? g.b_blocks * kPanel : 0) {}

  void seek(int64_t panel) {
    const int64_t row = panel * kPanel, stride = g_.b_blocks * kBlockBytes;
    codes = g_.b + row * stride;
    scale = g_.b_scale + row * g_.b_blocks;
    const bool whole = row + kPanel <= g_.cols;
    if (whole && g_.b_in_panels) return;  // the rows behind the last whole panel are stored plain
    if (whole) {
      kernels().pack_panel(
          codes, scale, stride, g_.b_blocks, g_.b_blocks, codes_.data(), scale_.data());
    } else {
      pack_last(row, stride);
    }
    codes = codes_.data();
    scale = scale_.data();
  }

  const uint8_t* codes = nullptr;
  const uint8_t* scale = nullptr;

 private:
  // Fewer than 16 rows: the missing ones repeat the last, and their results are not stored.
  void pack_last(int64_t row, int64_t stride) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t source = std::min(row + n, g_.cols - 1);
      const uint8_t* q = g_.b + source * stride;
      const uint8_t* s = g_.b_scale + source * g_.b_blocks;
      for (int64_t b = 0; b < g_.b_blocks; ++b) {
        uint8_t* target = codes_.data() + b * kPanelBlockBytes + n * 4;
        std::memcpy(target, q + b * kBlockBytes, 4);
        std::memcpy(target + 64, q + b * kBlockBytes + 4, 4);
        scale_.data()[b * kPanel + n] = s[b];
      }
    }
  }

  const Gemm& g_;
  Scratch<uint8_t> codes_, scale_;
};

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

void multiply(
    const Gemm& g, const Activations& a, const int32_t* columns, const float* bias,
    int64_t first_row, int64_t rows) {
  const int64_t panels = (g.cols + kPanel - 1) / kPanel;
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    PanelReader reader(g);
    Scratch<float> out(rows * kPanel);
    for (int64_t panel = begin; panel < end; ++panel) {
      reader.seek(panel);
      kernels().dot_panel(a, rows, reader.codes, reader.scale, columns, out.data());
      store_panel(g, bias, first_row, rows, panel, out.data());
    }
  });
}

}  // namespace

void nvfp4_gemm(const Gemm& g) {
  if (g.rows == 0 || g.cols == 0) return;
  const int64_t pass = std::min(g.rows, rows_per_pass(g));
  const int64_t group = std::min(pass, kGroupRows);
  const int64_t unpacked = (pass + group - 1) / group * group * g.a_blocks;  // blocks
  Scratch<int32_t> columns(g.a_blocks), offset(unpacked);
  Scratch<int8_t> codes(unpacked * kBlock);
  Scratch<float> scale(unpacked), bias(g.bias ? g.cols + kBlock : 0);
  fill_columns(g, columns.data());
  if (g.bias) kernels().load_row(g.bias, g.bias_dtype, g.cols, bias.data());
  const Activations a{codes.data(), scale.data(), offset.data(), g.a_blocks, group};
  for (int64_t first = 0; first < g.rows; first += pass) {
    const int64_t rows = std::min(pass, g.rows - first);
    parallel_for(rows, 4, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int64_t source = (first + m) * g.a_blocks;
        kernels().unpack_activations(g.a + source * kBlockBytes, g.a_scale + source, a, m);
      }
    });
    multiply(g, a, columns.data(), bias.data(), first, rows);
  }
}

}  // namespace arc
