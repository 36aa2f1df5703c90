"""E[e^T e] of the quantization errors of a few input rows, made when a layer is planned and freed
after that, since it is quadratic in K."""

import torch
from torch import Tensor

CHUNK_ROWS = 1024


def mean_gram(rows: Tensor) -> Tensor:
    """E[e^T e] of rows e [M, K], fp32 [K, K]; zeros without rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
    for chunk in rows.split(CHUNK_ROWS):
        total.addmm_(chunk.float().t(), chunk.float())
    return total / max(1, rows.shape[0])


def shrinkage(rows: Tensor, gram: Tensor) -> float:
    """How much of the correlations in gram, the mean of few rows, is noise: 0 to 1.

    With r_ij the correlation of channels i and j over the M rows (Schaefer and Strimmer 2005):

        sum of Var(r_ij) / sum of r_ij^2 over i != j        Var: of a mean, so it falls as 1 / M
    """
    count = rows.shape[0]
    std = gram.diagonal().sqrt()
    inverse = torch.where(std > 0, 1 / std, 0.0)
    squares = (gram * inverse).mul_(inverse.unsqueeze(1)).square_()
    off_diagonal = (squares.sum() - squares.diagonal().sum()).item()
    if count < 2 or off_diagonal <= 0:
        return 1.0
    joint = 0.0  # sum over rows and i != j of z_i^2 z_j^2
    for chunk in rows.split(CHUNK_ROWS):
        z2 = (chunk.float() * inverse).square()
        joint += (z2.sum(1).square() - z2.square().sum(1)).sum(dtype=torch.float64).item()
    variance = (joint / count - off_diagonal) / (count - 1)
    return min(1.0, max(0.0, variance / off_diagonal))


def residual_gram(rows: Tensor) -> Tensor:
    """E[e^T e] of rows e [M, K], shrunk towards its diagonal as far as the rows do not tell more.

    With fewer rows than channels the plain mean is singular, and off its diagonal mostly noise.
    """
    gram = mean_gram(rows)
    diagonal = gram.diagonal().clone()
    gram *= 1 - shrinkage(rows, gram)
    gram.diagonal().copy_(diagonal)
    return gram
