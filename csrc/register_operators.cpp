// The operators arc::* for torch's dispatcher: schemas, and the CPU kernels behind them.
//
// The library is self-contained: torch.ops.load_library on it is enough to run a package that
// contains these operators. arc_ao adds the eager meaning and the shapes for tracing.
#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/nvfp4_gemm.h"
#include "cpu/quant_augment.h"
#include "cpu/swizzled.h"
#include "stable_values.h"

namespace arc {
namespace {

// The arguments that quant_augment and the fused producers have in common, in schema order.
#define ARC_AUGMENTATION_SCHEMA                                                              \
  "Tensor act_blocks, Tensor weight_blocks, Tensor? outer_scale, str scale_mode, "           \
  "Tensor? channel_order=None, Tensor? act_channels=None, bool four_over_six=False, "        \
  "str plan=\"\", str scale_layout=\"plain\""

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
    "nvfp4_gemm(Tensor a, Tensor a_scale, Tensor a_outer, Tensor b, Tensor b_scale, "
    "Tensor b_outer, Tensor? bias, ScalarType out_dtype, Tensor? act_blocks=None, "
    "int base_blocks=0, str b_layout=\"plain\") -> Tensor",
};

Ids ids_of(const TensorRef& tensor, const char* op, const char* name, int64_t limit) {
  if (!tensor) return {};
  ARC_CHECK(tensor.dtype() == aoti_torch_dtype_int32() && tensor.dim() == 1,
        std::string(op) + ": " + name + " must be int32 with one dimension");
  Ids ids{tensor.data<int32_t>(), tensor.numel()};
  for (int64_t i = 0; i < ids.size; ++i) {
    ARC_CHECK(ids.data[i] >= 0 && ids.data[i] < limit,
          std::string(op) + ": " + name + " holds " + std::to_string(ids.data[i]) +
              ", expected 0 to " + std::to_string(limit - 1));
  }
  return ids;
}

// Tensors behind an Augmentation, and the Augmentation.
struct AugmentationArguments {
  AugmentationArguments(Arguments& from)
      : act_blocks(from.tensor()),
        weight_blocks(from.tensor()),
        outer_scale(from.optional_tensor()),
        scale_mode(from.string()),
        channel_order(from.optional_tensor()),
        act_channels(from.optional_tensor()),
        four_over_six(from.scalar<bool>()) {
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
    how.four_over_six = four_over_six;
    const std::string prefix = std::string(op) + ": ";
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
  bool four_over_six;
  std::string scale_layout;
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

TensorRef empty_bytes(int64_t rows, int64_t columns) {
  return TensorRef::empty({rows, columns}, aoti_torch_dtype_uint8());
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

// Quantizes what `produce` makes and puts the three results on the stack.
void quantize_onto(
    StableIValue* stack, const RowProducer& produce, int64_t rows,
    const AugmentationArguments& arguments, const Augmentation& how) {
  Operand operand(rows, how.all_blocks());
  const int64_t outers = how.mode == ScaleMode::kToken ? rows : 1;
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

void quant_augment_boxed(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "quant_augment";
  Arguments arguments(stack);
  const TensorRef x = arguments.tensor();
  const AugmentationArguments augmentation(arguments);
  const Matrix matrix = matrix_of(x, op);
  const char* data = x.data<char>();
  const int64_t stride = matrix.channels * size_of(matrix.dtype);
  const auto produce = [&](int64_t m, float* out) {
    return kernels().load_row(data + m * stride, matrix.dtype, matrix.channels, out);
  };
  quantize_onto(
      stack, produce, matrix.rows, augmentation, augmentation.resolve(op, matrix.channels));
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
  quantize_onto(
      stack, produce, matrix.rows, augmentation, augmentation.resolve(op, matrix.channels));
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
  quantize_onto(
      stack, produce, matrix.rows, augmentation, augmentation.resolve(op, matrix.channels));
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
  quantize_onto(
      stack, produce, matrix.rows, augmentation, augmentation.resolve(op, matrix.channels));
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
  quantize_onto(
      stack, produce, matrix.rows, augmentation, augmentation.resolve(op, matrix.channels));
}

// Codes [rows, 8 * blocks] and scales [rows, blocks] of one operand.
void check_operand(const TensorRef& codes, const TensorRef& scale, const char* name) {
  const bool bytes =
      codes.dtype() == aoti_torch_dtype_uint8() && scale.dtype() == aoti_torch_dtype_uint8();
  ARC_CHECK(bytes && codes.dim() == 2 && scale.dim() == 2 && codes.size(0) == scale.size(0) &&
            codes.size(1) == scale.size(1) * kBlockBytes,
        std::string("nvfp4_gemm: ") + name + " has " + std::to_string(codes.size(0)) +
            " rows of " + std::to_string(2 * codes.size(1)) + " codes and " +
            std::to_string(scale.size(0)) + " rows of " + std::to_string(scale.size(1)) +
            " block scales, expected one scale per 16 codes, all uint8");
}

void check_swizzled(
    const TensorRef& a, const TensorRef& a_scale, const TensorRef& b, const TensorRef& b_scale) {
  ARC_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(1) % 16 == 0,
        "nvfp4_gemm: a has K_aug = " + std::to_string(2 * a.sizes().back()) +
            ", swizzled b has " + std::to_string(2 * b.sizes().back()) +
            ", expected equal multiples of 32; quantize x with the blocks of this weight and "
            "scale_layout 'swizzled'");
  const auto check = [](const TensorRef& codes, const TensorRef& scale, const char* name) {
    const std::vector<int64_t> expected = {
        padded_to(codes.size(0), kTileScaleRows),
        padded_to(codes.size(1) / kBlockBytes, kTileScaleBlocks)};
    ARC_CHECK(scale.sizes() == expected && scale.dtype() == aoti_torch_dtype_uint8(),
          std::string("nvfp4_gemm: ") + name + " has " + std::to_string(codes.size(0)) +
              " rows of " + std::to_string(2 * codes.size(1)) + " codes and scales " +
              text(scale.sizes()) + ", expected swizzled scales " + text(expected));
  };
  check(a, a_scale, "a");
  check(b, b_scale, "b");
}

TensorRef unswizzled(const TensorRef& scale, int64_t rows, int64_t blocks) {
  TensorRef plain = empty_bytes(rows, blocks);
  unswizzle_scales(scale.data<uint8_t>(), rows, blocks, plain.data<uint8_t>());
  return plain;
}

void nvfp4_gemm_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const TensorRef a = arguments.tensor();
  TensorRef a_scale = arguments.tensor();
  const TensorRef a_outer = arguments.tensor();
  const TensorRef b = arguments.tensor();
  TensorRef b_scale = arguments.tensor();
  const TensorRef b_outer = arguments.tensor(), bias = arguments.optional_tensor();
  const int32_t out_dtype = arguments.scalar<int32_t>();
  TensorRef act_blocks = arguments.optional_tensor();
  const int64_t base_blocks = arguments.scalar<int64_t>();
  const std::string layout = arguments.string();

  ARC_CHECK(layout == "plain" || layout == "panels" || layout == "swizzled",
        "nvfp4_gemm: b_layout must be 'plain', 'panels' or 'swizzled', got '" + layout + "'");
  if (layout == "swizzled") {
    check_swizzled(a, a_scale, b, b_scale);
    a_scale = unswizzled(a_scale, a.size(0), a.size(1) / kBlockBytes);
    b_scale = unswizzled(b_scale, b.size(0), b.size(1) / kBlockBytes);
    act_blocks = TensorRef();  // b holds its repeated blocks
  }
  const int64_t repeated = act_blocks ? act_blocks.numel() : 0;
  ARC_CHECK(a.dim() == 2 && b.dim() == 2 &&
            a.size(1) == b.size(1) + repeated * kBlockBytes,
        "nvfp4_gemm: a has K_aug = " + std::to_string(2 * a.sizes().back()) + ", b has " +
            std::to_string(2 * b.sizes().back()) + " plus " + std::to_string(repeated) +
            " repeated blocks of 16; quantize x with the blocks of this weight");
  check_operand(a, a_scale, "a");
  check_operand(b, b_scale, "b");
  ARC_CHECK(!repeated || (base_blocks > 0 && base_blocks <= b_scale.size(1)),
        "nvfp4_gemm: base_blocks must be 1 to " + std::to_string(b_scale.size(1)) +
            ", the blocks of b, where act_blocks repeats some of them, got " +
            std::to_string(base_blocks));
  const int64_t rows = a.size(0), cols = b.size(0);
  const int32_t fp32 = aoti_torch_dtype_float32();
  ARC_CHECK(a_outer.dtype() == fp32 && a_outer.dim() == 1 &&
            (a_outer.size(0) == 1 || a_outer.size(0) == rows),
        "nvfp4_gemm: a_outer must have shape [1] or [" + std::to_string(rows) + "], got " +
            text(a_outer.sizes()));
  ARC_CHECK(b_outer.dtype() == fp32 && b_outer.numel() == 1, "nvfp4_gemm: b_outer must be fp32 [1]");
  ARC_CHECK(!bias || bias.sizes() == std::vector<int64_t>{cols},
        "nvfp4_gemm: bias must have shape [" + std::to_string(cols) + "], got " +
            (bias ? text(bias.sizes()) : ""));
  const Ids ids = ids_of(act_blocks, "nvfp4_gemm", "act_blocks", base_blocks);

  TensorRef y = TensorRef::empty({rows, cols}, out_dtype);
  Gemm g{};
  g.rows = rows, g.cols = cols;
  g.a_blocks = a_scale.size(1), g.b_blocks = b_scale.size(1);
  g.a = a.data<uint8_t>(), g.a_scale = a_scale.data<uint8_t>();
  g.b = b.data<uint8_t>(), g.b_scale = b_scale.data<uint8_t>();
  g.b_in_panels = layout == "panels";
  g.a_outer = a_outer.data<float>(), g.b_outer = b_outer.data<float>();
  g.a_outer_per_row = a_outer.size(0) != 1;
  g.bias = bias ? bias.data<void>() : nullptr;
  g.bias_dtype = bias ? dtype_of(bias.dtype(), "nvfp4_gemm: bias") : DType::kFloat;
  g.act_blocks = ids.data, g.num_act_blocks = ids.size, g.base_blocks = base_blocks;
  g.y = y.data<void>(), g.y_dtype = dtype_of(out_dtype, "nvfp4_gemm: out_dtype");
  nvfp4_gemm(g);
  stack[0] = as_value(y.release());
}

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
        {"nvfp4_gemm", nvfp4_gemm_boxed},
    };
    for (const auto& [name, kernel] : kernels) {
      check_call(torch_library_impl(cpu, name, kernel, kTorchVersion), name);
    }
  }
} registration;

}  // namespace
}  // namespace arc
