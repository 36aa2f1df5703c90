"""ARCTensor: the NVFP4 weight of a linear, with everything its input needs to be quantized.

Stored is B = [ Q(w) | Q'(w[:, act_channels]) | Q(w - Q(w))[:, weight_blocks] ]; the columns that
meet activation residuals (`act_blocks`) are read from Q(w) again. `F.linear(x, arc_tensor, bias)`
is `arc::quant_augment` followed by `arc::nvfp4_gemm` (linear.py). With an input transform both x
and w are scaled and rotated before; with a low-rank branch, w is what `up down` leaves of it.
"""

import hashlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from torchao.utils import TorchAOBaseTensor

from arc_ao.config import block_scale_of
from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import rotate
from arc_ao.linear import arc_linear
from arc_ao.ops.backends import preferred_layout
from arc_ao.ops.layout import (
    LAYOUTS,
    from_panels,
    from_swizzled,
    to_panels,
    to_swizzled,
)

aten = torch.ops.aten
# The inner tensors that quantizing the input reads.
INPUT_TENSORS = (
    "act_blocks",
    "weight_blocks",
    "channel_order",
    "act_channels",
    "act_outer_scale",
)
# What x goes through before it is quantized, and beside it; part of the same digest.
TRANSFORM_TENSORS = ("input_scale", "rotation", "down")

FLAT = "_flat"  # where an ARCTensor keeps what __tensor_flatten__ returned


class Origin(NamedTuple):
    """How a weight was quantized: all of an ARCTensor but its codes and block scales."""

    tensors: dict[str, Tensor]
    attributes: dict[str, Any]


# What `dequantize` returned -> how it was quantized, for as long as it lives (requantize.py).
ORIGINS = WeakTensorKeyDictionary()


class ARCTensor(TorchAOBaseTensor):
    """Weight [N, K] in NVFP4 with augmented residual channels.

    It is frozen: `requires_grad` stays False. F.linear multiplies by it as quantized, what loaders
    and savers do keeps it quantized (tensor_ops.py), all else reads its values (tensor_reads.py).

    Tensors:
        qdata: uint8 [N, K_b/2], two codes a byte (see formats/nvfp4.py).
        scale: uint8 [N, K_b/16], e4m3 bits.
        outer_scale: fp32 [1].
        act_blocks: int32 [Ra]; weight_blocks: int32 [Rw].
        channel_order: int32 [K] or None.
        act_channels: int32 [multiple of 16] or None.
        act_outer_scale: fp32 [1] or None, the calibrated outer scale of a static activation.
        input_scale: fp32 [K] or None, powers of two that multiply x; the weight is divided by them.
        rotation: int8 [h, h] or None, signs of a block Hadamard matrix (formats/rotation.py).
        down, up: 16-bit [r, K] and [N, r] or None, the low-rank branch of the untransformed x.

    Attributes:
        in_features: K; base_blocks: ceil(K / 16).
        orig_dtype: dtype of the unquantized weight.
        activation_scale: "token", "tensor", "static", or "none": activations stay as they are.
        activation_block_scale: how activations choose block scales: "amax", "four_over_six", "mse".
        weight_layout: of qdata and scale: "plain", as in checkpoints, "panels", as CPU kernels read
            them, or "swizzled", as Blackwell does (ops/layout.py). Slicing rows gives "plain";
            pickling keeps the layout.
        input_plan: digest of all that quantizing the input depends on, or "" where it is not known;
            linears with equal digests that read one tensor need one quantization.
    """

    tensor_data_names = ["qdata", "scale", "outer_scale", "act_blocks", "weight_blocks"]
    tensor_attribute_names = [
        "in_features",
        "orig_dtype",
        "activation_scale",
        "activation_block_scale",
        "weight_layout",
        "input_plan",
    ]
    optional_tensor_data_names = [
        "channel_order",
        "act_channels",
        "act_outer_scale",
        "input_scale",
        "rotation",
        "down",
        "up",
    ]

    @staticmethod
    def __new__(
        cls, qdata: Tensor, *others: Any, requires_grad: bool = False, **options: Any
    ) -> "ARCTensor":
        """From its inner tensors and attributes; or called as nn.Parameter is, with a weight."""
        if isinstance(qdata, ARCTensor):
            return qdata.detach()
        return cls._wrap(qdata, *others, **options)

    @classmethod
    def _wrap(
        cls,
        qdata: Tensor,
        scale: Tensor,
        outer_scale: Tensor,
        act_blocks: Tensor,
        weight_blocks: Tensor,
        in_features: int,
        orig_dtype: torch.dtype,
        activation_scale: str = "token",
        activation_block_scale: str = "amax",
        weight_layout: str = "plain",
        input_plan: str = "",
        channel_order: Tensor | None = None,
        act_channels: Tensor | None = None,
        act_outer_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        rotation: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        four_over_six: bool | None = None,
    ) -> "ARCTensor":
        if four_over_six is not None:  # a checkpoint from before activation_block_scale
            activation_block_scale = block_scale_of(four_over_six)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (qdata.shape[0], in_features),
            dtype=orig_dtype,
            device=qdata.device,
            requires_grad=False,
        )
        self.__dict__.update(  # at once: every weight is made anew several times while it loads
            qdata=qdata,
            scale=scale,
            outer_scale=outer_scale,
            act_blocks=act_blocks,
            weight_blocks=weight_blocks,
            in_features=in_features,
            orig_dtype=orig_dtype,
            activation_scale=activation_scale,
            activation_block_scale=activation_block_scale,
            weight_layout=weight_layout,
            input_plan=input_plan,
            channel_order=channel_order,
            act_channels=act_channels,
            act_outer_scale=act_outer_scale,
            input_scale=input_scale,
            rotation=rotation,
            down=down,
            up=up,
        )
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __tensor_flatten__(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Names of the inner tensors that are there, and the attributes; callers change neither.

        Kept until an attribute is set: before every call of a compiled model, the guards of
        torch.compile ask each weight twice.
        """
        flat = self.__dict__.get(FLAT)
        if flat is None:
            names, attributes = super().__tensor_flatten__()
            flat = self.__dict__[FLAT] = (tuple(names), attributes)
        return flat

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__.pop(FLAT, None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the kept answer, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != FLAT}

    @property
    def base_blocks(self) -> int:
        """Number of 16-channel blocks of the base weight."""
        return -(-self.in_features // nvfp4.BLOCK_SIZE)

    @property
    def num_act_channels(self) -> int:
        """Channels with an activation residual, in either granularity."""
        gathered = 0 if self.act_channels is None else self.act_channels.shape[0]
        return self.act_blocks.shape[0] * nvfp4.BLOCK_SIZE + gathered

    @property
    def num_weight_channels(self) -> int:
        """Channels with a weight residual."""
        return self.weight_blocks.shape[0] * nvfp4.BLOCK_SIZE

    @property
    def extra_channels(self) -> int:
        """Columns that augmentation adds along K."""
        return self.num_act_channels + self.num_weight_channels

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def nbytes_stored(self) -> int:
        """Bytes of all inner tensors."""
        names, _ = self.__tensor_flatten__()
        return sum(getattr(self, name).nbytes for name in names)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over N * K."""
        return 8 * self.nbytes_stored / max(1, self.shape[0] * self.in_features)

    def with_input_plan(self) -> "ARCTensor":
        """The same weight with the digest of its ids, scale and settings as `input_plan`."""
        names, attributes = self.__tensor_flatten__()
        tensors = {name: getattr(self, name) for name in names}
        attributes = attributes | {"input_plan": input_digest(tensors, attributes)}
        return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)

    @property
    def quantizes_input(self) -> bool:
        """Whether activations are quantized (W4A4) or multiplied as they are (W4A16)."""
        return self.activation_scale != "none"

    def packed(self, device: torch.device | None = None) -> "ARCTensor":
        """The same weight in the layout that the kernels of a device (its own) prefer."""
        if not self.quantizes_input:
            return self.to_layout("plain")
        return self.to_layout(preferred_layout(device or self.qdata.device))

    def to_layout(self, layout: str) -> "ARCTensor":
        """The same weight with qdata and scale in another layout; itself if it has that layout.

        Raises:
            ValueError: an unknown layout.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
        if layout == self.weight_layout:
            return self
        qdata, scale = self._plain()
        if layout == "panels":
            qdata, scale = to_panels(qdata, scale)
        elif layout == "swizzled":
            qdata, scale = to_swizzled(qdata, scale, self.act_blocks, self.base_blocks)
        names, attributes = self.__tensor_flatten__()
        attributes = attributes | {"weight_layout": layout}
        tensors = {name: getattr(self, name) for name in names} | {"qdata": qdata, "scale": scale}
        return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)

    def _plain(self) -> tuple[Tensor, Tensor]:
        """Codes and scales in the plain layout."""
        if self.weight_layout == "panels":
            return from_panels(self.qdata, self.scale)
        if self.weight_layout == "swizzled":
            gathered = 0 if self.act_channels is None else self.act_channels.shape[0]
            blocks = self.base_blocks + gathered // nvfp4.BLOCK_SIZE + self.weight_blocks.shape[0]
            return from_swizzled(self.qdata, self.scale, self.act_blocks, self.base_blocks, blocks)
        return self.qdata, self.scale

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Q(w) plus its stored residual and its low-rank branch, [N, K] for the original input."""
        values = self.decoded(output_dtype)
        if not torch.compiler.is_compiling():
            names, attributes = self.__tensor_flatten__()
            kept = {name: getattr(self, name) for name in names if name not in ("qdata", "scale")}
            ORIGINS[values] = Origin(kept, attributes)
        return values

    def decoded(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """`dequantize`, for what is read and thrown away: nothing is remembered of the weight."""
        plain = self.to_layout("plain")
        values = nvfp4.decode(plain.qdata, plain.scale) * self.outer_scale
        base = values[:, : self.base_blocks * nvfp4.BLOCK_SIZE].clone()
        if self.weight_blocks.numel():
            residual = values[:, -self.weight_blocks.shape[0] * nvfp4.BLOCK_SIZE :]
            nvfp4.to_blocks(base).index_add_(1, self.weight_blocks, nvfp4.to_blocks(residual))
        base = base[:, : self.in_features]
        if self.channel_order is not None:
            base = torch.empty_like(base).index_copy_(1, self.channel_order.long(), base)
        if self.rotation is not None:
            base = rotate(base, self.rotation)
        if self.input_scale is not None:
            base = base * self.input_scale
        if self.down is not None:
            base = base + self.up.float() @ self.down.float()
        return base.to(output_dtype or self.orig_dtype)

    def _quantization_type(self) -> str:
        rank = f"rank={self.rank}, " if self.rank else ""
        return (
            f"act_channels={self.num_act_channels}, weight_channels={self.num_weight_channels}, "
            f"{rank}"
            f"bits_per_weight={self.bits_per_weight:.2f}"
        )

    def __repr__(self) -> str:
        shape = f"{self.shape[0]}, {self.in_features}"
        return f"ARCTensor([{shape}], {self.orig_dtype}, {self._quantization_type()})"

    def _stable_hash_for_caching(self) -> str:
        """Identity of this tensor's graph-relevant metadata for AOTAutograd's cache."""
        names, attributes = self.__tensor_flatten__()
        inner = [(n, tuple(getattr(self, n).shape), str(getattr(self, n).dtype)) for n in names]
        return repr((inner, sorted((k, str(v)) for k, v in attributes.items())))


def input_digest(tensors: dict[str, Tensor], settings: dict[str, Any]) -> str:
    """`input_plan` of a weight with these inner tensors and attributes."""
    names = ("in_features", "activation_scale", "activation_block_scale")
    digest = hashlib.sha256(repr(tuple(settings[name] for name in names)).encode())
    for name in INPUT_TENSORS:
        if name in tensors:
            digest.update(f"{name} {tensors[name].tolist()}".encode())
    for name in TRANSFORM_TENSORS:
        if name in tensors:
            digest.update(name.encode())
            digest.update(tensors[name].view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


_set_base_state = ARCTensor.__setstate__


def _set_state(self: ARCTensor, state: dict[str, Any]) -> None:
    """Unpickle; of a file from before `activation_block_scale`, too. The digest is made anew: one
    that does not fit would have compiled linears share another linear's quantized input."""
    if "four_over_six" in state:
        state = dict(state)
        state["activation_block_scale"] = block_scale_of(state.pop("four_over_six"))
    _set_base_state(self, state)
    if type(self.qdata) is Tensor and not self.qdata.is_meta:  # with data to read
        self.input_plan = self.with_input_plan().input_plan


ARCTensor.__setstate__ = _set_state  # torchao sets its own when the class body is through

implements = ARCTensor.implements
implements_torch_function = ARCTensor.implements_torch_function


@implements([aten.linear.default])
@implements_torch_function([F.linear])
def _(func, types, args, kwargs):
    bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    if not isinstance(weight, ARCTensor):
        raise NotImplementedError("F.linear with an ARCTensor as input; only weights are quantized")
    return arc_linear(x, weight, bias)


torch.serialization.add_safe_globals([ARCTensor])
