// arc::bf16_linear on CPUs.
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "operators.h"

namespace arc {
namespace {

constexpr int64_t kColumnsAtOnce = 64;

struct LinearArguments {
  explicit LinearArguments(Arguments from)
      : x(from.tensor("x")), weight(from.tensor("weight")), bias(from.optional_tensor("bias")) {
    x.check({bf16()}, {kAnySize, kAnySize});
    weight.check({bf16()}, {kAnySize, x.size(1)});
    if (bias) bias.check({bf16()}, {weight.size(0)});
    x = std::move(x).rows_contiguous(), weight = std::move(weight).rows_contiguous();
    make_contiguous(bias);
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

  TensorRef x, weight, bias;
};

}  // namespace

void bf16_linear_boxed(StableIValue* stack, uint64_t, uint64_t) {
  const LinearArguments arguments{Arguments("bf16_linear", stack)};
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
