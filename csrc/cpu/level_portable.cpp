// The level that every machine has: vector types compiled for the baseline instruction set.
#include "attention_tile.h"
#include "dot_common.h"
#include "linear_rows.h"
#include "producer_rows.h"
#include "round_columns.h"
#include "weight_rows.h"

namespace {

const arc::PairKernels kPairs = {pack_values, attend<PlainDot>, linear_rows<PlainDot>};

}  // namespace

namespace arc {

extern const Kernels kPortable;
const Kernels kPortable = {
    "portable", load_row, store_row, quantize_row, search_weight_rows, encode_row, residual_row,
    round_columns, add_row, silu_mul_row, gelu_row, norm_row,
    unpack_activations, pack_panel, dot_panel_plain, store_products, &kPairs};

}  // namespace arc
