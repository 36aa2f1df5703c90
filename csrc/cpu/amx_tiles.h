// The eight tile registers of AMX, all of 16 rows of 64 bytes: the instructions, or with
// ARC_AO_EMULATE_AMX a model of them in plain code, for tests on machines without.
//
// The functions take the register's number. Where they are macros, it must be a literal: GCC's
// intrinsics paste it into the text of the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef ARC_AO_EMULATE_AMX
#include <immintrin.h>
#endif

namespace {

// What ldtilecfg reads.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64, "fixed by the instruction set");

#ifndef ARC_AO_EMULATE_AMX

inline void tile_configure() {
  const TileConfiguration configuration;
  // GCC's intrinsic names only the first bytes as its input, so GCC 12 may drop the other stores.
  __asm__ volatile("" : : "m"(configuration) : "memory");
  _tile_loadconfig(&configuration);
}

inline void tile_release() { _tile_release(); }

#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, memory, stride) _tile_loadd(tile, memory, stride)
#define tile_store(tile, memory, stride) _tile_stored(tile, memory, stride)
// c[m, n] += sum over 32 k of a[m, k] b[k / 2, n, k % 2], bf16 to fp32
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)

#else

struct alignas(64) EmulatedTile {
  uint8_t bytes[16][64];
};

struct EmulatedTiles {
  EmulatedTile tile[8];
  bool configured;
};

thread_local EmulatedTiles emulated = {};

// Every instruction but the configuration faults without one.
inline EmulatedTile& emulated_tile(int tile) {
  if (!emulated.configured) __builtin_trap();
  return emulated.tile[tile];
}

inline void tile_configure() {
  std::memset(&emulated, 0, sizeof(emulated));
  emulated.configured = true;
}

inline void tile_release() { emulated.configured = false; }

inline void tile_zero(int tile) { std::memset(&emulated_tile(tile), 0, sizeof(EmulatedTile)); }

inline void tile_load(int tile, const void* memory, int64_t stride) {
  EmulatedTile& t = emulated_tile(tile);
  const char* source = static_cast<const char*>(memory);
  for (int64_t row = 0; row < 16; ++row) std::memcpy(t.bytes[row], source + row * stride, 64);
}

inline void tile_store(int tile, void* memory, int64_t stride) {
  const EmulatedTile& t = emulated_tile(tile);
  char* target = static_cast<char*>(memory);
  for (int64_t row = 0; row < 16; ++row) std::memcpy(target + row * stride, t.bytes[row], 64);
}

// The instruction takes and gives subnormal numbers as zeros.
inline float flushed(float v) {
  return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.0f, v) : v;
}

inline float from_bits(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}

// One row of c: the even and the odd channels are summed apart by fused multiplications and
// additions from zero on, and c gets the sum of both sums.
inline void emulated_dot_row(float* c, const uint16_t* a, const EmulatedTile& b) {
  float even[16] = {}, odd[16] = {};
  for (int k = 0; k < 16; ++k) {
    const float a_even = flushed(from_bits(uint32_t(a[2 * k]) << 16));
    const float a_odd = flushed(from_bits(uint32_t(a[2 * k + 1]) << 16));
    uint32_t pairs[16];
    std::memcpy(pairs, b.bytes[k], sizeof(pairs));
    for (int n = 0; n < 16; ++n) {
      const float b_even = flushed(from_bits(pairs[n] << 16));
      const float b_odd = flushed(from_bits(pairs[n] & 0xFFFF0000));
      even[n] = flushed(__builtin_fmaf(a_even, b_even, even[n]));
      odd[n] = flushed(__builtin_fmaf(a_odd, b_odd, odd[n]));
    }
  }
  for (int n = 0; n < 16; ++n) c[n] = flushed(flushed(c[n]) + flushed(even[n] + odd[n]));
}

inline void tile_dot_bf16(int c, int a, int b) {
  EmulatedTile& target = emulated_tile(c);
  for (int64_t row = 0; row < 16; ++row) {
    float sums[16];
    uint16_t values[32];
    std::memcpy(sums, target.bytes[row], sizeof(sums));
    std::memcpy(values, emulated_tile(a).bytes[row], sizeof(values));
    emulated_dot_row(sums, values, emulated_tile(b));
    std::memcpy(target.bytes[row], sums, sizeof(sums));
  }
}

#endif

}  // namespace
