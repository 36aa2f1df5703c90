// AVX-512 with BF16: products of bf16 by vdpbf16ps. All else of this level is in level_avx512.cpp.
#include <immintrin.h>

#include "attention_tile.h"
#include "linear_rows.h"

namespace {

struct PairDot {
  static f32x16 add(f32x16 sum, u32x16 a, u32x16 b) {
    return bits<f32x16>(
        _mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
  }
};

}  // namespace

namespace arc {

extern const PairKernels kPairsBF16;
const PairKernels kPairsBF16 = {pack_values, attend<PairDot>, linear_rows<PairDot>};

}  // namespace arc
