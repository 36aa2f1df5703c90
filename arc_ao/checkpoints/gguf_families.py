"""Which models a GGUF file can hold, and what it says about them: llama.cpp's hyperparameters."""

from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from arc_ao.checkpoints.gguf_rope import LLAMA3, llama3_divisors

ROPE_FREQS = "rope_freqs.weight"  # a divisor for each frequency
ROPE_KEYS = {"rope_type", "rope_theta"}
SCALED_KEYS = {  # by rope_type; other keys would change what llama.cpp computes by itself
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", *LLAMA3},
}


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp."""

    architecture: str
    pairs_neighbours: bool  # in rotary embeddings; transformers pairs the halves of a head


# llama.cpp's own "qwen2" passes over the scales of feed-forward layers (build 11549, October 2026).
# Qwen2 is a Llama with biases of q, k and v, which its "llama" takes.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", True),
    "Qwen2ForCausalLM": Family("llama", True),
    "Qwen3ForCausalLM": Family("qwen3", False),
}


def family_of(model: PreTrainedModel) -> Family:
    """The architecture that computes what a model computes.

    Raises:
        ValueError: there is none, naming what it lacks.
    """
    name, config = type(model).__name__, model.config
    if name not in FAMILIES:
        raise ValueError(
            f"format 'gguf': expected a model of {', '.join(FAMILIES)}, found {name}; take another "
            "format, from which llama.cpp's own converter may know the way"
        )
    family = FAMILIES[name]
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    biased = getattr(config, "attention_bias", False) and family.architecture != "llama"
    lacking = {
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
        f"layer_types {', '.join(sorted(layer_types))}": layer_types != {"full_attention"},
        "attention_bias=True": biased,
    }
    found = [what for what, there in lacking.items() if there] + _unknown_rope(config)
    if found:
        raise ValueError(
            f"format 'gguf': expected what llama.cpp's {family.architecture!r} computes, found "
            f"{'; '.join(found)}; take another format"
        )
    return family


def _unknown_rope(config: PretrainedConfig) -> list[str]:
    """What of the rotary embedding's scaling llama.cpp does not compute."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    known = ROPE_KEYS | SCALED_KEYS.get(kind, set())
    unknown = {key: value for key, value in rope.items() if key not in known and value is not None}
    if kind == "llama3":  # which the file has as divisors
        unknown |= {key: rope.get(key) for key in LLAMA3 if rope.get(key) != LLAMA3[key]}
    found = [f"rope_type={kind!r}"] if kind not in SCALED_KEYS else []
    return found + [f"rope_parameters {unknown}"] if unknown else found


def write_hyperparameters(writer: Any, config: PretrainedConfig) -> None:
    """Write sizes, norms and rotary embedding of a model.

    Args:
        writer: gguf.GGUFWriter of its architecture.
    """
    head_dim = _head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    _write_rope(writer, config.rope_parameters)


def _write_rope(writer: Any, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_divisors(config: PretrainedConfig) -> Tensor | None:
    """fp32 [head_dim / 2] for the tensor `rope_freqs.weight`, or None where there is none."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    return llama3_divisors(_head_dim(config) // 2, rope["rope_theta"], rope["factor"]).float()


def _head_dim(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads
