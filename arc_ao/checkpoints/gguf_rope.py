"""Long-context scaling of rotary embeddings in GGUF files, which transformers' loader passes over.

llama.cpp keeps it in two ways: keys `<architecture>.rope.scaling.*` (linear, yarn), and a tensor
`rope_freqs.weight` with one divisor per frequency (Llama 3.1 and later). Of the latter, the rule
that made it is found again and checked against the tensor:

    s = clamp((L / wavelength - low) / (high - low), 0, 1)       L: context of the first training
    1 / divisor = s + (1 - s) / factor
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KNOWN_TYPES = ("linear", "yarn")


def restore_rope_scaling(config: PretrainedConfig, reader: Any, path: Path) -> None:
    """Complete `config.rope_parameters` by what the file says and the loader has left out.

    Args:
        reader: gguf.GGUFReader of the file.

    Raises:
        ValueError: a kind of scaling that cannot be told from the file.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        return
    divisors = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if divisors is not None:
        found = _llama3(torch.tensor(divisors, dtype=torch.float64), rope["rope_theta"], path)
    else:
        found = _scaling_keys(reader, path)
    config.rope_parameters = rope | found


def _scaling_keys(reader: Any, path: Path) -> dict[str, Any]:
    """rope_parameters of the keys `<architecture>.rope.scaling.*`."""
    prefix = reader.get_field("general.architecture").contents() + ".rope.scaling."
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    kind = fields.get("type", "none")
    if kind == "none":
        return {}
    if kind not in KNOWN_TYPES or "factor" not in fields:
        raise ValueError(
            f"{path}: expected rotary scaling of type none, {' or '.join(KNOWN_TYPES)}, found "
            f"{fields}; take the model's Hugging Face directory instead"
        )
    found = {"rope_type": kind, "factor": fields["factor"]}
    if kind == "yarn" and "original_context_length" in fields:
        found["original_max_position_embeddings"] = fields["original_context_length"]
    return found


def _llama3(divisors: Tensor, theta: float, path: Path) -> dict[str, Any]:
    """rope_parameters of divisors [head_dim / 2] of the frequencies; {} where all are 1."""
    if bool((divisors == 1).all()):
        return {}
    factor = divisors.max().item()
    expected = llama3_divisors(len(divisors), theta, factor)
    if not torch.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{path}: expected rope_freqs.weight as Llama 3's rule gives it at factor {factor:g}, "
            "found other values; take the model's Hugging Face directory instead"
        )
    return LLAMA3 | {"factor": factor}


def llama3_divisors(size: int, theta: float, factor: float) -> Tensor:
    """Divisors fp64 [size] of the rotary frequencies theta ** (-i / size), by Llama 3's rule."""
    wavelength = 2 * math.pi * theta ** (torch.arange(size, dtype=torch.float64) / size)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    turns = LLAMA3["original_max_position_embeddings"] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (smooth + (1 - smooth) / factor)
