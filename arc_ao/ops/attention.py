"""arc::attention: scaled dot-product attention in bf16 whose query heads share key heads.

    y = softmax(scale * Q K^T + mask) V

What backend "arc" calls in the place of PyTorch's own kernel on CPUs that multiply pairs of bf16
(AVX-512 BF16) and have no tile registers: there the products around it are int8 dot products, and
attention would be what a prompt waits for. Nothing in it is quantized.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arc_ao.ops.registry import define


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
        query: [B, H, T, D].
        key, value: [B, Hk, L, D] and [B, Hk, L, Dv], H a multiple of Hk.
        attn_mask: added to the scores; bf16 or fp32 [1 or B, 1 or H, 1 or T, L], or None.
        is_causal: query t sees keys 0 to t; not together with a mask.
        scale: of the scores.

    Returns:
        [B, H, T, Dv] in the dtype of query, heads of a token side by side. The native kernel
        rounds weights to bf16, adds up in fp32, and gives zeros for a row that sees no key.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    y = scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_fake(query, key, value, attn_mask, is_causal, scale):
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale) -> Tensor",
    attention_eager,
    _attention_fake,
)
