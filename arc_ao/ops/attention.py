"""arc::attention: scaled dot-product attention in bf16 whose query heads share key heads.

    y = softmax(scale * Q K^T + mask) V

What backend "arc" calls in the place of PyTorch's own kernel on CPUs that multiply pairs of bf16
(AVX-512 BF16) and have no tile registers: there the products around it are int8 dot products, and
attention would be what a prompt waits for. Nothing in it is quantized.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arc_ao.ops.checks import BF16, check, check_memory, check_tensor, described
from arc_ao.ops.registry import define

NAME = "attention"
MASK_DTYPES = (torch.bfloat16, torch.float32)


def attention_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Attend to shared heads of keys and values.

    Args:
        query: bf16 [B, H, T, D], D even.
        key, value: bf16 [B, Hk, L, D] and [B, Hk, L, Dv], H a multiple of Hk.
        attn_mask: added to the scores; bf16 or fp32 [1 or B, 1 or H, 1 or T, L], or None.
        is_causal: query t sees keys 0 to t; not together with a mask.
        scale: of the scores; finite, also in fp32.

    Returns:
        bf16 [B, H, T, Dv], heads of a token side by side. The native kernel rounds weights to bf16,
        adds up in fp32, and gives zeros for a row that sees no key. Keys and values that a row does
        not see do not matter to it, whatever they hold. Q K^T before it is scaled, and sums of V
        before they are divided by those of the weights, must not overflow fp32.

    Raises:
        RuntimeError: shapes, dtypes or a scale that do not fit.
    """
    _check(query, key, value, attn_mask, is_causal, scale)
    if key.shape[2] == 0:  # PyTorch multiplies what query holds by 0
        query = torch.zeros_like(query)
    if scale == 0:  # with which PyTorch would multiply its own mask of -inf
        query, scale = torch.zeros_like(query), 1.0
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)[(None,) * (4 - attn_mask.dim())]
    y = scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(NAME, name, x, BF16, (None,) * 4, query.device)
    message = lambda: (
        f"{NAME}: expected query [B, H, T, D], key [B, Hk, L, D], value [B, Hk, L, Dv], got "
        f"{described(query)}, {described(key)}, {described(value)}"
    )
    for other, same in ((key, (0, 3)), (value, (0,))):
        for dim in same:
            check(query.shape[dim] == other.shape[dim], message)
    for dim in (1, 2):
        check(key.shape[dim] == value.shape[dim], message)
    heads = lambda: (
        f"{NAME}: query heads must be a multiple of key heads and D even, got {described(query)} "
        f"and {described(key)}"
    )
    check(key.shape[1] > 0, heads)
    check(query.shape[1] % key.shape[1] == 0, heads)
    check(query.shape[3] % 2 == 0, heads)
    if attn_mask is not None:
        _check_mask(attn_mask, (*query.shape[:3], key.shape[2]), is_causal, query.device)
    check(
        abs(scale) <= torch.finfo(torch.float32).max,
        f"{NAME}: scale must be finite, also in fp32, got {scale}",
    )


def _check_mask(
    mask: Tensor, scores: tuple[int, ...], is_causal: bool, device: torch.device
) -> None:
    message = lambda: (
        f"{NAME}: attn_mask must be bf16 or fp32, broadcastable to {list(scores)} but for its last "
        f"dimension, and alone, without is_causal; got {described(mask)}"
        f"{' and is_causal' if is_causal else ''}"
    )
    check_memory(NAME, "attn_mask", mask, device)
    check(mask.dtype in MASK_DTYPES and 1 <= mask.dim() <= 4 and not is_causal, message)
    *batched, keys = mask.shape
    check(keys == scores[-1], message)
    for found, expected in zip(batched, scores[3 - len(batched) : 3], strict=True):
        check((isinstance(found, int) and found == 1) or found == expected, message)


def _attention_fake(query, key, value, attn_mask, is_causal, scale):
    _check(query, key, value, attn_mask, is_causal, scale)
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale) -> Tensor",
    attention_eager,
    _attention_fake,
)
