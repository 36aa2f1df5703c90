// arc::search_block_scales, encode_blocks, block_residuals and round_columns on CPUs.
#include "checked_ids.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "operators.h"

namespace arc {
namespace {

constexpr int64_t kGrain = 1 << 14;      // values worth a thread, to encode
constexpr int64_t kSearchedBlocks = 16;  // of kSearchRows rows: the same, to search

void check_values(const TensorRef& values, const std::string& op) {
  ARC_CHECK(values.dtype() == aoti_torch_dtype_float32() && values.dim() == 2 &&
            values.size(1) % kBlock == 0,
        op + ": values must be fp32 [N, K] with K a multiple of 16, got " + text(values.sizes()));
}

struct EncodeArguments {
  EncodeArguments(const std::string& op, Arguments from)
      : values(from.tensor()), scale(from.tensor()) {
    check_values(values, op);
    rows = values.size(0), blocks = values.size(1) / kBlock;
    ARC_CHECK(scale.dtype() == aoti_torch_dtype_uint8() &&
              scale.sizes() == (std::vector<int64_t>{rows, blocks}),
          op + ": scale must be uint8 " + text({rows, blocks}) + ", got " + text(scale.sizes()));
  }

  // run(values, scale, row) for every row.
  template <class Run>
  void for_rows(const Run& run) const {
    const float* x = values.data<float>();
    const uint8_t* codes = scale.data<uint8_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values.size(1)));
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) run(x + n * blocks * kBlock, codes + n * blocks, n);
    });
  }

  TensorRef values, scale;
  int64_t rows = 0, blocks = 0;
};

struct RoundArguments {
  explicit RoundArguments(Arguments from)
      : values(from.tensor()), feedback(from.tensor()), lower(from.tensor()), scale(from.tensor()),
        fine(from.optional_tensor()), outputs(from.optional_tensor()) {
    ARC_CHECK(values.dtype() == aoti_torch_dtype_float32() && values.dim() == 2,
              "round_columns: values must be fp32 [columns, rows], got " + text(values.sizes()));
    columns = values.size(0), rows = values.size(1);
    tiles = (rows + kTileWeightRows - 1) / kTileWeightRows;
    check("feedback", feedback, {columns, rows});
    check("lower", lower, {columns, columns});
    check("scale", scale, {columns, rows});
    if (fine) check("fine", fine, {columns, rows});
    if (outputs) check("outputs", outputs, {tiles, kTileWeightRows, kTileWeightRows});
  }

  static void check(const char* name, const TensorRef& t, const std::vector<int64_t>& sizes) {
    ARC_CHECK(t.dtype() == aoti_torch_dtype_float32() && t.sizes() == sizes,
              std::string("round_columns: ") + name + " must be fp32 " + text(sizes) + ", got " +
                  text(t.sizes()));
  }

  TensorRef values, feedback, lower, scale, fine, outputs;
  int64_t columns = 0, rows = 0, tiles = 0;
};

}  // namespace

void search_block_scales_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const std::string op = "search_block_scales";
  Arguments arguments(stack);
  const TensorRef values = arguments.tensor(), importance = arguments.optional_tensor();
  check_values(values, op);
  const int64_t rows = values.size(0), channels = values.size(1), blocks = channels / kBlock;
  ARC_CHECK(!importance || (importance.dtype() == aoti_torch_dtype_float32() &&
                        importance.sizes() == std::vector<int64_t>{channels}),
        op + ": importance must be fp32 " + text({channels}) + ", got " +
            text(importance.sizes()));
  TensorRef scale = empty_bytes(rows, blocks);
  const float* x = values.data<float>();
  const float* weights = importance ? importance.data<float>() : nullptr;
  uint8_t* codes = scale.data<uint8_t>();
  // By blocks, too: a few long rows serve many threads.
  const int64_t parts = (blocks + kSearchedBlocks - 1) / kSearchedBlocks;
  const int64_t groups = (rows + kSearchRows - 1) / kSearchRows;
  parallel_for(groups * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts * kSearchRows, b = i % parts * kSearchedBlocks;
      kernels().search_weight_rows(
          x + n * channels + b * kBlock, std::min(kSearchRows, rows - n),
          std::min(kSearchedBlocks, blocks - b), blocks,
          weights ? weights + b * kBlock : nullptr, codes + n * blocks + b);
    }
  });
  stack[0] = as_value(scale.release());
}

void encode_blocks_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const EncodeArguments given("encode_blocks", Arguments(stack));
  TensorRef qdata = empty_bytes(given.rows, given.blocks * kBlockBytes);
  uint8_t* out = qdata.data<uint8_t>();
  given.for_rows([&](const float* values, const uint8_t* scale, int64_t n) {
    kernels().encode_row(values, scale, given.blocks, out + n * given.blocks * kBlockBytes);
  });
  stack[0] = as_value(qdata.release());
}

void block_residuals_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const EncodeArguments given("block_residuals", Arguments(stack));
  TensorRef residual = TensorRef::empty(given.values.sizes(), aoti_torch_dtype_float32());
  float* out = residual.data<float>();
  given.for_rows([&](const float* values, const uint8_t* scale, int64_t n) {
    kernels().residual_row(values, scale, given.blocks, out + n * given.blocks * kBlock);
  });
  stack[0] = as_value(residual.release());
}

void round_columns_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const RoundArguments given{Arguments(stack)};
  const int64_t columns = given.columns, rows = given.rows;
  TensorRef codes = empty_bytes(columns, rows);
  TensorRef fine_codes = empty_bytes(given.fine ? columns : 0, rows);
  TensorRef errors = TensorRef::empty({columns, rows}, aoti_torch_dtype_float32());
  ColumnGroup group{};
  group.columns = columns, group.rows = rows;
  group.values = given.values.data<float>(), group.feedback = given.feedback.data<float>();
  group.lower = given.lower.data<float>(), group.scale = given.scale.data<float>();
  group.fine = given.fine ? given.fine.data<float>() : nullptr;
  group.codes = codes.data<uint8_t>(), group.fine_codes = fine_codes.data<uint8_t>();
  group.errors = errors.data<float>();
  const float* outputs = given.outputs ? given.outputs.data<float>() : nullptr;
  parallel_for(given.tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(columns * kTileWeightRows);
    ColumnGroup mine = group;
    mine.scratch = scratch.data();
    for (int64_t t = begin; t < end; ++t) {
      mine.first = t * kTileWeightRows;
      mine.count = std::min(kTileWeightRows, rows - mine.first);
      mine.outputs = outputs ? outputs + t * kTileWeightRows * kTileWeightRows : nullptr;
      kernels().round_columns(mine);
    }
  });
  stack[0] = as_value(codes.release());
  stack[1] = as_value(fine_codes.release());
  stack[2] = as_value(errors.release());
}

}  // namespace arc
