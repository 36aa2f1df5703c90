"""What correction costs beside plain NVFP4: one account for every method.

    bits per weight     stored bits over N * K, less plain NVFP4's 4.5; as in a checkpoint, where
                        each linear has its own copy of what linears of one input share
    multiply-adds       per token, over those of the plain product, N * K:
        residual channels       N each, activation and weight residuals alike
        low-rank branch         r * K once for all linears that share `down`, and r * N
        rotation, scales        h * K and K, once for all linears that share an input

Activation residuals store nothing (they read the base weight again), but compute.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.tensor import ARCTensor

PLAIN_BITS = 4.5  # a 4-bit code, and an 8-bit scale for 16 of them


@dataclass(frozen=True)
class ExtraCost:
    """Of some quantized linears together, relative to plain NVFP4."""

    bits_per_weight: float
    multiply_adds: float  # 0.06 is 6 % more
    multiply_adds_per_token: int

    def __str__(self) -> str:
        return f"{self.bits_per_weight:+.2f} bits/weight, {self.multiply_adds:+.1%} multiply-adds"


def extra_cost(tensors: Iterable[ARCTensor]) -> ExtraCost:
    """Cost of quantized weights over the same in plain NVFP4."""
    tensors = list(tensors)
    weights = sum(t.shape[0] * t.in_features for t in tensors)
    stored = sum(8 * t.nbytes_stored for t in tensors)
    adds = sum(t.shape[0] * (t.extra_channels + t.rank) for t in tensors)
    adds += sum(_input_side(t) for t in _one_per_input(tensors))
    return ExtraCost(stored / max(1, weights) - PLAIN_BITS, adds / max(1, weights), adds)


def _one_per_input(tensors: list[ARCTensor]) -> list[ARCTensor]:
    """One of the linears that share their input's transform and branch, by their digest."""
    alone = [t for t in tensors if not t.input_plan]
    return [*{t.input_plan: t for t in tensors if t.input_plan}.values(), *alone]


def _input_side(tensor: ARCTensor) -> int:
    """Multiply-adds per token of an input's transform and of the first half of its branch."""
    rotated = 0 if tensor.rotation is None else tensor.rotation.shape[0]
    scaled = 0 if tensor.input_scale is None else 1
    return tensor.in_features * (tensor.rank + rotated + scaled)


def planned_cost(
    shapes: Sequence[tuple[int, int]],
    *,
    act_blocks: int = 0,
    weight_blocks: int = 0,
    rank: int = 0,
    ordered: bool = False,
    scaled: bool = False,
    static: bool = False,
) -> tuple[int, int]:
    """Extra (bits, multiply-adds per token) of the linears behind one input before they are made.

    The same account as `extra_cost`, in full: blocks are ids, not channels gathered and copied.

    Args:
        shapes: (out_features, in_features) of each linear.
        rank: of a branch; ordered: by a channel order; scaled: by an input scale.
        static: with a calibrated outer scale of activations.
    """
    bits, adds = 0, 0
    for rows, channels in shapes:
        stored = -(-channels // BLOCK_SIZE) + weight_blocks
        bits += round(rows * (stored * BLOCK_SIZE - channels) * PLAIN_BITS)
        bits += 32 * (1 + act_blocks + weight_blocks + static + channels * (ordered + scaled))
        bits += 16 * rank * (rows + channels)
        adds += rows * (BLOCK_SIZE * (act_blocks + weight_blocks) + rank)
    return bits, adds + shapes[0][1] * (rank + scaled)
