// The operators arc::* for torch's dispatcher: schemas, and the CPU kernels behind them.
//
// The library is self-contained: torch.ops.load_library on it is enough to run a package that
// contains these operators. arc_ao adds the eager meaning and the shapes for tracing.
#include "operators.h"

namespace arc {
namespace {

// The arguments that quant_augment and the fused producers have in common, in schema order.
#define ARC_AUGMENTATION_SCHEMA                                                              \
  "Tensor act_blocks, Tensor weight_blocks, Tensor? outer_scale, str scale_mode, "           \
  "Tensor? channel_order=None, Tensor? act_channels=None, "                                    \
  "str block_scale=\"amax\", str plan=\"\", str scale_layout=\"plain\""

const char* const kSchemas[] = {
    "quant_augment(Tensor x, " ARC_AUGMENTATION_SCHEMA ") -> (Tensor, Tensor, Tensor)",
    "rms_norm_quant_augment(Tensor x, Tensor weight, float eps, " ARC_AUGMENTATION_SCHEMA
    ") -> (Tensor, Tensor, Tensor)",
    "add_rms_norm_quant_augment(Tensor x, Tensor residual, Tensor weight, float eps, "
    ARC_AUGMENTATION_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor)",
    "silu_mul_quant_augment(Tensor gate, Tensor up, " ARC_AUGMENTATION_SCHEMA
    ") -> (Tensor, Tensor, Tensor)",
    "gelu_quant_augment(Tensor x, Tensor? up, str approximate, " ARC_AUGMENTATION_SCHEMA
    ") -> (Tensor, Tensor, Tensor)",
    "search_block_scales(Tensor values, Tensor? importance) -> Tensor",
    "encode_blocks(Tensor values, Tensor scale) -> Tensor",
    "block_residuals(Tensor values, Tensor scale) -> Tensor",
    "round_columns(Tensor values, Tensor feedback, Tensor lower, Tensor scale, Tensor? fine, "
    "Tensor? outputs) -> (Tensor, Tensor, Tensor)",
    "nvfp4_gemm(Tensor a, Tensor a_scale, Tensor a_outer, Tensor b, Tensor b_scale, "
    "Tensor b_outer, Tensor? bias, ScalarType out_dtype, Tensor? act_blocks=None, "
    "int base_blocks=0, str b_layout=\"plain\") -> Tensor",
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale) -> Tensor",
    "bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
};

// Registers at load, once; the libraries live as long as the process.
struct Registration {
  Registration() {
    TorchLibraryHandle definitions = nullptr, cpu = nullptr;
    check_call(
        aoti_torch_library_init_fragment("arc", __FILE__, __LINE__, &definitions), "namespace arc");
    for (const char* schema : kSchemas) {
      check_call(aoti_torch_library_def(definitions, schema), schema);
    }
    check_call(aoti_torch_library_init_impl("arc", "CPU", __FILE__, __LINE__, &cpu), "CPU kernels");
    const std::pair<const char*, void (*)(StableIValue*, uint64_t, uint64_t)> kernels[] = {
        {"quant_augment", quant_augment_boxed},
        {"rms_norm_quant_augment", rms_norm_quant_augment_boxed},
        {"add_rms_norm_quant_augment", add_rms_norm_quant_augment_boxed},
        {"silu_mul_quant_augment", silu_mul_quant_augment_boxed},
        {"gelu_quant_augment", gelu_quant_augment_boxed},
        {"search_block_scales", search_block_scales_boxed},
        {"encode_blocks", encode_blocks_boxed},
        {"block_residuals", block_residuals_boxed},
        {"round_columns", round_columns_boxed},
        {"nvfp4_gemm", nvfp4_gemm_boxed},
        {"attention", attention_boxed},
        {"bf16_linear", bf16_linear_boxed},
    };
    for (const auto& [name, kernel] : kernels) {
      check_call(torch_library_impl(cpu, name, kernel, kTorchVersion), name);
    }
  }
} registration;

}  // namespace
}  // namespace arc
