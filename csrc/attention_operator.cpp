// arc::attention on CPUs.
#include <cmath>

#include "cpu/attention.h"
#include "operators.h"

namespace arc {
namespace {

constexpr const char* kOp = "attention: ";

// Four sizes, those that are missing in front being 1.
std::vector<int64_t> padded_to_four(const Extents& from, int64_t with) {
  std::vector<int64_t> values = from.vector();
  values.insert(values.begin(), size_t(std::max<int64_t>(0, 4 - int64_t(values.size()))), with);
  return values;
}

template <typename T>
Strided<T> strided(const TensorRef& x) {
  const Extents strides = x.strides();
  return {x.data<T>(), strides[0], strides[1], strides[2]};
}

struct AttentionArguments {
  explicit AttentionArguments(Arguments from)
      : query(from.tensor("query")),
        key(from.tensor("key")),
        value(from.tensor("value")),
        mask(from.optional_tensor("attn_mask")),
        causal(from.scalar<bool>()),
        scale(float(from.scalar<double>())) {
    check_inputs();
    if (mask) check_mask();
    ARC_CHECK(std::isfinite(scale), std::string(kOp) + "scale must be finite, also in fp32, got " +
                                        std::to_string(scale));
    for (TensorRef* x : {&query, &key, &value}) *x = std::move(*x).rows_contiguous();
    if (mask) mask = std::move(mask).rows_contiguous();
  }

  void check_inputs() const {
    for (const TensorRef* x : {&query, &key, &value}) {
      x->check({bf16()}, {kAnySize, kAnySize, kAnySize, kAnySize});
    }
    ARC_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
              value.size(1) == key.size(1) && value.size(2) == key.size(2) &&
              key.size(3) == query.size(3),
          std::string(kOp) + "expected query [B, H, T, D], key [B, Hk, L, D], value [B, Hk, L, Dv]"
              ", got " + query.is() + ", " + key.is() + ", " + value.is());
    ARC_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0 && query.size(3) % 2 == 0,
          std::string(kOp) + "query heads must be a multiple of key heads and D even, got " +
              query.is() + " and " + key.is());
  }

  void check_mask() const {
    const std::vector<int64_t> sizes = padded_to_four(mask.sizes(), 1);
    const std::vector<int64_t> scores = {
        query.size(0), query.size(1), query.size(2), key.size(2)};
    bool fits = mask.dim() > 0 && sizes.size() == 4 && sizes[3] == scores[3];
    for (size_t i = 0; i < 3 && fits; ++i) fits = sizes[i] == 1 || sizes[i] == scores[i];
    ARC_CHECK(fits && holds({bf16(), fp32()}, mask.dtype()) && !causal,
          std::string(kOp) + "attn_mask must be bf16 or fp32, broadcastable to " + text(scores) +
              " but for its last dimension, and alone, without is_causal; got " + mask.is() +
              (causal ? " and is_causal" : ""));
    mask.check_memory();
  }

  Strided<const char> mask_rows() const {
    const int64_t size = size_of(dtype_of(mask.dtype()));
    const std::vector<int64_t> sizes = padded_to_four(mask.sizes(), 1);
    const std::vector<int64_t> strides = padded_to_four(mask.strides(), 0);
    const auto step = [&](size_t i) { return sizes[i] == 1 ? 0 : strides[i] * size; };
    return {mask.data<char>(), step(0), step(1), step(2)};
  }

  Attention attention(const TensorRef& y) const {
    Attention a{};
    a.batch = query.size(0), a.heads = query.size(1), a.queries = query.size(2);
    a.channels = query.size(3), a.key_heads = key.size(1), a.keys = key.size(2);
    a.value_channels = value.size(3);
    a.query = strided<const uint16_t>(query), a.key = strided<const uint16_t>(key);
    a.value = strided<const uint16_t>(value), a.y = strided<uint16_t>(y);
    if (mask) {
      a.mask = mask_rows();
      a.mask_dtype = dtype_of(mask.dtype());
    }
    a.causal = causal, a.scale = scale;
    return a;
  }

  // [B, H, T, Dv], the heads of a token side by side.
  TensorRef result() const {
    const int64_t heads = query.size(1), queries = query.size(2), channels = value.size(3);
    return TensorRef::empty_strided(
        {query.size(0), heads, queries, channels},
        {queries * heads * channels, channels, heads * channels, 1}, query.dtype());
  }

  TensorRef query, key, value, mask;
  const bool causal;
  const float scale;
};

}  // namespace

void attention_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const AttentionArguments arguments{Arguments("attention", stack)};
  TensorRef y = arguments.result();
  if (y.numel() > 0) attention(arguments.attention(y));
  stack[0] = as_value(y.release());
}

}  // namespace arc
