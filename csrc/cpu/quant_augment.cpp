#include "quant_augment.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace arc {
namespace {

constexpr float kLargest = 2688.0f;     // 6 * 448
constexpr float kTinyAmax = 0x1p-116f;  // below it 2688 / amax could overflow
constexpr int64_t kGrain = 1 << 14;     // channels worth a thread

struct OuterScale {
  float inverse, outer;
};

OuterScale outer_of(int32_t amax_bits) {
  float amax;
  std::memcpy(&amax, &amax_bits, sizeof(amax));
  if (amax < kTinyAmax) return {0.0f, 0.0f};
  return {kLargest / amax, amax / kLargest};
}

OuterScale given(float outer) { return {outer == 0.0f ? 0.0f : 1.0f / outer, outer}; }

int64_t grain_of(const Augmentation& how) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, how.channels));
}

int32_t largest_bits(const RowProducer& produce, int64_t rows, const Augmentation& how) {
  std::atomic<int32_t> largest{0};
  parallel_for(rows, grain_of(how), [&](int64_t begin, int64_t end) {
    Scratch<float> row(how.base_blocks() * kBlock);
    int32_t mine = 0;
    for (int64_t m = begin; m < end; ++m) mine = std::max(mine, produce(m, row.data()));
    int32_t seen = largest.load();
    while (seen < mine && !largest.compare_exchange_weak(seen, mine)) {
    }
  });
  return largest.load();
}

// Buffers of one thread.
struct Buffers {
  explicit Buffers(const Augmentation& how)
      : row(how.base_blocks() * kBlock),
        ordered(how.channel_order.data ? row.size() : 0),
        residual(how.residual_blocks() ? row.size() : 0),
        gathered(how.residual_blocks() * kBlock) {}
  Scratch<float> row, ordered, residual, gathered;
};

void gather_residuals(const Augmentation& how, const float* residual, float* out) {
  for (int64_t i = 0; i < how.act_blocks.size; ++i, out += kBlock) {
    std::memcpy(out, residual + how.act_blocks.data[i] * kBlock, kBlock * sizeof(float));
  }
  for (int64_t i = 0; i < how.act_channels.size; ++i) out[i] = residual[how.act_channels.data[i]];
}

void quantize_row(
    const Augmentation& how, float inverse, Buffers& buffers, uint8_t* qdata, uint8_t* scale) {
  const Kernels& k = kernels();
  const int64_t base = how.base_blocks(), extra = how.residual_blocks();
  const float* x = buffers.row.data();
  if (how.channel_order.data) {
    float* ordered = buffers.ordered.data();
    for (int64_t i = 0; i < how.channels; ++i) ordered[i] = x[how.channel_order.data[i]];
    std::fill(ordered + how.channels, ordered + base * kBlock, 0.0f);
    x = ordered;
  }
  float* residual = extra ? buffers.residual.data() : nullptr;
  k.quantize_row(x, inverse, base, how.block_scale, qdata, scale, residual);
  if (extra) {
    float* gathered = buffers.gathered.data();
    gather_residuals(how, residual, gathered);
    k.quantize_row(
        gathered, 1.0f, extra, how.block_scale, qdata + base * kBlockBytes, scale + base,
        nullptr);
  }
  uint8_t* repeated = qdata + (base + extra) * kBlockBytes;
  for (int64_t i = 0; i < how.weight_blocks.size; ++i) {
    const int64_t block = how.weight_blocks.data[i];
    std::memcpy(repeated + i * kBlockBytes, qdata + block * kBlockBytes, kBlockBytes);
    scale[base + extra + i] = scale[block];
  }
}

}  // namespace

void quant_augment(
    const RowProducer& produce, int64_t rows, const Augmentation& how, const Quantized& out) {
  OuterScale common{};
  if (how.mode != ScaleMode::kToken) {
    common = how.mode == ScaleMode::kStatic ? given(*how.outer_scale)
                                            : outer_of(largest_bits(produce, rows, how));
    *out.outer = common.outer;
  }
  const int64_t blocks = how.all_blocks();
  parallel_for(rows, grain_of(how), [&](int64_t begin, int64_t end) {
    Buffers buffers(how);
    for (int64_t m = begin; m < end; ++m) {
      const int32_t amax = produce(m, buffers.row.data());
      const OuterScale outer = how.mode == ScaleMode::kToken ? outer_of(amax) : common;
      if (how.mode == ScaleMode::kToken) out.outer[m] = outer.outer;
      quantize_row(
          how, outer.inverse, buffers, out.qdata + m * blocks * kBlockBytes,
          out.scale + m * blocks);
    }
  });
}

}  // namespace arc
