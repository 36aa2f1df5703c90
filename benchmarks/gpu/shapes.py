"""Linears of real models as [in_features, out_features], q/k/v and gate/up fused as engines do."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear: y [M, n] = x [M, k] times weight [n, k]."""

    model: str
    layer: str
    k: int
    n: int

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.k * self.n


# From the models' config.json: hidden_size, intermediate_size, head counts.
SHAPES = (
    Shape("Llama-3.1-8B", "qkv", 4096, 6144),
    Shape("Llama-3.1-8B", "o", 4096, 4096),
    Shape("Llama-3.1-8B", "gate_up", 4096, 28672),
    Shape("Llama-3.1-8B", "down", 14336, 4096),
    Shape("Qwen2.5-7B", "qkv", 3584, 4608),
    Shape("Qwen2.5-7B", "o", 3584, 3584),
    Shape("Qwen2.5-7B", "gate_up", 3584, 37888),
    Shape("Qwen2.5-7B", "down", 18944, 3584),
    Shape("Llama-3.1-70B", "qkv", 8192, 10240),
    Shape("Llama-3.1-70B", "o", 8192, 8192),
    Shape("Llama-3.1-70B", "gate_up", 8192, 57344),
    Shape("Llama-3.1-70B", "down", 28672, 8192),
)
# The ends and the middle first: a run that is cut short then has them for every shape.
ROWS = (1, 4096, 64, 16, 256, 4, 1024)

DRY_SHAPES = (Shape("tiny", "square", 64, 48), Shape("tiny", "ragged", 80, 33))
DRY_ROWS = (1, 5)
