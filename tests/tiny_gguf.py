"""A GGUF file of the tiny Llama, written with the gguf package as llama.cpp's converter would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM

SPECIAL = ["<|start|>", "<|end|>"]
MERGES = ["t h", "th e"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", *SPECIAL]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def source_model(**overrides) -> LlamaForCausalLM:
    """The model behind the file, with a tied head and attention that is far from uniform."""
    settings = {
        "vocab_size": len(TOKENS),
        "tie_word_embeddings": True,
        "bos_token_id": len(TOKENS) - 2,
        "eos_token_id": len(TOKENS) - 1,
    }
    model = tiny_llama(**settings | overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 20
            layer.self_attn.k_proj.weight *= 20
    return model


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    linear_type: str = "Q8_0",
    extra: dict[str, str | int | float] | None = None,
    tensors: dict[str, Tensor | None] | None = None,
) -> LlamaForCausalLM:
    """Write the file and return the fp32 model that it rounds. Skips the test without gguf.

    extra: more keys of metadata. tensors: more tensors by their GGUF names; None leaves one out.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    pytest.importorskip("accelerate", reason="transformers' GGUF loader needs accelerate")
    model = source_model()
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, model.config, gguf)
    for key, value in (extra or {}).items():
        kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        kinds[type(value)](key, value)
    for name, tensor in (_tensors(model) | (tensors or {})).items():
        if tensor is None:
            continue
        kind = "F32" if tensor.dim() == 1 else linear_type
        kind = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.detach().float().numpy().astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_metadata(writer, config, gguf) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    types = [gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in TOKENS]
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Parameters under llama.cpp's names, rows of q and k in its order of rotary pairs."""
    found = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
    }
    for index, layer in enumerate(model.model.layers):
        for theirs, ours in NAMES.items():
            weight = layer.get_submodule(theirs).weight
            if ours in ("attn_q", "attn_k"):
                weight = _interleaved(weight, model.config.head_dim)
            found[f"blk.{index}.{ours}.weight"] = weight
    return found


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """[heads * head_dim, K]: halves of each head to pairs of neighbours."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])  # [heads, 2, head_dim / 2, K]
    return halves.transpose(1, 2).reshape(weight.shape)


def conversation() -> list[dict[str, str]]:
    """One question of a user."""
    return [{"role": "user", "content": "What is the time?"}]


def random_ids(seed: int = 0) -> Tensor:
    """Input ids [2, 32]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(TOKENS), (2, 32), generator=generator)
