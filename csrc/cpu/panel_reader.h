// Blocks of 16 rows of the weight as a packed panel: in place where the weight is stored so.
#pragma once

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "nvfp4_gemm.h"
#include "scratch.h"

namespace arc {

class PanelReader {
 public:
  // At most `blocks` at once.
  PanelReader(const Gemm& g, int64_t blocks)
      : g_(g),
        codes_(g.b_in_panels && g.cols % kPanel == 0 ? 0 : blocks * kPanelBlockBytes),
        scale_(codes_.size() ? blocks * kPanel : 0),
        in_order_(codes_.size() ? blocks : 0) {
    for (int64_t j = 0; j < in_order_.size(); ++j) in_order_.data()[j] = int32_t(j);
  }

  // Makes blocks wanted[0 .. blocks) of the panel blocks columns[0 .. blocks) of codes and scale.
  void seek(int64_t panel, const int32_t* wanted, int64_t blocks) {
    const int64_t row = panel * kPanel;
    const bool whole = row + kPanel <= g_.cols;
    if (whole && g_.b_in_panels) {  // the rows behind the last whole panel are stored plain
      codes = g_.b + row * g_.b_blocks * kBlockBytes;
      scale = g_.b_scale + row * g_.b_blocks;
      columns = wanted;
      return;
    }
    if (whole) pack_runs(row, wanted, blocks);
    else pack_last(row, wanted, blocks);
    codes = codes_.data();
    scale = scale_.data();
    columns = in_order_.data();
  }

  const uint8_t* codes = nullptr;
  const uint8_t* scale = nullptr;
  const int32_t* columns = nullptr;

 private:
  const uint8_t* block_codes(int64_t row, int64_t block) const {
    return g_.b + (row * g_.b_blocks + block) * kBlockBytes;
  }
  const uint8_t* block_scale(int64_t row, int64_t block) const {
    return g_.b_scale + row * g_.b_blocks + block;
  }

  // Blocks that follow one another in the weight are packed together.
  void pack_runs(int64_t row, const int32_t* wanted, int64_t blocks) {
    for (int64_t begin = 0, end; begin < blocks; begin = end) {
      for (end = begin + 1; end < blocks && wanted[end] == wanted[end - 1] + 1;) ++end;
      kernels().pack_panel(
          block_codes(row, wanted[begin]), block_scale(row, wanted[begin]),
          g_.b_blocks * kBlockBytes, g_.b_blocks, end - begin,
          codes_.data() + begin * kPanelBlockBytes, scale_.data() + begin * kPanel);
    }
  }

  // Fewer than 16 rows: the missing ones repeat the last, and their results are not stored.
  void pack_last(int64_t row, const int32_t* wanted, int64_t blocks) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const int64_t source = std::min(row + n, g_.cols - 1);
      for (int64_t j = 0; j < blocks; ++j) {
        const uint8_t* q = block_codes(source, wanted[j]);
        uint8_t* target = codes_.data() + j * kPanelBlockBytes + n * 4;
        std::memcpy(target, q, 4);
        std::memcpy(target + 64, q + 4, 4);
        scale_.data()[j * kPanel + n] = *block_scale(source, wanted[j]);
      }
    }
  }

  const Gemm& g_;
  Scratch<uint8_t> codes_, scale_;
  Scratch<int32_t> in_order_;
};

}  // namespace arc
