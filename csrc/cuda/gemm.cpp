// The C interface of the products: which kernel runs, and what it refuses. Nothing here asks a
// device, so all of it can be tested without one.
#include <cstdint>
#include <initializer_list>
#include <string>

#include "arc_ao_cuda.h"
#include "dot_gemm.h"
#include "gemm_table.h"
#include "message.h"

namespace arc {
namespace {

constexpr int64_t kDotRows = 8;  // up to here a product is bound by the weight's bytes: not measured
constexpr int64_t kOutputUnit = 8;  // columns in 16 bytes of output
constexpr int64_t kMaxSize = 0x7FFFFFFF;

// Families that this library holds, by compute capability.
const GemmFamily* family_of(int family) {
#ifdef ARC_AO_SM100
  static const GemmFamily sm100 = sm100_family();
  if (family == 100) return &sm100;
#endif
#ifdef ARC_AO_SM120
  static const GemmFamily sm120 = sm120_family();
  if (family == 120) return &sm120;
#endif
  return nullptr;
}

int family_number(int capability) {
  if (capability == 100 || capability == 103) return 100;
  return capability == 120 || capability == 121 ? 120 : 0;
}

const GemmConfig* config_of(const ArcKernel& kernel) {
  const GemmFamily* family = family_of(kernel.family);
  const bool known = family && kernel.config >= 0 && kernel.config < family->size;
  return known ? &family->configs[kernel.config] : nullptr;
}

std::string size_text(const ArcGemm& g) {
  return "M " + std::to_string(g.m) + ", N " + std::to_string(g.n) + ", K_aug " +
         std::to_string(g.blocks * 16);
}

const char* refusal(const ArcGemm& g) {
  for (int64_t size : {g.m, g.n, g.blocks * 16}) {
    if (size < 1 || size > kMaxSize) {
      return message("nvfp4_gemm: expected sizes of 1 to 2147483647, got " + size_text(g));
    }
  }
  if (g.blocks % 2) {
    return message(
        "nvfp4_gemm: expected K_aug a multiple of 32, as the swizzled layout pads it, got " +
        size_text(g));
  }
  for (const void* p : {g.a, g.a_scale, g.b, g.b_scale}) {
    if (reinterpret_cast<uintptr_t>(p) % 16) {
      return message("nvfp4_gemm: expected operands that start at multiples of 16 bytes");
    }
  }
  for (int number : {g.y_number, g.bias_number}) {
    if (number < ARC_FLOAT || number > ARC_HALF) return message("nvfp4_gemm: dtype out of range");
  }
  return nullptr;
}

// Whether the tiles' epilogue can write this output.
bool fits_tiles(const ArcGemm& g) {
  const bool same = !g.bias || g.bias_number == g.y_number;
  return g.y_number != ARC_FLOAT && same && g.n % kOutputUnit == 0 &&
         reinterpret_cast<uintptr_t>(g.y) % 16 == 0 && reinterpret_cast<uintptr_t>(g.bias) % 16 == 0;
}

// The largest tile that gives every multiprocessor one, else the smallest.
int fitting_config(const GemmFamily& family, const ArcGemm& g, int sm_count) {
  for (int i = 0; i + 1 < family.size; ++i) {
    const GemmConfig& c = family.configs[i];
    const int64_t tiles =
        ((g.m + c.tile_m - 1) / c.tile_m) * ((g.n + c.tile_n - 1) / c.tile_n);
    if (tiles >= sm_count) return i;
  }
  return family.size - 1;
}

const char* unknown(const ArcKernel& kernel) {
  return message(
      "nvfp4_gemm: configuration " + std::to_string(kernel.config) + " of family " +
      std::to_string(kernel.family) + " is not in this library");
}

}  // namespace
}  // namespace arc

const char* arc_ao_cuda_architectures() {
  static const std::string built = [] {
    std::string text = arc::family_of(100) ? "100f" : "";
    if (arc::family_of(120)) text += text.empty() ? "120f" : " 120f";
    return text;
  }();
  return built.c_str();
}

void arc_ao_cuda_struct_sizes(int64_t sizes[3]) {
  sizes[0] = sizeof(ArcQuantize), sizes[1] = sizeof(ArcGemm), sizes[2] = sizeof(ArcKernel);
}

const char* arc_ao_cuda_config(int32_t family, int32_t config, int32_t tile[3]) {
  const arc::GemmConfig* found = arc::config_of({config, family, 0});
  if (!found) return nullptr;
  tile[0] = found->tile_m, tile[1] = found->tile_n, tile[2] = found->tile_k;
  return found->name;
}

const char* arc_ao_cuda_select(
    const ArcGemm* g, int32_t capability, int32_t sm_count, ArcKernel* kernel) {
  if (const char* refused = arc::refusal(*g)) return refused;
  const int number = arc::family_number(capability);
  const arc::GemmFamily* family = arc::family_of(number);
  if (!family) {
    return arc::message(
        "nvfp4_gemm: built for " + std::string(arc_ao_cuda_architectures()) +
        ", not for compute capability " + std::to_string(capability));
  }
  *kernel = {-1, number, 0};
  if (g->m <= arc::kDotRows || !arc::fits_tiles(*g)) return nullptr;
  kernel->config = arc::fitting_config(*family, *g, sm_count);
  kernel->workspace = family->configs[kernel->config].workspace(*g, {0, sm_count});
  return nullptr;
}

const char* arc_ao_cuda_can_implement(const ArcGemm* g, const ArcKernel* kernel) {
  if (const char* refused = arc::refusal(*g)) return refused;
  if (kernel->config == -1) return nullptr;
  const arc::GemmConfig* config = arc::config_of(*kernel);
  if (!config) return arc::unknown(*kernel);
  if (!arc::fits_tiles(*g)) {
    return arc::message(
        "nvfp4_gemm: tiles write 16-bit output with a bias of its dtype and N a multiple of 8, "
        "got " + arc::size_text(*g));
  }
  const char* refused = config->can_implement(*g);
  return refused ? arc::message(
                       "nvfp4_gemm: " + std::string(config->name) + " refuses " +
                       arc::size_text(*g) + ": " + refused)
                 : nullptr;
}

const char* arc_ao_cuda_gemm(
    const ArcGemm* g, const ArcKernel* kernel, int32_t device, int32_t sm_count, void* workspace,
    void* stream) {
  if (const char* refused = arc_ao_cuda_can_implement(g, kernel)) return refused;
  if (const char* error = arc::use_device(device)) return arc::message(error);
  const char* error =
      kernel->config == -1
          ? arc::dot_gemm(*g, stream)
          : arc::config_of(*kernel)->run(*g, {device, sm_count}, workspace, stream);
  return error ? arc::message("nvfp4_gemm: " + arc::size_text(*g) + ": " + error) : nullptr;
}
