// quant_augment on one row, in phases that the threads of a block share: thread `t` of `step` takes
// the blocks t, t + step, ... On the host the same code runs with one thread, which is how a CPU
// test compares it with arc_ao/ops/quant_augment.py and producers.py.
#pragma once

#include <cstdlib>

#include "arc_ao_cuda.h"
#include "numerics.h"

namespace arc {

struct Lane {
  int64_t t, step;
};

ARC_SHARED int64_t base_blocks(const ArcQuantize& q) {
  return (q.channels + kBlockSize - 1) / kBlockSize;
}

ARC_SHARED int64_t augmented_blocks(const ArcQuantize& q) {
  return base_blocks(q) + q.num_act_blocks + q.num_act_channels / kBlockSize + q.num_weight_blocks;
}

// Blocks in a stored row: where scales are swizzled an even number, so that rows of codes start at
// multiples of 16 bytes, as the matrix units' loads want.
ARC_SHARED int64_t stored_blocks(const ArcQuantize& q) {
  return q.swizzled ? padded_to(augmented_blocks(q), 2) : augmented_blocks(q);
}

// An id read from device memory, where nobody could check it before: outside, the kernel ends.
ARC_SHARED int64_t checked(int64_t id, int64_t limit) {
  if (id < 0 || id >= limit) {
#if defined(__CUDA_ARCH__)
    __trap();
#else
    std::abort();
#endif
  }
  return id;
}

ARC_SHARED uint32_t largest(uint32_t a, uint32_t b) { return a > b ? a : b; }

// A row of what is quantized: x, or what a producer makes of its inputs.
template <int kProducer>
struct Row {
  const ArcQuantize& q;
  int64_t row;
  float inverse_rms = 0.0f;  // of the norms, once it is known

  // Input of a norm at channel k.
  ARC_SHARED float input(int64_t k) const {
    const float x = load_number(q.x, row * q.channels + k, Number(q.number));
    if (kProducer != ARC_ADD_RMS_NORM) return x;
    const float residual = load_number(q.other, row * q.channels + k, Number(q.number));
    return round_to(add(x, residual), Number(q.number));
  }

  ARC_SHARED float at(int64_t k) const {
    const Number number = Number(q.number);
    const float x = input(k);
    if (kProducer == ARC_PLAIN) return x;
    if (kProducer == ARC_SILU_MUL) {
      return silu_mul(x, load_number(q.other, row * q.channels + k, number), number);
    }
    if (kProducer == ARC_GELU || kProducer == ARC_TANH_GELU) {
      const float v = round_to(kProducer == ARC_GELU ? gelu(x) : tanh_gelu(x), number);
      if (!q.other) return v;
      return round_to(mul(v, load_number(q.other, row * q.channels + k, number)), number);
    }
    return normed(x, inverse_rms, load_number(q.weight, k, number), number);
  }

  // Value at a place of the quantized order; zero behind the last channel.
  ARC_SHARED float ordered(int64_t place) const {
    if (place >= q.channels) return 0.0f;
    return at(q.channel_order ? checked(q.channel_order[place], q.channels) : place);
  }

  // The 16 values of a block, times `inverse`.
  ARC_SHARED void block(int64_t b, float inverse, float out[kBlockSize]) const {
    const int64_t first = b * kBlockSize;
    if (kProducer == ARC_PLAIN && !q.channel_order && vectors()) {
      load_vectors(first, out);
    } else {
#pragma unroll
      for (int i = 0; i < kBlockSize; ++i) out[i] = ordered(first + i);
    }
#pragma unroll
    for (int i = 0; i < kBlockSize; ++i) out[i] = mul(out[i], inverse);
  }

  // Whether every block is two aligned 16-byte words of 16-bit numbers.
  ARC_SHARED bool vectors() const {
    return Number(q.number) != Number::kFloat && q.channels % kBlockSize == 0 &&
           reinterpret_cast<uintptr_t>(q.x) % 16 == 0;
  }

  ARC_SHARED void load_vectors(int64_t first, float out[kBlockSize]) const {
    struct alignas(16) Word {
      uint16_t lanes[8];
    };
    const uint16_t* from = static_cast<const uint16_t*>(q.x) + row * q.channels + first;
    const Word words[2] = {
        reinterpret_cast<const Word*>(from)[0], reinterpret_cast<const Word*>(from)[1]};
#pragma unroll
    for (int i = 0; i < kBlockSize; ++i) out[i] = widen(words[i / 8].lanes[i % 8], Number(q.number));
  }
};

// --- Phases before the outer scale is known ---------------------------------------------------

// Of the norms: this lane's part of the sum of squares. Writes the sum of ARC_ADD_RMS_NORM.
template <int kProducer>
ARC_SHARED double sum_of_squares(const Row<kProducer>& row, Lane lane) {
  double total = 0;
  for (int64_t k = lane.t; k < row.q.channels; k += lane.step) {
    const float v = row.input(k);
    if (kProducer == ARC_ADD_RMS_NORM) {
      store_number(row.q.sum, row.row * row.q.channels + k, v, Number(row.q.number));
    }
    total += double(v) * v;
  }
  return total;
}

// Bits of the largest magnitude that this lane sees: those of NaN are above those of Inf.
template <int kProducer>
ARC_SHARED uint32_t amax_bits(const Row<kProducer>& row, Lane lane) {
  uint32_t found = 0;
  if (kProducer == ARC_PLAIN && row.vectors()) {
    for (int64_t b = lane.t; b < row.q.channels / kBlockSize; b += lane.step) {
      float v[kBlockSize];
      row.load_vectors(b * kBlockSize, v);
#pragma unroll
      for (int i = 0; i < kBlockSize; ++i) found = largest(found, abs_bits(v[i]));
    }
    return found;
  }
  for (int64_t k = lane.t; k < row.q.channels; k += lane.step) {
    found = largest(found, abs_bits(row.at(k)));
  }
  return found;
}

// --- One block --------------------------------------------------------------------------------

struct EncodedBlock {
  uint64_t codes;  // element i in bits 4i
  int scale;       // e4m3 bits
};

ARC_SHARED EncodedBlock encode_with(const float xs[kBlockSize], int scale) {
  if (scale == kNanScale) return {0, scale};
  const float reciprocal = divide(1.0f, e4m3_value(scale));
  uint64_t codes = 0;
#pragma unroll
  for (int i = 0; i < kBlockSize; i += 2) {
    const uint32_t pair = e2m1_pair(mul(xs[i], reciprocal), mul(xs[i + 1], reciprocal));
    codes |= uint64_t(pair) << 4 * i;
  }
  return {codes, scale};
}

// xs - q * s
ARC_SHARED float residual_of(float xs, uint64_t codes, int i, float scale) {
  return sub(xs, mul(e2m1_value(uint32_t(codes >> 4 * i) & 15), scale));
}

// As a tree of halves, the order of nvfp4.squared_error.
ARC_SHARED float squared_error(const float xs[kBlockSize], const EncodedBlock& block) {
  float total[kBlockSize];
  const float scale = e4m3_value(block.scale);
#pragma unroll
  for (int i = 0; i < kBlockSize; ++i) {
    const float error = residual_of(xs[i], block.codes, i, scale);
    total[i] = mul(error, error);
  }
#pragma unroll
  for (int half = kBlockSize / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) total[i] = add(total[i], total[i + half]);
  }
  return total[0];
}

// Behind 0, the offsets of nvfp4.CODE_OFFSETS: -1, 1, 4, 5, 6. Not an array, which would be memory.
constexpr int kLaterOffsets = 5;
ARC_SHARED int later_offset(int i) { return i < 2 ? 2 * i - 1 : i + 2; }

// The e4m3 code `offset` from `code`, within those of 2^-9 and 448.
ARC_SHARED int neighbour(int code, int offset) {
  const int moved = code + offset;
  return moved < 1 ? 1 : moved < kNanScale ? moved : kNanScale - 1;
}

// A later candidate wins where its error is strictly less.
struct LeastError {
  EncodedBlock block;
  float error;

  ARC_SHARED void try_scale(const float xs[kBlockSize], int scale) {
    const EncodedBlock tried = encode_with(xs, scale);
    const float its = squared_error(xs, tried);
    if (its < error) {
      block = tried;
      error = its;
    }
  }
};

ARC_SHARED EncodedBlock encode_block(const float xs[kBlockSize], int block_scale) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kBlockSize; ++i) amax = largest(amax, abs_bits(xs[i]));
  const int first = e4m3_bits(mul(bits_as<float>(amax), kSixth));
  const EncodedBlock six = encode_with(xs, first);
  if (block_scale == ARC_BLOCK_AMAX || first == kNanScale) return six;
  LeastError least{six, squared_error(xs, six)};
  if (block_scale == ARC_BLOCK_FOUR_OVER_SIX) {
    least.try_scale(xs, e4m3_bits(mul(bits_as<float>(amax), kQuarter)));
    return least.block;
  }
#pragma unroll 1
  for (int i = 0; i < kLaterOffsets; ++i) least.try_scale(xs, neighbour(first, later_offset(i)));
  return least.block;
}

// --- Phases behind it -------------------------------------------------------------------------

ARC_SHARED uint64_t* codes_at(const ArcQuantize& q, int64_t row, int64_t block) {
  return reinterpret_cast<uint64_t*>(q.qdata) + row * stored_blocks(q) + block;
}

ARC_SHARED void store_scale(const ArcQuantize& q, int64_t row, int64_t block, int scale) {
  const int64_t blocks = stored_blocks(q);
  q.scale[q.swizzled ? swizzled_offset(row, block, blocks) : row * blocks + block] = uint8_t(scale);
}

ARC_SHARED void store_block(
    const ArcQuantize& q, int64_t row, int64_t block, const EncodedBlock& encoded) {
  *codes_at(q, row, block) = encoded.codes;
  store_scale(q, row, block, encoded.scale);
}

// Base blocks. `scales` keeps their e4m3 bits for the phase below; nobody reads them before all
// threads are through.
template <int kProducer>
ARC_SHARED void quantize_base(
    const Row<kProducer>& row, float inverse, Lane lane, uint8_t* scales) {
  for (int64_t b = lane.t; b < base_blocks(row.q); b += lane.step) {
    float xs[kBlockSize];
    row.block(b, inverse, xs);
    const EncodedBlock encoded = encode_block(xs, row.q.block_scale);
    store_block(row.q, row.row, b, encoded);
    scales[b] = uint8_t(encoded.scale);
  }
}

// What the quantization of one channel leaves, its block's scale being known.
template <int kProducer>
ARC_SHARED float residual_at(
    const Row<kProducer>& row, int64_t place, float inverse, const uint8_t* scales) {
  const int bits = scales[place / kBlockSize];
  const float xs = mul(row.ordered(place), inverse), scale = e4m3_value(bits);
  if (bits == kNanScale) return scale;
  return residual_of(xs, e2m1_pair(mul(xs, divide(1.0f, scale)), 0.0f), 0, scale);
}

// Channel that residual block `e` of the row takes its element i from.
ARC_SHARED int64_t residual_place(const ArcQuantize& q, int64_t e, int i) {
  if (e < q.num_act_blocks) return checked(q.act_blocks[e], base_blocks(q)) * kBlockSize + i;
  const int64_t gathered = (e - q.num_act_blocks) * kBlockSize + i;
  return checked(q.act_channels[gathered], base_blocks(q) * kBlockSize);
}

// Residual blocks, repeated blocks, and the block of zeros that makes the number even.
template <int kProducer>
ARC_SHARED void quantize_extra(
    const Row<kProducer>& row, float inverse, Lane lane, const uint8_t* scales) {
  const ArcQuantize& q = row.q;
  const int64_t base = base_blocks(q), residuals = augmented_blocks(q) - base - q.num_weight_blocks;
  for (int64_t b = base + lane.t; b < stored_blocks(q); b += lane.step) {
    const int64_t e = b - base;
    if (e < residuals) {
      float rest[kBlockSize];
#pragma unroll
      for (int i = 0; i < kBlockSize; ++i) {
        rest[i] = residual_at(row, residual_place(q, e, i), inverse, scales);
      }
      store_block(q, row.row, b, encode_block(rest, q.block_scale));
    } else if (b < augmented_blocks(q)) {
      const int64_t source = checked(q.weight_blocks[e - residuals], base);
      store_block(q, row.row, b, {*codes_at(q, row.row, source), scales[source]});
    } else {
      store_block(q, row.row, b, {0, 0});
    }
  }
}

// Swizzled scales behind the last row and behind the last block: zeros.
ARC_SHARED void pad_scales(const ArcQuantize& q, int64_t row, Lane lane) {
  const int64_t blocks = stored_blocks(q);
  const int64_t first = row < q.rows ? blocks : 0;
  for (int64_t b = first + lane.t; b < padded_to(blocks, kTileScaleBlocks); b += lane.step) {
    store_scale(q, row, b, 0);
  }
}

}  // namespace arc
