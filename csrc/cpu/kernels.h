// What every dispatch level implements, as a table of functions. One file per level fills one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace arc {

constexpr int64_t kBlock = 16;   // channels that share a block scale
constexpr int64_t kPanel = 16;   // rows of the weight that the dot products run over together
constexpr int64_t kBlockBytes = kBlock / 2;
constexpr int64_t kSearchRows = 16;  // of a weight whose scales are searched together
constexpr int64_t kPanelBlockBytes = kPanel * kBlockBytes;

enum class DType { kFloat, kHalf, kBFloat16 };

// How a block's scale is chosen: nvfp4.quantize_blocks.
enum class BlockScale { kAmax, kFourOverSix, kMse };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// Activations as the dot products read them, in groups of rows that go over the weights together.
// Integers are twice the e2m1 value, so a block's dot product is exact in int32; within each half
// block of 8 the even channels come before the odd ones, which is the order that the low and high
// nibbles of four packed bytes have.
struct Activations {
  int8_t* codes;    // [groups, blocks, group_rows, 16]
  float* scale;     // [groups, blocks, group_rows], block scale / 4
  int32_t* offset;  // the same, -12 * sum of codes: weights enter as value * 2 + 12
  int64_t blocks, group_rows;

  // Where the first block of a row is; the next one is group_rows further.
  int64_t at(int64_t row) const {
    return row / group_rows * blocks * group_rows + row % group_rows;
  }
};

constexpr int64_t kGroupRows = 8;

// Where products go: y = product * a_outer[m] * b_outer + bias[n].
struct Output {
  int64_t rows, cols;  // of them
  const float* a_outer;
  float b_outer;
  const float* bias;  // whole vectors of 16, or null
  void* y;
  DType y_dtype;
  int64_t y_stride;  // bytes from row to row

  // At most `count` rows from row m on.
  Output from(int64_t m, int64_t count) const {
    Output some = *this;
    some.rows = std::min(count, rows - m);
    some.a_outer += m;
    some.y = static_cast<char*>(y) + m * y_stride;
    return some;
  }
};

// Panels that are decoded once for many rows, two at a time, by chunks of K that stay in L1.
constexpr int64_t kPair = 2;
constexpr int64_t kDecodedBlockBytes = kPanel * kBlock;

struct DecodedChunk {
  const uint8_t* codes;  // [pair, blocks, 4, 64], value * 2 + 12 in the order of Activations::codes
  const float* scale;    // [pair, blocks, 16]
  int64_t first, blocks;  // blocks [first, first + blocks) of A meet it
  int64_t panels;         // 1 or 2 of the pair
};

// What a level adds that multiplies many rows by decoded panels.
struct DecodedKernels {
  // Blocks columns[0 .. blocks) of a packed panel; meanwhile what lies `ahead` bytes behind their
  // codes comes into L2.
  void (*decode_panel)(
      const uint8_t* panel_codes, const uint8_t* panel_scale, const int32_t* columns,
      int64_t blocks, int64_t ahead, uint8_t* codes, float* scale);
  // products [rows, pair, 16] of the first `rows` rows, added to for all chunks but the first.
  void (*multiply)(const Activations& a, int64_t rows, const DecodedChunk& w, float* products);
};

// Rows of queries that share the keys of one head, in the lanes of up to four vectors.
constexpr int64_t kTileQueries = 64;
constexpr int64_t kChunkKeys = 64;  // scores of one chunk stay in L1

struct AttentionTile {
  int64_t rows;  // of queries
  const uint16_t* query[kTileQueries];  // bf16 [channels]
  const void* mask[kTileQueries];       // [keys] of mask_dtype, added to the scores; or null
  int64_t seen[kTileQueries];           // keys that a row sees
  uint16_t* y[kTileQueries];            // bf16 [value_channels]
  DType mask_dtype;
  const uint16_t* key;     // bf16 [keys, channels], rows key_stride apart
  const uint16_t* values;  // bf16 [pairs of keys, value_channels, 2]
  int64_t keys, key_stride, channels, value_channels;
  float scale;
  // Working memory: bf16 [channels / 2, kTileQueries, 2] and [kChunkKeys / 2, kTileQueries, 2], fp32
  // [kChunkKeys, kTileQueries] and [value_channels, kTileQueries].
  uint16_t *queries, *weights;
  float *scores, *sums;
};

// A few rows of bf16 times a weight: y[m, n] = x[m] . w[n] + bias[n], rounded once.
struct LinearRows {
  const uint16_t *x, *w, *bias;  // [rows, channels], [cols, channels], [cols] or null
  uint16_t* y;                   // [rows, cols]
  int64_t rows, cols, channels, x_stride, w_stride, y_stride;
};
constexpr int64_t kLinearRows = 8;  // at most

// On numbers in bf16, which nothing quantizes.
struct PairKernels {
  // Rows 2 j and 2 j + 1 of the values side by side; a missing last row (null) is zeros.
  void (*pack_values)(
      const uint16_t* first, const uint16_t* second, int64_t channels, uint16_t* packed);
  void (*attend)(const AttentionTile& tile);
  void (*linear_rows)(const LinearRows& p);
};

// Columns of a weight that are rounded with error feedback, of up to kTileWeightRows of its rows
// from `first` on. Matrices of the weight are [columns, rows], columns from the last to the first.
constexpr int64_t kTileWeightRows = 64;

struct ColumnGroup {
  int64_t columns, rows, first, count;
  const float *values, *feedback;  // what is rounded; what columns before the group left for these
  const float* lower;              // [columns, columns], factor of the inputs' products
  const float *scale, *fine;       // under which; fine is null, or 0 where a column has no residual
  const float* outputs;            // [64, 64], upper factor of the outputs' products, or null
  uint8_t *codes, *fine_codes;
  float* errors;   // as outputs pass them on
  float* scratch;  // [columns, kTileWeightRows]
};

// Operands of a matrix unit with tile registers: runs of tiles of 16 rows of 64 bytes. A strip is 32
// rows of A, or of W, that is two tiles for each step of 32 channels: [steps, 2, 512] of bf16. A tile
// of A holds [16 rows, 32 channels], one of W [16 pairs of channels, 16 rows, 2]. Of C, a tile holds
// [16 rows, 16 columns] in fp32, and a strip of A with a strip of W gives [2, 2] of them.
constexpr int64_t kTileRows = 16;
constexpr int64_t kStripRows = 2 * kTileRows;
constexpr int64_t kStepChannels = 32;
constexpr int64_t kTileHalves = kTileRows * kStepChannels;  // bf16 numbers of a tile of A or W
constexpr int64_t kStepHalves = 2 * kTileHalves;
constexpr int64_t kTileFloats = kTileRows * kTileRows;
constexpr int64_t kBlockFloats = 4 * kTileFloats;  // C of two strips
constexpr int64_t kNextBytes = 128;

// One strip of A times `w_strips` strips of W that follow one another, over `steps` steps.
struct TileProduct {
  const uint16_t* a;  // [steps, 2, 512]
  const uint16_t* w;  // [w_strips, steps, 2, 512]
  float* c;           // [w_strips, 2, 2, 256]
  int64_t steps, w_strips;
  bool upper_only;  // the second tile of A holds no rows: its half of C is left as it is
  bool add;         // to c, which is overwritten otherwise
  const void *next_a, *next_c;  // needed soon: fetched into L2, kNextBytes of each for a step
};

// What a level with tile registers adds, for many rows of activations.
struct TileKernels {
  void (*configure)();  // by each thread before it multiplies
  void (*release)();
  // Quantized row, [blocks * 8] and [blocks], to row `row` of a strip; a missing last block is zeros.
  void (*decode_row)(
      const uint8_t* qdata, const uint8_t* scale, int64_t blocks, int64_t row, uint16_t* strip);
  // Blocks columns[0 .. blocks) of a packed panel to tiles, kStepHalves apart; the same of the last.
  void (*decode_panel)(
      const uint8_t* panel_codes, const uint8_t* panel_scale, const int32_t* columns,
      int64_t blocks, uint16_t* tiles);
  void (*multiply)(const TileProduct& product);
  void (*store_strip)(const float* c, const Output& out);
};

struct Kernels {
  const char* name;

  // Row [channels] of dtype to fp32; returns the bits of its largest magnitude (NaN above Inf).
  int32_t (*load_row)(const void* x, DType dtype, int64_t channels, float* out);
  // The reverse, rounding to nearest even.
  void (*store_row)(const float* x, DType dtype, int64_t channels, void* out);
  // x [blocks * 16] * inverse to codes [blocks * 8] and e4m3 bits [blocks]; what is left over goes
  // to residual [blocks * 16] unless it is null.
  void (*quantize_row)(
      const float* x, float inverse, int64_t blocks, BlockScale method,
      uint8_t* qdata, uint8_t* scale, float* residual);
  // Scale codes of least squared error of up to kSearchRows rows, for some blocks of each. Values
  // and codes are [rows, row_blocks * 16] and [rows, row_blocks]; importance [blocks * 16] or null.
  void (*search_weight_rows)(
      const float* values, int64_t rows, int64_t blocks, int64_t row_blocks,
      const float* importance, uint8_t* scale);
  // Row [blocks * 16] to codes [blocks * 8] under the scales of its blocks.
  void (*encode_row)(const float* values, const uint8_t* scale, int64_t blocks, uint8_t* qdata);
  // What those codes leave of it, [blocks * 16].
  void (*residual_row)(
      const float* values, const uint8_t* scale, int64_t blocks, float* residual);
  void (*round_columns)(const ColumnGroup& group);
  // x + y rounded to dtype, as fp32.
  void (*add_row)(const void* x, const void* y, DType dtype, int64_t channels, float* out);
  // silu(gate) * up, each step rounded to dtype, as fp32.
  int32_t (*silu_mul_row)(
      const void* gate, const void* up, DType dtype, int64_t channels, float* out);
  // gelu(x), times up unless it is null, each step rounded to dtype, as fp32.
  int32_t (*gelu_row)(
      const void* x, const void* up, bool tanh, DType dtype, int64_t channels, float* out);
  // x * inverse_rms rounded to dtype, times weight, rounded to dtype, as fp32.
  int32_t (*norm_row)(
      const float* x, const void* weight, DType dtype, float inverse_rms, int64_t channels,
      float* out);

  // One quantized row, [blocks * 8] and [blocks], into row `row` of a.
  void (*unpack_activations)(
      const uint8_t* qdata, const uint8_t* scale, const Activations& a, int64_t row);
  // 16 rows of the plain layout (row strides in bytes) to one packed panel of `blocks` blocks.
  void (*pack_panel)(
      const uint8_t* qdata, const uint8_t* scale, int64_t qdata_stride, int64_t scale_stride,
      int64_t blocks, uint8_t* panel_codes, uint8_t* panel_scale);
  // Product [m, n] = sum over blocks j of A[m, j] . panel[n, columns[j]], for the first rows of a.
  void (*dot_panel)(
      const Activations& a, const uint8_t* panel_codes, const uint8_t* panel_scale,
      const int32_t* columns, const Output& out);
  // products [rows, stride] of one panel, scaled and rounded.
  void (*store_products)(const float* products, int64_t stride, const Output& out);

  const PairKernels* pairs;
  const DecodedKernels* decoded = nullptr;  // null where dot_panel serves many rows, too
  const TileKernels* tiles = nullptr;       // null where there are no tile registers
};

}  // namespace arc
