"""How far the output of a quantized model is from its floating point reference.

Language-model logits are compared by the mean over tokens of

    KL(ref || quant) = sum_v p_v (log p_v - log q_v)    in nats per token,

hidden states by the mean over tokens of 1 - cos(ref, quant). Both are 0 for equal outputs. Both are
inf when the outputs hold values that leave the result undefined (NaN, +inf), so that a broken
quantized model always compares as worse than a working one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 2**20  # values per chunk of tokens: 4 MiB per fp32 temporary


class NotComparableError(TypeError):
    """A model's output holds no tensor that is known to be what it says."""


def is_logits(output: Any) -> bool:
    """Whether `model_output(output)` is logits (the output has a `.logits` tensor)."""
    return _is_comparable(_field(output, "logits"))


def model_output(output: Any) -> Tensor:
    """The tensor a model's output is compared by.

    That is `.logits` if present, else `.last_hidden_state` (or these keys of a dictionary), else
    the first tensor of a tuple or list, else the tensor itself; of floating point and with at least
    one dimension, which a loss has not. Logits of pixels, [B, C, H, W], come as [B, H, W, C].
    Raises NotComparableError for anything else.
    """
    named = [_classes_last(_field(output, "logits")), _field(output, "last_hidden_state")]
    several = list(output) if isinstance(output, (tuple, list)) else []
    for value in [*named, output, *several]:
        if _is_comparable(value):
            return value
    raise NotComparableError(
        "output: expected .logits, .last_hidden_state, a tensor or a tuple with one, got "
        f"{type(output).__name__}" + (f" of {list(output)}" if isinstance(output, dict) else "")
    )


def _classes_last(logits: Any) -> Any:
    return logits.movedim(1, -1) if isinstance(logits, Tensor) and logits.dim() == 4 else logits


def _is_comparable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def kl_divergence(
    reference_logits: Tensor, logits: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Mean KL(softmax(reference_logits) || softmax(logits)) in nats per token.

    reference_logits, logits: [..., V], any float dtype; the reference may be on another device.
    chunk_tokens: tokens compared at a time in fp32, by default about `CHUNK_ELEMENTS` / V.

    Returns a float64 scalar on the device of `logits`; inf if `logits` holds NaN or +inf, or -inf
    where the reference is finite. -inf in both (a masked vocabulary entry) contributes nothing.
    Raises ValueError if the shapes differ or there is no token.
    """
    return _mean_over_tokens(_kl_per_token, reference_logits, logits, chunk_tokens=chunk_tokens)


def cosine_divergence(
    reference: Tensor, hidden: Tensor, *, chunk_tokens: int | None = None
) -> Tensor:
    """Mean of 1 - cosine similarity over the last dimension, computed in fp64: 0 to 2.

    reference, hidden: [..., D], any float dtype; the reference may be on another device. Two zero
    vectors count as equal, a zero and a non-zero vector as orthogonal.

    Returns a float64 scalar on the device of `hidden`; inf if any value is not finite.
    Raises ValueError if the shapes differ or there is no token.
    """
    return _mean_over_tokens(_cosine_per_token, reference, hidden, chunk_tokens=chunk_tokens)


def output_divergence(
    reference_output: Any, output: Any, attention_mask: Tensor | None = None
) -> float:
    """`kl_divergence` for outputs with logits, `cosine_divergence` for hidden states.

    reference_output, output: what a model returned, see `model_output`.
    attention_mask: [B, S], 0 for padding tokens, which are left out. It does not apply to an output
        without a token dimension ([B, C], a classifier or a pooled embedding).

    A single logit ([..., 1]: a reranker or a regression head) is taken as the logit of a binary
    classifier, since the softmax over one class is always 1.

    Returns inf if the divergence is not finite. Raises ValueError if the outputs differ in kind or
    shape, the mask does not fit or leaves no token.
    """
    logits = is_logits(reference_output)
    if logits != is_logits(output):
        raise ValueError("output: expected the same kind as reference_output, got logits and not")
    reference, value = model_output(reference_output), model_output(output)
    keep = kept_tokens(value, attention_mask)
    if logits and reference.shape[-1:] == value.shape[-1:] == (1,):
        reference, value = F.pad(reference, (1, 0)), F.pad(value, (1, 0))  # [..., 2]
    per_token = _kl_per_token if logits else _cosine_per_token
    return _mean_over_tokens(per_token, reference, value, keep=keep).item()


def kept_tokens(value: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as [B, S] booleans, or None where every token counts."""
    if attention_mask is None or (value.ndim == 2 and attention_mask.shape != value.shape[:1]):
        return None
    if attention_mask.shape != value.shape[:-1]:
        raise ValueError(
            f"attention_mask: expected shape {list(value.shape[:-1])}, "
            f"got {list(attention_mask.shape)}"
        )
    return attention_mask.bool()


@torch.no_grad()
def _mean_over_tokens(
    per_token: Callable[[Tensor, Tensor], Tensor],
    reference: Tensor,
    value: Tensor,
    *,
    keep: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Mean of `per_token([T, D], [T, D]) -> [T]` over the kept tokens, by chunks of tokens."""
    if reference.shape != value.shape:
        raise ValueError(
            f"expected outputs of the same shape, got {list(reference.shape)} (reference) "
            f"and {list(value.shape)}"
        )
    if value.numel() == 0 or (keep is not None and not keep.any()):
        raise ValueError(f"no token to compare in an output of shape {list(value.shape)}")
    size = value.shape[-1]
    reference, value = reference.reshape(-1, size), value.reshape(-1, size)  # [T, D]
    tokens = torch.arange(len(value)) if keep is None else keep.flatten().nonzero()[:, 0].cpu()
    total = torch.zeros((), dtype=torch.float64, device=value.device)
    for chunk in tokens.split(chunk_tokens or max(1, CHUNK_ELEMENTS // size)):
        rows = value[chunk.to(value.device)]
        reference_rows = reference[chunk.to(reference.device)].to(value.device)
        total += per_token(reference_rows, rows).sum(dtype=torch.float64)
    mean = (total / len(tokens)).clamp_min(0.0)  # rounding can leave -1e-8; NaN stays NaN
    return torch.where(mean.isfinite(), mean, torch.inf)


def _kl_per_token(reference: Tensor, value: Tensor) -> Tensor:
    log_p = reference.float().log_softmax(-1)
    log_q = value.float().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    # Only an exact zero of p is dropped: p that underflows against q = 0 stays NaN, hence inf.
    masked = log_p.isneginf() & ~log_q.isnan()
    return terms.masked_fill(masked, 0.0).sum(-1)


def _cosine_per_token(reference: Tensor, value: Tensor) -> Tensor:
    reference, value = reference.double(), value.double()  # squares of large fp32 overflow fp32
    reference_norm, norm = reference.norm(dim=-1), value.norm(dim=-1)
    product = reference_norm * norm
    both_zero = (reference_norm == norm).double()
    cosine = (reference * value).sum(-1) / product
    return 1.0 - torch.where(product == 0, both_zero, cosine)
