"""A random score of a model's output; its gradient's covariance is the divergence's Hessian.

For logits it is the log-likelihood of a label that is sampled from the model itself, whose gradient
onehot - p has covariance diag(p) - p p^T, the Hessian of KL(p || softmax(logits + d)) at d = 0. For
hidden states h it is z . d with z = P n / |h|, n standard normal and P the projection orthogonal to
h: the Hessian of 1 - cos(h, h + d) is P / |h|^2. See outputs/divergence.py for the divergences.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ao.outputs.divergence import CHUNK_ELEMENTS, is_logits, model_output


def score_gradient(
    output: Any, kept: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, int]:
    """The tensor a model's output is compared by, the gradient of a score with respect to it, and
    the number of tokens that count.

    Args:
        output: what a model returned.
        kept: bool [B, S], false for padding tokens, whose gradient is 0; None: none is.
        generator: on the CPU, for the same draws on every device.
    """
    value = model_output(output)
    with torch.no_grad():
        gradient, count = _gradient(value, kept, is_logits(output), generator)
    return value, gradient, count


def _gradient(
    value: Tensor, kept: Tensor | None, logits: bool, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Gradient of a score with respect to `value`, and the number of tokens that count."""
    size = value.shape[-1]
    rows = value.detach().reshape(-1, size)
    gradient = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    tokens = torch.arange(len(rows)) if kept is None else kept.flatten().nonzero()[:, 0].cpu()
    one = _of_logits if logits else _of_hidden
    for chunk in tokens.split(max(1, CHUNK_ELEMENTS // size)):
        chunk = chunk.to(rows.device)
        gradient[chunk] = one(rows[chunk].float(), generator).to(gradient.dtype)
    return gradient.view_as(value), len(tokens)


def _of_logits(logits: Tensor, generator: torch.Generator) -> Tensor:
    """onehot - p [T, V] of sampled labels; a single logit is that of a binary classifier."""
    if logits.shape[1] == 1:
        return _of_logits(F.pad(logits, (1, 0)), generator)[:, 1:]
    p = logits.softmax(-1)
    cumulative = p.cumsum(-1)
    drawn = torch.rand(len(p), 1, generator=generator).to(p.device) * cumulative[:, -1:]
    label = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=p.shape[1] - 1)
    return p.neg_().scatter_add_(1, label, torch.ones_like(drawn))


def _of_hidden(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """P n / |h| [T, D]; zero where h is."""
    normal = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    norm = hidden.norm(dim=-1, keepdim=True)
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    unit = hidden * inverse
    return (normal - (normal * unit).sum(-1, keepdim=True) * unit) * inverse
