// arc::quant_augment and the producers that are fused with it, on CPUs.
#include <algorithm>
#include <cmath>

#include "checked_ids.h"
#include "cpu/dispatch.h"
#include "cpu/swizzled.h"
#include "operators.h"

namespace arc {
namespace {

// Tensors behind an Augmentation, and the Augmentation.
struct AugmentationArguments {
  AugmentationArguments(Arguments& from)
      : act_blocks(from.tensor()),
        weight_blocks(from.tensor()),
        outer_scale(from.optional_tensor()),
        scale_mode(from.string()),
        channel_order(from.optional_tensor()),
        act_channels(from.optional_tensor()),
        block_scale(from.string()) {
    from.string();  // plan: for graph passes alone
    scale_layout = from.string();
  }

  Augmentation resolve(const char* op, int64_t channels) const {
    Augmentation how;
    how.channels = channels;
    const int64_t blocks = how.base_blocks();
    how.act_blocks = ids_of(act_blocks, op, "act_blocks", blocks);
    how.weight_blocks = ids_of(weight_blocks, op, "weight_blocks", blocks);
    how.channel_order = ids_of(channel_order, op, "channel_order", channels);
    how.act_channels = ids_of(act_channels, op, "act_channels", blocks * kBlock);
    const std::string prefix = std::string(op) + ": ";
    ARC_CHECK(block_scale == "amax" || block_scale == "four_over_six" || block_scale == "mse",
          prefix + "block_scale must be one of ('amax', 'four_over_six', 'mse'), got '" +
              block_scale + "'");
    how.block_scale = block_scale == "amax"            ? BlockScale::kAmax
                      : block_scale == "four_over_six" ? BlockScale::kFourOverSix
                                                       : BlockScale::kMse;
    ARC_CHECK(scale_mode == "token" || scale_mode == "tensor" || scale_mode == "static",
          prefix + "scale_mode must be one of ('token', 'tensor', 'static'), got '" + scale_mode +
              "'");
    how.mode = scale_mode == "token"    ? ScaleMode::kToken
               : scale_mode == "tensor" ? ScaleMode::kTensor
                                        : ScaleMode::kStatic;
    ARC_CHECK(scale_layout == "plain" || scale_layout == "swizzled",
          prefix + "scale_layout must be one of ('plain', 'swizzled'), got '" + scale_layout + "'");
    ARC_CHECK((how.mode == ScaleMode::kStatic) == bool(outer_scale),
          prefix + "outer_scale belongs to scale_mode 'static' and only to it, got scale_mode '" +
              scale_mode + "' " + (outer_scale ? "with" : "without") + " outer_scale");
    if (outer_scale) {
      ARC_CHECK(outer_scale.dtype() == aoti_torch_dtype_float32() &&
                outer_scale.sizes() == std::vector<int64_t>{1},
            prefix + "outer_scale must be fp32 [1], got " + text(outer_scale.sizes()));
      how.outer_scale = outer_scale.data<float>();
    }
    ARC_CHECK(!channel_order || how.channel_order.size == channels,
          prefix + "channel_order must have " + std::to_string(channels) + " entries, got " +
              std::to_string(how.channel_order.size));
    ARC_CHECK(how.act_channels.size % kBlock == 0,
          prefix + "act_channels must hold a multiple of 16 channels, got " +
              std::to_string(how.act_channels.size));
    return how;
  }

  TensorRef act_blocks, weight_blocks, outer_scale;
  std::string scale_mode;
  TensorRef channel_order, act_channels;
  std::string block_scale, scale_layout;
};

struct Matrix {
  int64_t rows, channels;
  DType dtype;
};

Matrix matrix_of(const TensorRef& x, const char* op, const char* name = "x") {
  const std::string what = std::string(op) + ": " + name;
  ARC_CHECK(x.dim() > 0, what + " must have at least one dimension [*, K], got a scalar");
  const int64_t channels = x.sizes().back();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.sizes().size(); ++i) rows *= x.size(i);
  return {rows, channels, dtype_of(x.dtype(), what)};
}

void check_same(const TensorRef& x, const TensorRef& other, const char* op, const char* name) {
  ARC_CHECK(x.sizes() == other.sizes() && x.dtype() == other.dtype(),
        std::string(op) + ": " + name + " must have the shape and dtype of the first input, " +
            text(x.sizes()) + ", got " + text(other.sizes()));
}

// Codes and scales of `rows` rows of `blocks` blocks.
struct Operand {
  Operand(int64_t rows, int64_t blocks)
      : qdata(empty_bytes(rows, blocks * kBlockBytes)), scale(empty_bytes(rows, blocks)) {}
  TensorRef qdata, scale;
};

// In the layout that Blackwell reads: a copy, since no CPU kernel writes it.
Operand swizzled(const Operand& plain) {
  const int64_t rows = plain.scale.size(0), blocks = plain.scale.size(1);
  const int64_t padded = padded_to(blocks, 2);
  Operand out(0, 0);
  out.qdata = empty_bytes(rows, padded * kBlockBytes);
  out.scale =
      empty_bytes(padded_to(rows, kTileScaleRows), padded_to(padded, kTileScaleBlocks));
  pad_rows(plain.qdata.data<uint8_t>(), rows, blocks, padded, out.qdata.data<uint8_t>());
  swizzle_scales(plain.scale.data<uint8_t>(), rows, blocks, out.scale.data<uint8_t>());
  return out;
}

// Quantizes what `produce` makes of the rows of `matrix` and puts the three results on the stack.
void quantize_onto(
    StableIValue* stack, const char* op, const Matrix& matrix,
    const AugmentationArguments& arguments, const RowProducer& produce) {
  const Augmentation how = arguments.resolve(op, matrix.channels);
  const int64_t rows = matrix.rows, outers = how.mode == ScaleMode::kToken ? rows : 1;
  Operand operand(rows, how.all_blocks());
  TensorRef outer = TensorRef::empty({outers}, aoti_torch_dtype_float32());
  quant_augment(
      produce, rows, how,
      {operand.qdata.data<uint8_t>(), operand.scale.data<uint8_t>(), outer.data<float>()});
  if (arguments.scale_layout == "swizzled") operand = swizzled(operand);
  stack[0] = as_value(operand.qdata.release());
  stack[1] = as_value(operand.scale.release());
  stack[2] = as_value(outer.release());
}

const char* row_of(const TensorRef& x, const Matrix& matrix, int64_t m) {
  return x.data<char>() + m * matrix.channels * size_of(matrix.dtype);
}

// 1 / sqrt(mean(x^2) + eps), the mean in double so that no order of summation shows in the bits.
float inverse_rms(const float* x, int64_t channels, float eps) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= channels; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += double(x[i + lane]) * x[i + lane];
  }
  for (; i < channels; ++i) sums[0] += double(x[i]) * x[i];
  double sum = 0;
  for (double part : sums) sum += part;
  const float mean = float(sum / double(channels));
  return 1.0f / std::sqrt(mean + eps);
}

void check_norm_weight(const TensorRef& weight, const TensorRef& x, const char* op) {
  ARC_CHECK(weight.sizes() == std::vector<int64_t>{x.sizes().back()} && weight.dtype() == x.dtype(),
        std::string(op) + ": weight must have shape [" + std::to_string(x.sizes().back()) +
            "] and the dtype of x, got " + text(weight.sizes()));
}

}  // namespace

void quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "quant_augment";
  Arguments arguments(stack);
  const TensorRef x = arguments.tensor();
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x, op);
  const auto produce = [&](int64_t m, float* out) {
    return kernels().load_row(row_of(x, matrix, m), matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, op, matrix, augmentation, produce);
}

void rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "rms_norm_quant_augment";
  Arguments arguments(stack);
  const TensorRef x = arguments.tensor(), weight = arguments.tensor();
  const float eps = float(arguments.scalar<double>());
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x, op);
  check_norm_weight(weight, x, op);
  const void* gain = weight.data<void>();
  const auto produce = [&](int64_t m, float* out) {
    kernels().load_row(row_of(x, matrix, m), matrix.dtype, matrix.channels, out);
    const float inverse = inverse_rms(out, matrix.channels, eps);
    return kernels().norm_row(out, gain, matrix.dtype, inverse, matrix.channels, out);
  };
  quantize_onto(stack, op, matrix, augmentation, produce);
}

void add_rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "add_rms_norm_quant_augment";
  Arguments arguments(stack);
  const TensorRef x = arguments.tensor(), residual = arguments.tensor();
  const TensorRef weight = arguments.tensor();
  const float eps = float(arguments.scalar<double>());
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x, op);
  check_same(x, residual, op, "residual");
  check_norm_weight(weight, x, op);
  TensorRef sum = TensorRef::empty(x.sizes(), x.dtype());
  const void* gain = weight.data<void>();
  const auto produce = [&](int64_t m, float* out) {
    char* total = const_cast<char*>(row_of(sum, matrix, m));
    kernels().add_row(
        row_of(x, matrix, m), row_of(residual, matrix, m), matrix.dtype, matrix.channels, out);
    kernels().store_row(out, matrix.dtype, matrix.channels, total);
    const float inverse = inverse_rms(out, matrix.channels, eps);
    return kernels().norm_row(out, gain, matrix.dtype, inverse, matrix.channels, out);
  };
  quantize_onto(stack, op, matrix, augmentation, produce);
  stack[3] = as_value(sum.release());
}

void silu_mul_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "silu_mul_quant_augment";
  Arguments arguments(stack);
  const TensorRef gate = arguments.tensor(), up = arguments.tensor();
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(gate, op, "gate");
  check_same(gate, up, op, "up");
  const auto produce = [&](int64_t m, float* out) {
    return kernels().silu_mul_row(
        row_of(gate, matrix, m), row_of(up, matrix, m), matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, op, matrix, augmentation, produce);
}

void gelu_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "gelu_quant_augment";
  Arguments arguments(stack);
  const TensorRef x = arguments.tensor(), up = arguments.optional_tensor();
  const std::string approximate = arguments.string();
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x, op);
  ARC_CHECK(approximate == "none" || approximate == "tanh",
        "gelu_quant_augment: approximate must be one of ('none', 'tanh'), got '" + approximate +
            "'");
  if (up) check_same(x, up, op, "up");
  const auto produce = [&](int64_t m, float* out) {
    return kernels().gelu_row(
        row_of(x, matrix, m), up ? row_of(up, matrix, m) : nullptr, approximate == "tanh",
        matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, op, matrix, augmentation, produce);
}

}  // namespace arc
