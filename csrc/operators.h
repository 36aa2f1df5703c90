// The operators arc::* as torch's dispatcher calls them: arguments from the stack, results onto it.
#pragma once

#include "stable_values.h"

namespace arc {

void quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t);
void rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t);
void add_rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t);
void silu_mul_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t);
void gelu_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t);
void search_block_scales_boxed(StableIValue* stack, uint64_t, uint64_t);
void encode_blocks_boxed(StableIValue* stack, uint64_t, uint64_t);
void block_residuals_boxed(StableIValue* stack, uint64_t, uint64_t);
void round_columns_boxed(StableIValue* stack, uint64_t, uint64_t);
void nvfp4_gemm_boxed(StableIValue* stack, uint64_t, uint64_t);
void attention_boxed(StableIValue* stack, uint64_t, uint64_t);
void bf16_linear_boxed(StableIValue* stack, uint64_t, uint64_t);

}  // namespace arc
