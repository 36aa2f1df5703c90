// arc::nvfp4_gemm on CPUs.
#include "checked_ids.h"
#include "cpu/nvfp4_gemm.h"
#include "cpu/swizzled.h"
#include "operators.h"

namespace arc {
namespace {

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

// The operands of one call, in schema order; refused where they do not fit.
struct GemmArguments {
  explicit GemmArguments(Arguments from)
      : a(from.tensor()),
        a_scale(from.tensor()),
        a_outer(from.tensor()),
        b(from.tensor()),
        b_scale(from.tensor()),
        b_outer(from.tensor()),
        bias(from.optional_tensor()),
        out_dtype(from.scalar<int32_t>()),
        act_blocks(from.optional_tensor()),
        base_blocks(from.scalar<int64_t>()),
        layout(from.string()) {
    ARC_CHECK(layout == "plain" || layout == "panels" || layout == "swizzled",
          "nvfp4_gemm: b_layout must be 'plain', 'panels' or 'swizzled', got '" + layout + "'");
    if (layout == "swizzled") take_plain_scales();
    check_blocks();
    check_outputs();
  }

  // No CPU kernel reads swizzled scales; b holds its repeated blocks there.
  void take_plain_scales() {
    check_swizzled(a, a_scale, b, b_scale);
    a_scale = unswizzled(a_scale, a.size(0), a.size(1) / kBlockBytes);
    b_scale = unswizzled(b_scale, b.size(0), b.size(1) / kBlockBytes);
    act_blocks = TensorRef();
  }

  void check_blocks() const {
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
  }

  void check_outputs() const {
    const int64_t rows = a.size(0), cols = b.size(0);
    const int32_t fp32 = aoti_torch_dtype_float32();
    ARC_CHECK(a_outer.dtype() == fp32 && a_outer.dim() == 1 &&
              (a_outer.size(0) == 1 || a_outer.size(0) == rows),
          "nvfp4_gemm: a_outer must have shape [1] or [" + std::to_string(rows) + "], got " +
              text(a_outer.sizes()));
    ARC_CHECK(b_outer.dtype() == fp32 && b_outer.numel() == 1,
          "nvfp4_gemm: b_outer must be fp32 [1]");
    ARC_CHECK(!bias || bias.sizes() == std::vector<int64_t>{cols},
          "nvfp4_gemm: bias must have shape [" + std::to_string(cols) + "], got " +
              (bias ? text(bias.sizes()) : ""));
  }

  Gemm gemm(const TensorRef& y) const {
    const Ids ids = ids_of(act_blocks, "nvfp4_gemm", "act_blocks", base_blocks);
    Gemm g{};
    g.rows = a.size(0), g.cols = b.size(0);
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
    return g;
  }

  const TensorRef a;
  TensorRef a_scale;
  const TensorRef a_outer, b;
  TensorRef b_scale;
  const TensorRef b_outer, bias;
  const int32_t out_dtype;
  TensorRef act_blocks;
  const int64_t base_blocks;
  const std::string layout;
};

}  // namespace

void nvfp4_gemm_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const GemmArguments arguments{Arguments(stack)};
  TensorRef y = TensorRef::empty({arguments.a.size(0), arguments.b.size(0)}, arguments.out_dtype);
  nvfp4_gemm(arguments.gemm(y));
  stack[0] = as_value(y.release());
}

}  // namespace arc
