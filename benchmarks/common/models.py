"""Models made on the fly."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


def random_llama(**sizes: int) -> PreTrainedModel:
    """A Llama with random weights in bf16; `sizes`: fields of LlamaConfig."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16)
    return model.eval()
