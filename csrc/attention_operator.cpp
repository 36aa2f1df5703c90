// arc::attention on CPUs.
#include "cpu/attention.h"
#include "operators.h"

namespace arc {
namespace {

constexpr const char* kOp = "attention: ";

// Four sizes, those that are missing in front being 1.
std::vector<int64_t> padded_to_four(std::vector<int64_t> values, int64_t with) {
  values.insert(values.begin(), size_t(std::max<int64_t>(0, 4 - int64_t(values.size()))), with);
  return values;
}

template <typename T>
Strided<T> strided(const TensorRef& x) {
  const std::vector<int64_t> strides = x.strides();
  return {x.data<T>(), strides[0], strides[1], strides[2]};
}

struct AttentionArguments {
  explicit AttentionArguments(Arguments from)
      : query(from.strided_tensor()),
        key(from.strided_tensor()),
        value(from.strided_tensor()),
        mask(from.optional_strided_tensor()),
        causal(from.scalar<bool>()),
        scale(from.scalar<double>()) {
    check_inputs();
    if (mask) check_mask();
  }

  void check_inputs() const {
    for (const TensorRef* x : {&query, &key, &value}) {
      ARC_CHECK(x->dim() == 4 && x->dtype() == aoti_torch_dtype_bfloat16(),
            std::string(kOp) + "query, key and value must be bf16 of four dimensions, got " +
                text(x->sizes()));
    }
    ARC_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0) &&
              value.size(1) == key.size(1) && value.size(2) == key.size(2) &&
              key.size(3) == query.size(3),
          std::string(kOp) + "expected query [B, H, T, D], key [B, Hk, L, D], value [B, Hk, L, Dv]"
              ", got " + text(query.sizes()) + ", " + text(key.sizes()) + ", " +
              text(value.sizes()));
    ARC_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0 && query.size(3) % 2 == 0,
          std::string(kOp) + "query heads must be a multiple of key heads and D even, got " +
              text(query.sizes()) + " and " + text(key.sizes()));
  }

  void check_mask() const {
    const std::vector<int64_t> sizes = padded_to_four(mask.sizes(), 1);
    const std::vector<int64_t> scores = {
        query.size(0), query.size(1), query.size(2), key.size(2)};
    bool fits = sizes.size() == 4 && sizes[3] == scores[3];
    for (size_t i = 0; i < 3 && fits; ++i) fits = sizes[i] == 1 || sizes[i] == scores[i];
    const bool known = mask.dtype() == aoti_torch_dtype_bfloat16() ||
        mask.dtype() == aoti_torch_dtype_float32();
    ARC_CHECK(fits && known && !causal,
          std::string(kOp) + "attn_mask must be bf16 or fp32, broadcastable to " + text(scores) +
              " but for its last dimension, and alone, without is_causal; got " +
              text(mask.sizes()) + (causal ? " and is_causal" : ""));
  }

  Strided<const char> mask_rows() const {
    const int64_t size = size_of(dtype_of(mask.dtype(), "attention: attn_mask"));
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
      a.mask_dtype = dtype_of(mask.dtype(), "attention: attn_mask");
    }
    a.causal = causal, a.scale = float(scale);
    return a;
  }

  // [B, H, T, Dv], the heads of a token side by side.
  TensorRef result() const {
    const int64_t heads = query.size(1), queries = query.size(2), channels = value.size(3);
    return TensorRef::empty_strided(
        {query.size(0), heads, queries, channels},
        {queries * heads * channels, channels, heads * channels, 1}, query.dtype());
  }

  const TensorRef query, key, value, mask;
  const bool causal;
  const double scale;
};

}  // namespace

void attention_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const AttentionArguments arguments{Arguments(stack)};
  TensorRef y = arguments.result();
  attention(arguments.attention(y));
  stack[0] = as_value(y.release());
}

}  // namespace arc
