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
  explicit AugmentationArguments(Arguments& from) noexcept
      : op(from.op),
        act_blocks(from.tensor("act_blocks")),
        weight_blocks(from.tensor("weight_blocks")),
        outer_scale(from.optional_tensor("outer_scale")),
        scale_mode_text(from.string()),
        channel_order(from.optional_tensor("channel_order")),
        act_channels(from.optional_tensor("act_channels")),
        block_scale_text(from.string()),
        plan(from.string()),
        scale_layout_text(from.string()) {}

  // Of rows of `channels` channels.
  Augmentation resolve(int64_t channels) {
    Augmentation how;
    how.channels = channels;
    how.mode = mode();
    how.block_scale = block_scale();
    check_tensors(channels);
    make_contiguous(act_blocks, weight_blocks, outer_scale, channel_order, act_channels);
    const int64_t blocks = how.base_blocks();
    how.act_blocks = ids_of(act_blocks, blocks);
    how.weight_blocks = ids_of(weight_blocks, blocks);
    how.channel_order = ids_of(channel_order, channels);
    how.act_channels = ids_of(act_channels, blocks * kBlock);
    if (outer_scale) how.outer_scale = outer_scale.data<float>();
    return how;
  }

  bool swizzled() const {
    const std::string layout = scale_layout_text.text();
    ARC_CHECK(layout == "plain" || layout == "swizzled",
          prefix() + "scale_layout must be one of ('plain', 'swizzled'), got '" + layout + "'");
    return layout == "swizzled";
  }

 private:
  std::string prefix() const { return std::string(op) + ": "; }

  ScaleMode mode() const {
    const std::string mode = scale_mode_text.text();
    ARC_CHECK(mode == "token" || mode == "tensor" || mode == "static",
          prefix() + "scale_mode must be one of ('token', 'tensor', 'static'), got '" + mode + "'");
    ARC_CHECK((mode == "static") == bool(outer_scale),
          prefix() + "outer_scale belongs to scale_mode 'static' and only to it, got scale_mode '" +
              mode + "' " + (outer_scale ? "with" : "without") + " outer_scale");
    return mode == "token"    ? ScaleMode::kToken
           : mode == "tensor" ? ScaleMode::kTensor
                              : ScaleMode::kStatic;
  }

  BlockScale block_scale() const {
    const std::string method = block_scale_text.text();
    ARC_CHECK(method == "amax" || method == "four_over_six" || method == "mse",
          prefix() + "block_scale must be one of ('amax', 'four_over_six', 'mse'), got '" + method +
              "'");
    return method == "amax"            ? BlockScale::kAmax
           : method == "four_over_six" ? BlockScale::kFourOverSix
                                       : BlockScale::kMse;
  }

  void check_tensors(int64_t channels) const {
    for (const TensorRef* ids : {&act_blocks, &weight_blocks, &act_channels}) check_ids(*ids);
    if (channel_order) channel_order.check({int32()}, {channels});
    if (outer_scale) outer_scale.check({fp32()}, {1});
    ARC_CHECK(!act_channels || act_channels.size(0) % kBlock == 0,
          prefix() + "act_channels must hold a multiple of 16 channels, got " +
              std::to_string(act_channels.size(0)));
  }

  const char* op;
  TensorRef act_blocks, weight_blocks, outer_scale;
  StringRef scale_mode_text;
  TensorRef channel_order, act_channels;
  StringRef block_scale_text, plan, scale_layout_text;  // plan is for graph passes alone
};

struct Matrix {
  int64_t rows, channels;
  DType dtype;
};

Matrix matrix_of(const TensorRef& x) {
  ARC_CHECK(is_floating(x.dtype()), x.what() + " must be bf16, fp16 or fp32, got " + x.is());
  x.check_memory();
  ARC_CHECK(x.dim() > 0, x.what() + " must have at least one dimension [*, K], got a scalar");
  const Extents sizes = x.sizes();
  const int64_t channels = sizes[sizes.count - 1];
  ARC_CHECK(channels > 0, x.what() + " must have at least one channel, got " + x.is());
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < sizes.count; ++i) {
    ARC_CHECK(!__builtin_mul_overflow(rows, sizes[i], &rows),
          x.what() + " has too many rows, got " + x.is());
  }
  return {rows, channels, dtype_of(x.dtype())};
}

void check_same(const TensorRef& x, const TensorRef& other) {
  ARC_CHECK(x.dtype() == other.dtype() && x.sizes().vector() == other.sizes().vector(),
        other.what() + " must have the shape and dtype of the first input, " + x.is() + ", got " +
            other.is());
  other.check_memory();
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
    StableIValue* stack, const Matrix& matrix, AugmentationArguments& arguments,
    const RowProducer& produce) {
  const bool is_swizzled = arguments.swizzled();
  const Augmentation how = arguments.resolve(matrix.channels);
  const int64_t rows = matrix.rows, outers = how.mode == ScaleMode::kToken ? rows : 1;
  Operand operand(rows, how.all_blocks());
  TensorRef outer = TensorRef::empty({outers}, fp32());
  quant_augment(
      produce, rows, how,
      {operand.qdata.data<uint8_t>(), operand.scale.data<uint8_t>(), outer.data<float>()});
  if (is_swizzled) operand = swizzled(operand);
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

// Of x [*, K] and its norm's weight [K].
Matrix check_norm(const TensorRef& x, const TensorRef& weight) {
  const Matrix matrix = matrix_of(x);
  weight.check({x.dtype()}, {matrix.channels});
  return matrix;
}

}  // namespace

void quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("quant_augment", stack);
  TensorRef x = arguments.tensor("x");
  AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x);
  make_contiguous(x);
  const auto produce = [&](int64_t m, float* out) {
    return kernels().load_row(row_of(x, matrix, m), matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, matrix, augmentation, produce);
}

void rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("rms_norm_quant_augment", stack);
  TensorRef x = arguments.tensor("x"), weight = arguments.tensor("weight");
  const float eps = float(arguments.scalar<double>());
  AugmentationArguments augmentation(arguments);
  const Matrix matrix = check_norm(x, weight);
  make_contiguous(x, weight);
  const void* gain = weight.data<void>();
  const auto produce = [&](int64_t m, float* out) {
    kernels().load_row(row_of(x, matrix, m), matrix.dtype, matrix.channels, out);
    const float inverse = inverse_rms(out, matrix.channels, eps);
    return kernels().norm_row(out, gain, matrix.dtype, inverse, matrix.channels, out);
  };
  quantize_onto(stack, matrix, augmentation, produce);
}

void add_rms_norm_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("add_rms_norm_quant_augment", stack);
  TensorRef x = arguments.tensor("x"), residual = arguments.tensor("residual");
  TensorRef weight = arguments.tensor("weight");
  const float eps = float(arguments.scalar<double>());
  AugmentationArguments augmentation(arguments);
  const Matrix matrix = check_norm(x, weight);
  check_same(x, residual);
  make_contiguous(x, residual, weight);
  TensorRef sum = TensorRef::empty(x.sizes().vector(), x.dtype());
  const void* gain = weight.data<void>();
  const auto produce = [&](int64_t m, float* out) {
    char* total = const_cast<char*>(row_of(sum, matrix, m));
    kernels().add_row(
        row_of(x, matrix, m), row_of(residual, matrix, m), matrix.dtype, matrix.channels, out);
    kernels().store_row(out, matrix.dtype, matrix.channels, total);
    const float inverse = inverse_rms(out, matrix.channels, eps);
    return kernels().norm_row(out, gain, matrix.dtype, inverse, matrix.channels, out);
  };
  quantize_onto(stack, matrix, augmentation, produce);
  stack[3] = as_value(sum.release());
}

void silu_mul_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("silu_mul_quant_augment", stack);
  TensorRef gate = arguments.tensor("gate"), up = arguments.tensor("up");
  AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(gate);
  check_same(gate, up);
  make_contiguous(gate, up);
  const auto produce = [&](int64_t m, float* out) {
    return kernels().silu_mul_row(
        row_of(gate, matrix, m), row_of(up, matrix, m), matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, matrix, augmentation, produce);
}

void gelu_quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("gelu_quant_augment", stack);
  TensorRef x = arguments.tensor("x"), up = arguments.optional_tensor("up");
  const StringRef approximate_text = arguments.string();
  AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x);
  if (up) check_same(x, up);
  const std::string approximate = approximate_text.text();
  ARC_CHECK(approximate == "none" || approximate == "tanh",
        "gelu_quant_augment: approximate must be one of ('none', 'tanh'), got '" + approximate +
            "'");
  make_contiguous(x, up);
  const auto produce = [&](int64_t m, float* out) {
    return kernels().gelu_row(
        row_of(x, matrix, m), up ? row_of(up, matrix, m) : nullptr, approximate == "tanh",
        matrix.dtype, matrix.channels, out);
  };
  quantize_onto(stack, matrix, augmentation, produce);
}

}  // namespace arc
