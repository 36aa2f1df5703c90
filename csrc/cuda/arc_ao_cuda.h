// The C interface of libarc_ao_cuda.so: what arc_ao/ops/cuda/blackwell.py calls through ctypes.
//
// Pointers are device pointers, streams are cudaStream_t, sizes count elements. Functions return
// null, or a message that says what was expected and what was found; it stays readable until the
// thread's next call. Nothing here waits for the device or allocates on it, so that every call can
// be captured into a CUDA graph.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ARC_AO_CUDA_API __attribute__((visibility("default")))

enum { ARC_FLOAT = 0, ARC_BFLOAT16 = 1, ARC_HALF = 2 };
enum { ARC_SCALE_TOKEN = 0, ARC_SCALE_TENSOR = 1, ARC_SCALE_STATIC = 2 };
enum { ARC_BLOCK_AMAX = 0, ARC_BLOCK_FOUR_OVER_SIX = 1, ARC_BLOCK_MSE = 2 };
enum {
  ARC_PLAIN = 0,
  ARC_RMS_NORM = 1,
  ARC_ADD_RMS_NORM = 2,
  ARC_SILU_MUL = 3,
  ARC_GELU = 4,
  ARC_TANH_GELU = 5
};

// Rows [rows, channels] of `number`, contiguous, to augmented NVFP4 rows. Unused pointers are null.
struct ArcQuantize {
  const void* x;       // the gate for ARC_SILU_MUL
  const void* other;   // residual of ARC_ADD_RMS_NORM, up of ARC_SILU_MUL, up or null of GELUs
  const void* weight;  // [channels], of the norms
  void* sum;           // [rows, channels], written by ARC_ADD_RMS_NORM
  const int32_t *act_blocks, *weight_blocks, *channel_order, *act_channels;
  const float* outer_scale;  // [1], read for ARC_SCALE_STATIC
  uint32_t* amax;            // [1], zero before the call, for ARC_SCALE_TENSOR
  uint8_t* qdata;            // [rows, blocks * 8]
  uint8_t* scale;            // [rows, blocks], or swizzled
  float* outer;              // [rows] for ARC_SCALE_TOKEN, else [1]
  int64_t rows, channels;
  int64_t num_act_blocks, num_weight_blocks, num_act_channels;
  float eps;
  int32_t number, producer, scale_mode;
  int32_t block_scale;
  // Blocks in a row are base, act, act_channels / 16 and weight blocks; where swizzled, and where
  // that is odd, a block of zeros more.
  int32_t swizzled;
};

// y [m, n] = (a_aug b_aug^T) * a_outer * b_outer + bias, both operands with swizzled scales.
struct ArcGemm {
  const uint8_t *a, *a_scale;  // [m, blocks * 8]
  const float* a_outer;        // [m], or [1]
  const uint8_t *b, *b_scale;  // [n, blocks * 8]
  const float* b_outer;        // [1]
  const void* bias;            // [n] of bias_number, or null
  void* y;                     // [m, n] of y_number
  int64_t m, n, blocks;        // blocks = K_aug / 16, even
  int32_t a_outer_per_row;
  int32_t bias_number, y_number;
};

// Which kernel a product runs on.
struct ArcKernel {
  int32_t config;  // row of the table of the architecture's family, or -1: the dot kernel
  int32_t family;  // 100 or 120
  int64_t workspace;  // bytes
};

ARC_AO_CUDA_API const char* arc_ao_cuda_architectures(void);  // "100f 120f"
ARC_AO_CUDA_API void arc_ao_cuda_struct_sizes(int64_t sizes[3]);

// The table: name of a configuration, or null behind the last one; its tile.
ARC_AO_CUDA_API const char* arc_ao_cuda_config(int32_t family, int32_t config, int32_t tile[3]);

ARC_AO_CUDA_API const char* arc_ao_cuda_quantize(
    const struct ArcQuantize* q, int32_t device, void* stream);

// Chooses the kernel for a device of compute capability `capability` (such as 120) and `sm_count`
// multiprocessors.
ARC_AO_CUDA_API const char* arc_ao_cuda_select(
    const struct ArcGemm* g, int32_t capability, int32_t sm_count, struct ArcKernel* kernel);

// Whether that kernel takes this product: shapes and alignments alone, no device is asked.
ARC_AO_CUDA_API const char* arc_ao_cuda_can_implement(
    const struct ArcGemm* g, const struct ArcKernel* kernel);

ARC_AO_CUDA_API const char* arc_ao_cuda_gemm(
    const struct ArcGemm* g, const struct ArcKernel* kernel, int32_t device, int32_t sm_count,
    void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
