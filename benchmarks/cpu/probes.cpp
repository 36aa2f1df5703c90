// Ceilings of this machine, measured: read bandwidth, and multiply-add rates from registers alone.
// benchmarks/cpu/probes.py compiles this file once with the flags of the machine it runs on. Loops are
// as wide as the flags allow; what the machine or the compiler lacks returns 0.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// Seconds that `threads` threads need for body(thread), from a common start.
double seconds_of(int threads, const std::function<void(int)>& body) {
  std::atomic<int> waiting{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      ++waiting;
      while (!go) std::this_thread::yield();
      body(t);
    });
  }
  while (waiting < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go = true;
  for (auto& thread : pool) thread.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Operations per second of step(state, repetitions), which does `ops` operations a repetition.
// Repetitions grow until a run takes `seconds`.
template <typename Step>
double rate_of(int threads, double ops, double seconds, const Step& step) {
  for (int64_t repetitions = 1000;; repetitions *= 2) {
    const double taken = seconds_of(threads, [&](int) { step(repetitions); });
    if (taken >= seconds) return ops * double(repetitions) * threads / taken;
  }
}

// Bytes of both signs; products of random data run at a lower clock than those of zeros.
void fill_random(void* out, int64_t size, uint32_t mask) {
  uint32_t state = 12345;
  for (int64_t i = 0; i < size / 4; ++i) {
    state = state * 1664525u + 1013904223u;
    static_cast<uint32_t*>(out)[i] = state & mask;
  }
}

// bf16 and fp32 numbers between 2^-63 and 2, by clearing an exponent bit: no NaN, no infinity.
constexpr uint32_t kFinite = 0xBFFFBFFFu;

volatile float sink;

float sum_bytes(const char* data, int64_t size, int64_t ahead) {
  float total = 0.0f;
#if defined(__AVX512F__)
  __m512i sums[4] = {};
  for (int64_t i = 0; i + 256 <= size; i += 256) {
    for (int j = 0; j < 4; ++j) {
      if (ahead) _mm_prefetch(data + i + 64 * j + ahead, _MM_HINT_T0);
      sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(data + i + 64 * j));
    }
  }
  for (auto& sum : sums) total += float(_mm512_reduce_add_epi32(sum));
#elif defined(__AVX2__)
  __m256i sums[8] = {};
  for (int64_t i = 0; i + 256 <= size; i += 256) {
    for (int j = 0; j < 8; ++j) {
      if (ahead && j % 2 == 0) _mm_prefetch(data + i + 32 * j + ahead, _MM_HINT_T0);
      auto source = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      sums[j] = _mm256_xor_si256(sums[j], _mm256_loadu_si256(source));
    }
  }
  for (auto& sum : sums) total += float(_mm256_extract_epi32(sum, 0));
#else
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 64 <= size; i += 64) {
    if (ahead) __builtin_prefetch(data + i + ahead);
    for (int j = 0; j < 8; ++j) {
      uint64_t word;
      std::memcpy(&word, data + i + 8 * j, 8);
      sums[j] ^= word;
    }
  }
  for (uint64_t sum : sums) total += float(sum & 0xFF);
#endif
  return total;
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

constexpr int kTiles = 8, kTileBytes = 1024;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The permission is for the process, the configuration for the thread.
bool amx_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

void load_tiles() {
  TileConfig config;
  for (int t = 0; t < kTiles; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
  asm volatile("" : "+m"(config));  // the intrinsic names only a part of it as its input
  _tile_loadconfig(&config);
  alignas(64) char data[kTileBytes];
  fill_random(data, sizeof(data), kFinite);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data, 64);
  _tile_loadd(6, data, 64);
  _tile_loadd(7, data, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

void multiply_bf16_tiles(int64_t repetitions) {
  load_tiles();
  for (int64_t i = 0; i < repetitions; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

void multiply_int8_tiles(int64_t repetitions) {
  load_tiles();
  for (int64_t i = 0; i < repetitions; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

#endif

#if defined(__AVX512F__)

constexpr int kChains = 16;  // independent sums, enough to hide the latency

template <typename Vector, typename Multiply>
void multiply_vectors(int64_t repetitions, const Multiply& multiply) {
  alignas(64) char data[(kChains + 2) * 64];
  fill_random(data, sizeof(data), kFinite);
  Vector sums[kChains];  // that differ, or the compiler would keep one of them
  std::memcpy(sums, data, sizeof(sums));
  __m512i left = _mm512_load_si512(data + kChains * 64);
  __m512i right = _mm512_load_si512(data + (kChains + 1) * 64);
  for (int64_t i = 0; i < repetitions; ++i) {
    for (auto& sum : sums) sum = multiply(sum, left, right);
    asm volatile("" : "+v"(left), "+v"(right));  // not the same product twice
  }
  float total = 0.0f;
  for (auto& sum : sums) {
    float first;
    std::memcpy(&first, &sum, sizeof(first));
    total += first;
  }
  sink = total;
}

#endif

}  // namespace

extern "C" {

// Seconds to read `size` bytes once with `threads` threads, prefetching `ahead` bytes.
double arc_probe_read(const char* data, int64_t size, int threads, int64_t ahead) {
  const int64_t part = size / threads / 256 * 256;
  return seconds_of(threads, [&](int t) { sink = sum_bytes(data + t * part, part, ahead); });
}

// Each of the following: operations per second (a multiply-add is two), 0 where it cannot run.

double arc_probe_fp32_fma(int threads, double seconds) {
#if defined(__AVX512F__)
  return rate_of(threads, 2.0 * 16 * kChains, seconds, [](int64_t n) {
    multiply_vectors<__m512>(n, [](__m512 sum, __m512i a, __m512i b) {
      return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    });
  });
#else
  constexpr int kLanes = 8, kSums = 12;
  typedef float Lanes __attribute__((vector_size(4 * kLanes)));
  return rate_of(threads, 2.0 * kLanes * kSums, seconds, [](int64_t n) {
    alignas(32) float data[(2 + kSums) * kLanes];
    fill_random(data, sizeof(data), kFinite);
    Lanes left, right, sums[kSums];  // that differ, or the compiler would keep one of them
    std::memcpy(&left, data, sizeof(left));
    std::memcpy(&right, data + kLanes, sizeof(right));
    std::memcpy(sums, data + 2 * kLanes, sizeof(sums));
    for (int64_t i = 0; i < n; ++i) {
      for (auto& sum : sums) sum += left * right;
      asm volatile("" : "+m"(left), "+m"(right));
    }
    for (const auto& sum : sums) sink = sum[0];
  });
#endif
}

double arc_probe_avx512_bf16(int threads, double seconds) {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return 0.0;
  return rate_of(threads, 2.0 * 32 * kChains, seconds, [](int64_t n) {
    multiply_vectors<__m512>(n, [](__m512 sum, __m512i a, __m512i b) {
      __m512bh left, right;
      std::memcpy(&left, &a, sizeof(left));
      std::memcpy(&right, &b, sizeof(right));
      return _mm512_dpbf16_ps(sum, left, right);
    });
  });
#else
  (void)threads, (void)seconds;
  return 0.0;
#endif
}

double arc_probe_avx512_vnni(int threads, double seconds) {
#if defined(__AVX512VNNI__)
  if (!__builtin_cpu_supports("avx512vnni")) return 0.0;
  return rate_of(threads, 2.0 * 64 * kChains, seconds, [](int64_t n) {
    multiply_vectors<__m512i>(n, [](__m512i sum, __m512i a, __m512i b) {
      return _mm512_dpbusd_epi32(sum, a, b);
    });
  });
#else
  (void)threads, (void)seconds;
  return 0.0;
#endif
}

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

namespace {

bool has_amx(unsigned number_bit) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned needed = (1u << 24) | (1u << number_bit);  // tiles and their number format
  return (d & needed) == needed && amx_allowed();
}

}  // namespace

double arc_probe_amx_bf16(int threads, double seconds) {
  if (!has_amx(22)) return 0.0;
  return rate_of(threads, 4 * 2.0 * 16 * 16 * 32, seconds, multiply_bf16_tiles);
}

double arc_probe_amx_int8(int threads, double seconds) {
  if (!has_amx(25)) return 0.0;
  return rate_of(threads, 4 * 2.0 * 16 * 16 * 64, seconds, multiply_int8_tiles);
}

#else

double arc_probe_amx_bf16(int, double) { return 0.0; }
double arc_probe_amx_int8(int, double) { return 0.0; }

#endif

}  // extern "C"
