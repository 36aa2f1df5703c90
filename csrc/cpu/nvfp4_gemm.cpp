#include "nvfp4_gemm.h"

#include "dispatch.h"
#include "dot_gemm.h"
#include "prefill.h"
#include "scratch.h"

namespace arc {
namespace {

// Column j of A_aug meets block columns[j] of what is stored of the weight.
void fill_columns(const Gemm& g, int32_t* columns) {
  const int64_t base = g.num_act_blocks ? g.base_blocks : g.b_blocks;
  int64_t j = 0;
  for (int64_t i = 0; i < base; ++i) columns[j++] = int32_t(i);
  for (int64_t i = 0; i < g.num_act_blocks; ++i) columns[j++] = g.act_blocks[i];
  for (int64_t i = base; i < g.b_blocks; ++i) columns[j++] = int32_t(i);
}

}  // namespace

void nvfp4_gemm(const Gemm& g) {
  if (g.rows == 0 || g.cols == 0) return;
  Scratch<int32_t> columns(g.a_blocks);
  Scratch<float> bias(g.bias ? g.cols + kBlock : 0);
  fill_columns(g, columns.data());
  if (g.bias) kernels().load_row(g.bias, g.bias_dtype, g.cols, bias.data());
  const TileKernels* tiles = kernels().tiles;
  if (tiles && g.rows >= kPrefillRows) {
    prefill(*tiles, g, columns.data(), bias.data());
  } else {
    dot_gemm(g, columns.data(), bias.data());
  }
}

}  // namespace arc
