"""Quality of a quantized model: output divergence and perplexity."""

from arc_ao.eval.perplexity import (
    TextMetrics,
    evaluate_text,
    read_jsonl,
    read_text,
)
from arc_ao.outputs.divergence import (
    cosine_divergence,
    is_logits,
    kl_divergence,
    model_output,
    output_divergence,
)

__all__ = [
    "TextMetrics",
    "cosine_divergence",
    "evaluate_text",
    "is_logits",
    "kl_divergence",
    "model_output",
    "output_divergence",
    "read_jsonl",
    "read_text",
]
