"""arc::bf16_linear: a linear that stays in bf16, for a few rows, such as the output head's.

    y = x W^T + bias

What backend "arc" calls while decoding in the place of PyTorch's own product on CPUs with AVX-512
BF16 and no tile registers, where that reads the weight at half the memory's bandwidth. Sums are
fp32, rounded once.
"""

from torch import Tensor
from torch.nn.functional import linear

from arc_ao.ops.registry import define

MAX_ROWS = 8  # the weight is read once for them


def bf16_linear_eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by weight [N, K] and add bias [N].

    Returns:
        [M, N] in the dtype of x; the native kernel serves bf16 alone.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    return linear(x, weight, bias)


def _bf16_linear_fake(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


bf16_linear = define(
    "bf16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    bf16_linear_eager,
    _bf16_linear_fake,
)
