"""arc::bf16_linear: a linear that stays in bf16, for a few rows, such as the output head's.

    y = x W^T + bias

What backend "arc" calls while decoding in the place of PyTorch's own product on CPUs with AVX-512
BF16 and no tile registers, where that reads the weight at half the memory's bandwidth. Sums are
fp32, rounded once.
"""

from torch import Tensor
from torch.nn.functional import linear

from arc_ao.ops.checks import BF16, check_tensor
from arc_ao.ops.registry import define

MAX_ROWS = 8  # the weight is read once for them


def bf16_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by weight [N, K] and add bias [N], all bf16.

    Returns:
        [M, N] in bf16. The native kernels may take subnormal inputs as 0, as AVX-512 BF16 does.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    _check(x, weight, bias)
    return linear(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "bf16_linear"
    check_tensor(op, "x", x, BF16, (None, None), x.device)
    check_tensor(op, "weight", weight, BF16, (None, x.shape[1]), x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, BF16, (weight.shape[0],), x.device)


def _bf16_linear_fake(x, weight, bias):
    _check(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


bf16_linear = define(
    "bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    bf16_linear_eager,
    _bf16_linear_fake,
)
