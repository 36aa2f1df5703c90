// AVX-512 with BF16: attention by vdpbf16ps. All else of this level is in level_avx512.cpp.
#include <immintrin.h>

#include "attention_tile.h"

namespace {

struct PairDot {
  static f32x16 add(f32x16 sum, uint32_t pair, u32x16 pairs) {
    const __m512bh wide = bits<__m512bh>(_mm512_set1_epi32(int(pair)));
    return bits<f32x16>(_mm512_dpbf16_ps(bits<__m512>(sum), wide, bits<__m512bh>(pairs)));
  }
};

}  // namespace

namespace arc {

extern const AttentionKernels kAttentionBF16;
const AttentionKernels kAttentionBF16 = {pack_values, attend<PairDot>};

}  // namespace arc
