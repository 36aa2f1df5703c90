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
  const bool fits = values.dtype() == fp32() && values.dim() == 2 &&
      values.size(1) % kBlock == 0;
  ARC_CHECK(fits, op + ": values must be fp32 [N, K] with K a multiple of 16, got " + values.is());
  values.check({fp32()}, {kAnySize, kAnySize});
}

struct EncodeArguments {
  explicit EncodeArguments(Arguments from)
      : values(from.tensor("values")), scale(from.tensor("scale")) {
    check_values(values, from.op);
    rows = values.size(0), blocks = values.size(1) / kBlock;
    scale.check({uint8()}, {rows, blocks});
    make_contiguous(values, scale);
  }

  // run(values, scale, row) for every row.
  template <class Run>
  void for_rows(const Run& run) const {
    const float* x = values.data<float>();
    const uint8_t* codes = scale.data<uint8_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values.size(1)));
    parallel_for(blocks ? rows : 0, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) run(x + n * blocks * kBlock, codes + n * blocks, n);
    });
  }

  TensorRef values, scale;
  int64_t rows = 0, blocks = 0;
};

struct RoundArguments {
  explicit RoundArguments(Arguments from)
      : values(from.tensor("values")),
        feedback(from.tensor("feedback")),
        lower(from.tensor("lower")),
        scale(from.tensor("scale")),
        fine(from.optional_tensor("fine")),
        outputs(from.optional_tensor("outputs")) {
    values.check({fp32()}, {kAnySize, kAnySize});
    columns = values.size(0), rows = values.size(1);
    tiles = rows / kTileWeightRows + (rows % kTileWeightRows != 0);
    feedback.check({fp32()}, {columns, rows});
    lower.check({fp32()}, {columns, columns});
    scale.check({fp32()}, {columns, rows});
    if (fine) fine.check({fp32()}, {columns, rows});
    if (outputs) outputs.check({fp32()}, {tiles, kTileWeightRows, kTileWeightRows});
    make_contiguous(values, feedback, lower, scale, fine, outputs);
  }

  TensorRef values, feedback, lower, scale, fine, outputs;
  int64_t columns = 0, rows = 0, tiles = 0;
};

}  // namespace

void search_block_scales_boxed(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments("search_block_scales", stack);
  TensorRef values = arguments.tensor("values");
  TensorRef importance = arguments.optional_tensor("importance");
  check_values(values, arguments.op);
  const int64_t rows = values.size(0), channels = values.size(1), blocks = channels / kBlock;
  if (importance) importance.check({fp32()}, {channels});
  make_contiguous(values, importance);
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
  const EncodeArguments given(Arguments("encode_blocks", stack));
  TensorRef qdata = empty_bytes(given.rows, given.blocks * kBlockBytes);
  uint8_t* out = qdata.data<uint8_t>();
  given.for_rows([&](const float* values, const uint8_t* scale, int64_t n) {
    kernels().encode_row(values, scale, given.blocks, out + n * given.blocks * kBlockBytes);
  });
  stack[0] = as_value(qdata.release());
}

void block_residuals_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const EncodeArguments given(Arguments("block_residuals", stack));
  TensorRef residual = TensorRef::empty(given.values.sizes().vector(), fp32());
  float* out = residual.data<float>();
  given.for_rows([&](const float* values, const uint8_t* scale, int64_t n) {
    kernels().residual_row(values, scale, given.blocks, out + n * given.blocks * kBlock);
  });
  stack[0] = as_value(residual.release());
}

void round_columns_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const RoundArguments given{Arguments("round_columns", stack)};
  const int64_t columns = given.columns, rows = given.rows;
  TensorRef codes = empty_bytes(columns, rows);
  TensorRef fine_codes = empty_bytes(given.fine ? columns : 0, rows);
  TensorRef errors = TensorRef::empty({columns, rows}, fp32());
  ColumnGroup group{};
  group.columns = columns, group.rows = rows;
  group.values = given.values.data<float>(), group.feedback = given.feedback.data<float>();
  group.lower = given.lower.data<float>(), group.scale = given.scale.data<float>();
  group.fine = given.fine ? given.fine.data<float>() : nullptr;
  group.codes = codes.data<uint8_t>(), group.fine_codes = fine_codes.data<uint8_t>();
  group.errors = errors.data<float>();
  const float* outputs = given.outputs ? given.outputs.data<float>() : nullptr;
  parallel_for(columns ? given.tiles : 0, 1, [&](int64_t begin, int64_t end) {
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
