#include "dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace arc {

extern const Kernels kPortable;
#ifdef ARC_AO_AVX2
extern const Kernels kAVX2;
#endif
#ifdef ARC_AO_AVX512
extern const Kernels kAVX512;
#endif
#if defined(ARC_AO_AVX512) && defined(ARC_AO_AVX512BF16)
#define ARC_AO_PAIR_PRODUCTS
extern const PairKernels kPairsBF16;
#endif
#if defined(ARC_AO_AMX) && defined(ARC_AO_AVX512)
#define ARC_AO_TILES
extern const TileKernels kAMXTiles;
#endif

namespace {

struct Level {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;  // null where the compiler could not build it
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni");
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
#endif

#if defined(ARC_AO_EMULATE_AMX)
bool has_amx() { return has_avx512(); }
#elif defined(__x86_64__) && defined(__linux__)
// Linux gives a process the tile registers when it asks for them, once.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
bool has_amx() {
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & kBFloat16) && (edx & kTiles) && tiles_permitted();
}
#else
bool has_amx() { return false; }
#endif

#ifdef ARC_AO_AVX512
// With dot products of bf16 where the machine has them.
const Kernels kBestAVX512 = [] {
  Kernels kernels = kAVX512;
#ifdef ARC_AO_PAIR_PRODUCTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16")) kernels.pairs = &kPairsBF16;
#endif
  return kernels;
}();
#endif

#ifdef ARC_AO_TILES
// AVX-512 for few rows, tiles for many.
const Kernels kAMX = [] {
  Kernels kernels = kBestAVX512;
  kernels.name = "amx";
  kernels.tiles = &kAMXTiles;
  return kernels;
}();
#endif

const Level kLevels[] = {
    {"portable", [] { return true; }, &kPortable},
#ifdef ARC_AO_AVX2
    {"avx2", has_avx2, &kAVX2},
#else
    {"avx2", has_avx2, nullptr},
#endif
#ifdef ARC_AO_AVX512
    {"avx512", has_avx512, &kBestAVX512},
#else
    {"avx512", has_avx512, nullptr},
#endif
#ifdef ARC_AO_TILES
    {"amx", has_amx, &kAMX},
#else
    {"amx", has_amx, nullptr},
#endif
};

const Kernels* best_up_to(const char* cap) {
  const Kernels* best = nullptr;
  for (const Level& level : kLevels) {
    if (level.kernels && level.supported()) best = level.kernels;
    if (cap && std::strcmp(cap, level.name) == 0) return best;
  }
  return cap ? nullptr : best;
}

const Kernels* at_start() {
  const char* cap = std::getenv("ARC_AO_CPU_LEVEL");
  const Kernels* found = best_up_to(cap && *cap ? cap : nullptr);
  if (found) return found;
  std::fprintf(
      stderr, "arc_ao: ARC_AO_CPU_LEVEL=%s is no level; expected portable, avx2, avx512 or amx\n",
      cap);
  return best_up_to(nullptr);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{at_start()};
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace arc

extern "C" {

int arc_ao_set_cpu_level(const char* name) {
  const arc::Kernels* found = arc::best_up_to(name);
  if (!found) return -1;
  arc::current().store(found);
  return 0;
}

const char* arc_ao_cpu_level() { return arc::kernels().name; }

int arc_ao_pairs_are_fast() {
#ifdef ARC_AO_PAIR_PRODUCTS
  return arc::kernels().pairs == &arc::kPairsBF16 && !arc::kernels().tiles;
#else
  return 0;
#endif
}

const char* arc_ao_cpu_features() {
  static const std::string text = [] {
    std::string out;
    for (const arc::Level& level : arc::kLevels) {
      if (!out.empty()) out += ", ";
      out += level.name;
      if (!level.supported()) out += " (not on this machine)";
      else if (!level.kernels) out += " (not built: the compiler lacks it)";
    }
    return out;
  }();
  return text.c_str();
}
}
