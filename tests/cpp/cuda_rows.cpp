// The CUDA kernels' own row functions, run by one thread of the host: what each thread block of
// quant_augment.cu and each warp of dot_gemm.cu does, in the order in which it does it.
#include <algorithm>
#include <vector>

#include "../../csrc/cuda/dot_rows.h"
#include "../../csrc/cuda/quantize_rows.h"

namespace {

using namespace arc;

template <int kProducer>
Row<kProducer> prepare(const ArcQuantize& q, int64_t m, Lane lane) {
  Row<kProducer> row{q, m};
  if (kProducer == ARC_RMS_NORM || kProducer == ARC_ADD_RMS_NORM) {
    row.inverse_rms = inverse_rms(sum_of_squares(row, lane), q.channels, q.eps);
  }
  return row;
}

template <int kProducer>
void quantize(const ArcQuantize& q) {
  const Lane lane{0, 1};
  std::vector<uint8_t> scales(base_blocks(q));
  if (q.scale_mode == ARC_SCALE_TENSOR) {
    for (int64_t m = 0; m < q.rows; ++m) {
      *q.amax = largest(*q.amax, amax_bits(prepare<kProducer>(q, m, lane), lane));
    }
  }
  for (int64_t m = 0; m < (q.swizzled ? padded_to(q.rows, kTileScaleRows) : q.rows); ++m) {
    if (q.swizzled) pad_scales(q, m, lane);
    if (m >= q.rows) continue;
    const Row<kProducer> row = prepare<kProducer>(q, m, lane);
    const Outer outer = q.scale_mode == ARC_SCALE_STATIC   ? given_outer(*q.outer_scale)
                        : q.scale_mode == ARC_SCALE_TENSOR ? outer_of(*q.amax)
                                                           : outer_of(amax_bits(row, lane));
    q.outer[q.scale_mode == ARC_SCALE_TOKEN ? m : 0] = outer.outer;
    quantize_base(row, outer.inverse, lane, scales.data());
    quantize_extra(row, outer.inverse, lane, scales.data());
  }
}

}  // namespace

extern "C" {

void host_quantize(const ArcQuantize* q) {
  constexpr void (*kQuantize[])(const ArcQuantize&) = {
      quantize<ARC_PLAIN>, quantize<ARC_RMS_NORM>, quantize<ARC_ADD_RMS_NORM>,
      quantize<ARC_SILU_MUL>, quantize<ARC_GELU>, quantize<ARC_TANH_GELU>};
  kQuantize[q->producer](*q);
}

void host_dot(const ArcGemm* g) {
  constexpr int kRows = 4, kCols = 2;
  for (int64_t m = 0; m < g->m; m += kRows) {
    for (int64_t n = 0; n < g->n; n += kCols) {
      float lanes[kWarpLanes][kRows][kCols] = {};
      for (int lane = 0; lane < kWarpLanes; ++lane) {
        dot_lane<kRows, kCols>(*g, m, n, lane, lanes[lane]);
      }
      for (int64_t i = 0; i < std::min<int64_t>(kRows, g->m - m); ++i) {
        for (int64_t j = 0; j < std::min<int64_t>(kCols, g->n - n); ++j) {
          for (int half = kWarpLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) {
              lanes[lane][i][j] = add(lanes[lane][i][j], lanes[lane + half][i][j]);
            }
          }
          store_output(*g, m + i, n + j, lanes[0][i][j]);
        }
      }
    }
  }
}

// One conversion over `count` numbers.
void host_e2m1(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uint8_t(e2m1_code(v[i]));
}
void host_e4m3(const float* v, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = uint8_t(e4m3_bits(v[i]));
}
void host_narrow(const float* v, int64_t count, int32_t number, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow(v[i], Number(number));
}
void host_widen(const uint16_t* v, int64_t count, int32_t number, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widen(v[i], Number(number));
}
}
