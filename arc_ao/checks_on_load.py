"""Rules that the inner tensors of a weight keep, checked where a file is read.

What breaks one is refused there by the name of its layer; later it would be a wrong output, or the
error of a kernel that knows no layer. Flipped bits that leave every rule intact are not found.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arc_ao.config import ARCConfig
from arc_ao.formats.nvfp4 import (
    BLOCK_SCALES,
    BLOCK_SIZE,
    E4M3_LARGEST_CODE,
    E4M3_SMALLEST_CODE,
)
from arc_ao.formats.rotation import SIZES, hadamard_signs
from arc_ao.loading import loading_fields
from arc_ao.methods.prepare import branch_dtype
from arc_ao.recipes import CHOICES, RECIPES
from arc_ao.tensor import ARCTensor

REQUIRED_SETTINGS = ("in_features", "orig_dtype", "activation_scale", "activation_block_scale")
ORIGINAL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BYTES, FLOATS, IDS, SIGNS = torch.uint8, torch.float32, torch.int32, torch.int8
DTYPES = {
    "qdata": BYTES,
    "scale": BYTES,
    "outer_scale": FLOATS,
    "act_blocks": IDS,
    "weight_blocks": IDS,
    "channel_order": IDS,
    "act_channels": IDS,
    "act_outer_scale": FLOATS,
    "input_scale": FLOATS,
    "rotation": SIGNS,
}
MAGNITUDE_BITS = 0x77  # of the two codes in a byte: all but their signs
SIGN_AND_MANTISSA, EXPONENT = -0x7F800001, 0x7F800000  # of fp32 bits as int32
REMEDY = "the checkpoint is damaged or was edited; take an intact copy, or quantize again"


def check_weight(layer: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Refuse inner tensors (plain layout) and attributes of an ARCTensor that break a rule.

    Raises:
        ValueError: naming the layer, the tensor or the attribute, what was expected and found.
    """
    for rules in (_names, _settings, _dtypes, _shapes, _relations, _scales, _ids, _transforms):
        for problem in rules(tensors, settings):
            raise ValueError(f"{layer}: {problem}; {REMEDY}")


def check_config(layer: str, tensor: ARCTensor, config: ARCConfig) -> None:
    """Refuse a weight that is not what its `prepare_for_loading` config describes.

    Raises:
        ValueError: naming the layer, the field, what was expected and found.
    """
    for field, found in loading_fields(tensor).items():
        expected = getattr(config, field)
        if expected is None:
            expected = RECIPES[config.recipe].get(field, 0)  # 0 channels of a kind
        if field in ("smooth", "channel_order"):  # a file tells whether there is one, not which
            expected, found = expected != "none", found != "none"
        if expected != found:
            raise ValueError(
                f"{layer}: config.json says {field}={expected!r}, found {found!r} in the weight; "
                f"{REMEDY}"
            )


def _names(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    required = ARCTensor.tensor_data_names
    for name in (*required, *REQUIRED_SETTINGS):
        if name not in tensors and name not in settings:
            yield f"expected {name!r}, found none"
    for name in tensors.keys() - {*required, *ARCTensor.optional_tensor_data_names}:
        yield f"expected tensors of an ARCTensor, found {name!r}"
    for name in settings.keys() - set(ARCTensor.tensor_attribute_names):
        yield f"expected attributes of an ARCTensor, found {name!r}"


def _settings(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    channels = settings["in_features"]
    if type(channels) is not int or channels < 1:
        yield f"in_features: expected a number of channels, found {channels!r}"
    choices = {
        "orig_dtype": ORIGINAL_DTYPES,
        "activation_scale": CHOICES["activation_scale"][:-1],
        "activation_block_scale": BLOCK_SCALES,
        "weight_layout": ("plain",),
    }
    for name, allowed in choices.items():
        if name in settings and settings[name] not in allowed:
            yield f"{name}: expected one of {allowed}, found {settings[name]!r}"


def _dtypes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    branch = branch_dtype(settings["orig_dtype"])
    for name, tensor in tensors.items():
        expected = DTYPES.get(name, branch)
        if tensor.dtype != expected:
            yield f"{name}: expected {expected}, found {tensor.dtype}"


def _shapes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    for name, expected in _expected_shapes(tensors, settings["in_features"]).items():
        found = tuple(tensors[name].shape) if name in tensors else expected
        if found != expected:
            yield f"{name}: expected shape {list(expected)}, found {list(found)}"


def _expected_shapes(tensors: dict[str, Tensor], channels: int) -> dict[str, tuple[int, ...]]:
    """By the sizes that the tensors themselves choose: rows, ids, rank and rotation."""

    def size(name: str) -> int:
        return tensors[name].numel() if name in tensors else 0

    def first(name: str) -> int:
        return tensors[name].shape[0] if name in tensors and tensors[name].dim() else 0

    rows, rank, rotation = first("qdata"), first("down"), first("rotation")
    copied = -(-size("act_channels") // BLOCK_SIZE)
    blocks = -(-channels // BLOCK_SIZE) + copied + size("weight_blocks")
    return {
        "qdata": (rows, blocks * BLOCK_SIZE // 2),
        "scale": (rows, blocks),
        "outer_scale": (1,),
        "act_blocks": (size("act_blocks"),),
        "weight_blocks": (size("weight_blocks"),),
        "channel_order": (channels,),
        "act_channels": (copied * BLOCK_SIZE,),
        "act_outer_scale": (1,),
        "input_scale": (channels,),
        "rotation": (rotation, rotation),
        "down": (rank, channels),
        "up": (rows, rank),
    }


def _relations(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    """Which tensors go together, and with which setting."""
    activation = settings["activation_scale"]
    if (activation == "static") != ("act_outer_scale" in tensors):
        yield f"activation_scale={activation!r}: expected act_outer_scale with 'static' alone"
    if ("down" in tensors) != ("up" in tensors):
        yield "expected both of down and up, found one"
    of_inputs = {name for name in ("channel_order", "act_channels", "down") if name in tensors}
    by_block = tensors["act_blocks"].numel() > 0
    if activation == "none" and (of_inputs or by_block):
        found = sorted(of_inputs) or "act_blocks"
        yield f"activation_scale='none': expected no residuals of activations, found {found}"
    if by_block and "act_channels" in tensors:
        yield "expected act_blocks or act_channels, found both"


def _scales(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    scale, outer = tensors["scale"], tensors["outer_scale"]
    least, largest = (int(bound) for bound in torch.aminmax(scale)) if scale.numel() else (1, 1)
    if least < E4M3_SMALLEST_CODE or largest > E4M3_LARGEST_CODE:
        found = least if least < E4M3_SMALLEST_CODE else largest
        yield (
            f"scale: expected e4m3 bits from {E4M3_SMALLEST_CODE:#04x} to "
            f"{E4M3_LARGEST_CODE:#04x}, found {found:#04x}"
        )
    value = outer.item()
    if not 0 <= value < float("inf"):
        yield f"outer_scale: expected a positive number, found {value}"
    if value == 0 and (tensors["qdata"] & MAGNITUDE_BITS).any():
        yield "outer_scale: expected a positive number for codes other than 0, found 0"
    static = tensors["act_outer_scale"].item() if "act_outer_scale" in tensors else 1.0
    if not 0 < static < float("inf"):
        yield f"act_outer_scale: expected a positive number, found {static}"


def _ids(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    channels = settings["in_features"]
    blocks = -(-channels // BLOCK_SIZE)
    limits = {"act_blocks": blocks, "weight_blocks": blocks, "act_channels": blocks * BLOCK_SIZE}
    for name, limit in limits.items():
        ids = tensors[name].tolist() if name in tensors else []
        wrong = [i for i in ids if not 0 <= i < limit]
        if wrong or len(set(ids)) < len(ids):
            found = wrong[0] if wrong else "duplicates"
            yield f"{name}: expected different ids from 0 to {limit - 1}, found {found}"
    order = tensors.get("channel_order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(channels).to(order)):
        yield f"channel_order: expected a permutation of {channels} channels, found none"


def _transforms(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[str]:
    if "input_scale" in tensors:
        bits = tensors["input_scale"].view(torch.int32)
        power = (bits & SIGN_AND_MANTISSA == 0) & (bits > 0) & (bits < EXPONENT)
        if not power.all():
            found = tensors["input_scale"][~power][0].item()
            yield f"input_scale: expected positive powers of two, found {found}"
    signs = tensors.get("rotation")
    if signs is not None:
        size, channels = signs.shape[0], settings["in_features"]
        if size not in SIZES or channels % size:
            yield f"rotation: expected a size of {SIZES} that divides {channels}, found {size}"
        elif not torch.equal(signs, hadamard_signs(size).to(signs)):
            yield "rotation: expected the signs of a Hadamard matrix, found others"
    for name in ("down", "up"):
        if name in tensors and not tensors[name].isfinite().all():
            yield f"{name}: expected finite numbers, found NaN or Inf"
