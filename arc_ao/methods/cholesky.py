"""Cholesky factors of sums of products, damped as far as they need it."""

import torch
from torch import Tensor

RETRIES = 4  # each with ten times the damping


def damped_cholesky(products: Tensor, diagonal: Tensor, damping: Tensor) -> Tensor | None:
    """Lower factor of `products` with `diagonal` + damping; overwrites its own diagonal.

    Args:
        products: fp32 [*, A, A], symmetric; several are damped alike.
        diagonal: fp32 [*, A]. damping: fp32 [].

    Returns:
        fp32 [*, A, A]; None where the damping of the last retry is not enough. A finite diagonal
        of the factor says that all of it is: every row's is made of the squares before it.
    """
    for attempt in range(RETRIES):
        products.diagonal(dim1=-2, dim2=-1).copy_(diagonal + damping * 10**attempt)
        lower, info = torch.linalg.cholesky_ex(products)
        if not info.any() and torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all():
            return lower
    return None
