// arc::nvfp4_gemm on CPUs.
#include "checked_ids.h"
#include "cpu/nvfp4_gemm.h"
#include "cpu/swizzled.h"
#include "operators.h"

namespace arc {
namespace {

// Codes [rows, 8 * blocks] and scales [rows, blocks] of one operand.
void check_operand(const TensorRef& codes, const TensorRef& scale) {
  ARC_CHECK(codes.size(0) == scale.size(0) && codes.size(1) == scale.size(1) * kBlockBytes,
        codes.what() + " has " + std::to_string(codes.size(0)) + " rows of " +
            std::to_string(2 * codes.size(1)) + " codes and " + std::to_string(scale.size(0)) +
            " rows of " + std::to_string(scale.size(1)) +
            " block scales, expected one scale per 16 codes");
}

void check_swizzled_operand(const TensorRef& codes, const TensorRef& scale) {
  const int64_t rows = padded_to(codes.size(0), kTileScaleRows);
  const int64_t blocks = padded_to(codes.size(1) / kBlockBytes, kTileScaleBlocks);
  ARC_CHECK(scale.size(0) == rows && scale.size(1) == blocks,
        codes.what() + " has " + std::to_string(codes.size(0)) + " rows of " +
            std::to_string(2 * codes.size(1)) + " codes and scales " +
            text(scale.sizes().vector()) + ", expected swizzled scales " + text({rows, blocks}));
}

TensorRef unswizzled(const TensorRef& scale, int64_t rows, int64_t blocks) {
  TensorRef plain = empty_bytes(rows, blocks);
  unswizzle_scales(scale.data<uint8_t>(), rows, blocks, plain.data<uint8_t>());
  return plain;
}

// The operands of one call, in schema order; refused where they do not fit.
struct GemmArguments {
  explicit GemmArguments(Arguments from)
      : a(from.tensor("a")),
        a_scale(from.tensor("a_scale")),
        a_outer(from.tensor("a_outer")),
        b(from.tensor("b")),
        b_scale(from.tensor("b_scale")),
        b_outer(from.tensor("b_outer")),
        bias(from.optional_tensor("bias")),
        out_dtype(from.scalar<int32_t>()),
        act_blocks(from.optional_tensor("act_blocks")),
        base_blocks(from.scalar<int64_t>()),
        layout_text(from.string()) {
    layout = layout_text.text();
    ARC_CHECK(layout == "plain" || layout == "panels" || layout == "swizzled",
          "nvfp4_gemm: b_layout must be 'plain', 'panels' or 'swizzled', got '" + layout + "'");
    for (const TensorRef* x : {&a, &a_scale, &b, &b_scale}) {
      x->check({uint8()}, {kAnySize, kAnySize});
    }
    check_ids(act_blocks);
    if (layout == "swizzled") check_swizzled();
    else check_blocks();
    check_outputs();
    make_contiguous(a, a_scale, a_outer, b, b_scale, b_outer, bias, act_blocks);
    if (layout == "swizzled") take_plain_scales();
  }

  void check_swizzled() const {
    ARC_CHECK(a.size(1) == b.size(1) && a.size(1) > 0 && a.size(1) % 16 == 0,
          "nvfp4_gemm: a has K_aug = " + std::to_string(2 * a.size(1)) + ", swizzled b has " +
              std::to_string(2 * b.size(1)) +
              ", expected equal multiples of 32; quantize x with the blocks of this weight and "
              "scale_layout 'swizzled'");
    check_swizzled_operand(a, a_scale);
    check_swizzled_operand(b, b_scale);
  }

  // No CPU kernel reads swizzled scales; b holds its repeated blocks there.
  void take_plain_scales() {
    a_scale = unswizzled(a_scale, a.size(0), a.size(1) / kBlockBytes);
    b_scale = unswizzled(b_scale, b.size(0), b.size(1) / kBlockBytes);
    act_blocks = TensorRef();
  }

  void check_blocks() const {
    const int64_t repeated = act_blocks ? act_blocks.size(0) : 0;
    ARC_CHECK(a.size(1) > 0 && a.size(1) == b.size(1) + repeated * kBlockBytes,
          "nvfp4_gemm: a has K_aug = " + std::to_string(2 * a.size(1)) + ", b has " +
              std::to_string(2 * b.size(1)) + " plus " + std::to_string(repeated) +
              " repeated blocks of 16; quantize x with the blocks of this weight");
    check_operand(a, a_scale);
    check_operand(b, b_scale);
    ARC_CHECK(!repeated || (base_blocks > 0 && base_blocks <= b_scale.size(1)),
          "nvfp4_gemm: base_blocks must be 1 to " + std::to_string(b_scale.size(1)) +
              ", the blocks of b, where act_blocks repeats some of them, got " +
              std::to_string(base_blocks));
  }

  void check_outputs() const {
    const int64_t rows = a.size(0);
    a_outer.check({fp32()}, {kAnySize});
    ARC_CHECK(a_outer.size(0) == 1 || a_outer.size(0) == rows,
          "nvfp4_gemm: a_outer must have shape [1] or [" + std::to_string(rows) + "], got " +
              a_outer.is());
    b_outer.check({fp32()}, {1});
    if (bias) bias.check({bf16(), fp16(), fp32()}, {b.size(0)});
    ARC_CHECK(is_floating(out_dtype), "nvfp4_gemm: out_dtype must be bf16, fp16 or fp32, got " +
                                          dtype_text(out_dtype));
  }

  Gemm gemm(const TensorRef& y) const {
    const Ids ids = ids_of(act_blocks, base_blocks);
    Gemm g{};
    g.rows = a.size(0), g.cols = b.size(0);
    g.a_blocks = a_scale.size(1), g.b_blocks = b_scale.size(1);
    g.a = a.data<uint8_t>(), g.a_scale = a_scale.data<uint8_t>();
    g.b = b.data<uint8_t>(), g.b_scale = b_scale.data<uint8_t>();
    g.b_in_panels = layout == "panels";
    g.a_outer = a_outer.data<float>(), g.b_outer = b_outer.data<float>();
    g.a_outer_per_row = a_outer.size(0) != 1;
    g.bias = bias ? bias.data<void>() : nullptr;
    g.bias_dtype = bias ? dtype_of(bias.dtype()) : DType::kFloat;
    g.act_blocks = ids.data, g.num_act_blocks = ids.size, g.base_blocks = base_blocks;
    g.y = y.data<void>(), g.y_dtype = dtype_of(out_dtype);
    return g;
  }

  TensorRef a, a_scale, a_outer, b, b_scale, b_outer, bias;
  const int32_t out_dtype;
  TensorRef act_blocks;
  const int64_t base_blocks;
  const StringRef layout_text;
  std::string layout;
};

}  // namespace

void nvfp4_gemm_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const GemmArguments arguments{Arguments("nvfp4_gemm", stack)};
  TensorRef y = TensorRef::empty({arguments.a.size(0), arguments.b.size(0)}, arguments.out_dtype);
  nvfp4_gemm(arguments.gemm(y));
  stack[0] = as_value(y.release());
}

}  // namespace arc
