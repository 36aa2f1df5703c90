// arc::bf16_linear on CPUs.
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "operators.h"

namespace arc {
namespace {

constexpr int64_t kColumnsAtOnce = 64;

struct LinearArguments {
  explicit LinearArguments(Arguments from)
      : x(from.strided_tensor()), weight(from.strided_tensor()), bias(from.optional_tensor()) {
    const int32_t bf16 = aoti_torch_dtype_bfloat16();
    ARC_CHECK(x.dim() == 2 && weight.dim() == 2 && x.dtype() == bf16 && weight.dtype() == bf16 &&
              x.size(1) == weight.size(1),
          "bf16_linear: expected x [M, K] and weight [N, K], both bf16, got " + text(x.sizes()) +
              " and " + text(weight.sizes()));
    ARC_CHECK(!bias || (bias.dtype() == bf16 && bias.sizes() == std::vector<int64_t>{weight.size(0)}),
          "bf16_linear: bias must be bf16 [" + std::to_string(weight.size(0)) + "], got " +
              (bias ? text(bias.sizes()) : ""));
  }

  LinearRows product(const TensorRef& y) const {
    LinearRows p{};
    p.x = x.data<uint16_t>(), p.w = weight.data<uint16_t>();
    p.bias = bias ? bias.data<uint16_t>() : nullptr;
    p.y = y.data<uint16_t>();
    p.rows = x.size(0), p.cols = weight.size(0), p.channels = x.size(1);
    p.x_stride = x.strides()[0], p.w_stride = weight.strides()[0], p.y_stride = p.cols;
    return p;
  }

  const TensorRef x, weight, bias;
};

}  // namespace

void bf16_linear_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const LinearArguments arguments{Arguments(stack)};
  TensorRef y = TensorRef::empty(
      {arguments.x.size(0), arguments.weight.size(0)}, arguments.x.dtype());
  const LinearRows all = arguments.product(y);
  parallel_for(all.cols, kColumnsAtOnce, [&](int64_t begin, int64_t end) {
    LinearRows part = all;
    part.w += begin * all.w_stride, part.y += begin, part.cols = end - begin;
    if (part.bias) part.bias += begin;
    kernels().pairs->linear_rows(part);
  });
  stack[0] = as_value(y.release());
}

}  // namespace arc
