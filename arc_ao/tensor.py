"""ARCTensor: the NVFP4 weight of a linear, with everything its input needs to be quantized.

Stored is B = [ Q(w) | Q'(w[:, act_channels]) | Q(w - Q(w))[:, weight_blocks] ]; the columns that
meet activation residuals (`act_blocks`) are read from Q(w) again. `F.linear(x, arc_tensor, bias)`
is `arc::quant_augment` followed by `arc::nvfp4_gemm`.
"""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from arc_ao.formats import nvfp4
from arc_ao.ops import nvfp4_gemm, nvfp4_weight_only_gemm, quant_augment
from arc_ao.ops.backends import preferred_layout
from arc_ao.ops.layout import (
    LAYOUTS,
    from_panels,
    from_swizzled,
    scale_layout_for,
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


class ARCTensor(TorchAOBaseTensor):
    """Weight [N, K] in NVFP4 with augmented residual channels.

    Tensors:
        qdata: uint8 [N, K_b/2], two codes a byte (see formats/nvfp4.py).
        scale: uint8 [N, K_b/16], e4m3 bits.
        outer_scale: fp32 [1].
        act_blocks: int32 [Ra]; weight_blocks: int32 [Rw].
        channel_order: int32 [K] or None.
        act_channels: int32 [multiple of 16] or None.
        act_outer_scale: fp32 [1] or None, the calibrated outer scale of a static activation.

    Attributes:
        in_features: K; base_blocks: ceil(K / 16).
        orig_dtype: dtype of the unquantized weight.
        activation_scale: "token", "tensor", "static", or "none": activations stay as they are.
        four_over_six: whether activations choose between amax/6 and amax/4.
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
        "four_over_six",
        "weight_layout",
        "input_plan",
    ]
    optional_tensor_data_names = ["channel_order", "act_channels", "act_outer_scale"]

    @staticmethod
    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        outer_scale: Tensor,
        act_blocks: Tensor,
        weight_blocks: Tensor,
        in_features: int,
        orig_dtype: torch.dtype,
        activation_scale: str = "token",
        four_over_six: bool = False,
        weight_layout: str = "plain",
        input_plan: str = "",
        channel_order: Tensor | None = None,
        act_channels: Tensor | None = None,
        act_outer_scale: Tensor | None = None,
    ) -> "ARCTensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (qdata.shape[0], in_features),
            dtype=orig_dtype,
            device=qdata.device,
            requires_grad=False,
        )
        self.qdata = qdata
        self.scale = scale
        self.outer_scale = outer_scale
        self.act_blocks = act_blocks
        self.weight_blocks = weight_blocks
        self.in_features = in_features
        self.orig_dtype = orig_dtype
        self.activation_scale = activation_scale
        self.four_over_six = four_over_six
        self.weight_layout = weight_layout
        self.input_plan = input_plan
        self.channel_order = channel_order
        self.act_channels = act_channels
        self.act_outer_scale = act_outer_scale
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

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
        settings = (self.in_features, self.activation_scale, self.four_over_six)
        digest = hashlib.sha256(repr(settings).encode())
        for name in INPUT_TENSORS:
            if name in tensors:
                digest.update(f"{name} {tensors[name].tolist()}".encode())
        attributes = attributes | {"input_plan": digest.hexdigest()[:16]}
        return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)

    @property
    def quantizes_input(self) -> bool:
        """Whether activations are quantized (W4A4) or multiplied as they are (W4A16)."""
        return self.activation_scale != "none"

    def packed(self, device: torch.device | None = None) -> "ARCTensor":
        """The same weight in the layout that the kernels of a device (its own) prefer."""
        if not self.quantizes_input:
            return self.to_layout("plain")
        return self.to_layout(preferred_layout(device or self.device))

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
        """Q(w) plus its stored residual, [N, K] in the original channel order."""
        plain = self.to_layout("plain")
        values = nvfp4.decode(plain.qdata, plain.scale) * self.outer_scale
        base = values[:, : self.base_blocks * nvfp4.BLOCK_SIZE].clone()
        if self.weight_blocks.numel():
            residual = values[:, -self.weight_blocks.shape[0] * nvfp4.BLOCK_SIZE :]
            nvfp4.to_blocks(base).index_add_(1, self.weight_blocks, nvfp4.to_blocks(residual))
        base = base[:, : self.in_features]
        if self.channel_order is not None:
            base = torch.empty_like(base).index_copy_(1, self.channel_order.long(), base)
        return base.to(output_dtype or self.orig_dtype)

    def _quantization_type(self) -> str:
        return (
            f"act_channels={self.num_act_channels}, weight_channels={self.num_weight_channels}, "
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


def arc_linear(x: Tensor, weight: ARCTensor, bias: Tensor | None = None) -> Tensor:
    """x [*, K] times the augmented weight: [*, N] in x's dtype.

    Raises:
        ValueError: the last dimension of x is not in_features, naming both.
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"linear with an ARCTensor: x has {x.shape[-1]} channels, the weight has "
            f"in_features {weight.in_features}"
        )
    if not weight.quantizes_input:
        y = nvfp4_weight_only_gemm(
            x,
            weight.qdata,
            weight.scale,
            weight.outer_scale,
            bias,
            weight.weight_blocks,
            weight.weight_layout,
        )
        return y.reshape(*x.shape[:-1], weight.shape[0])
    a, a_scale, a_outer = quant_augment(
        x,
        weight.act_blocks,
        weight.weight_blocks,
        weight.act_outer_scale,
        weight.activation_scale,
        channel_order=weight.channel_order,
        act_channels=weight.act_channels,
        four_over_six=weight.four_over_six,
        plan=weight.input_plan,
        scale_layout=scale_layout_for(weight.weight_layout),
    )
    y = nvfp4_gemm(
        a,
        a_scale,
        a_outer,
        weight.qdata,
        weight.scale,
        weight.outer_scale,
        bias,
        x.dtype,
        act_blocks=weight.act_blocks,
        base_blocks=weight.base_blocks,
        b_layout=weight.weight_layout,
    )
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _rebuilt(weight: ARCTensor, fn, dtype: torch.dtype | None = None) -> ARCTensor:
    """New ARCTensor whose inner tensors went through `fn`. `dtype` is what the weight stands for
    (`orig_dtype`); the stored bytes do not depend on it."""
    names, attributes = weight.__tensor_flatten__()
    dtype = dtype or weight.orig_dtype
    if not dtype.is_floating_point:
        raise ValueError(f"ARCTensor stands for a floating point weight, cannot become {dtype}")
    tensors = {name: fn(getattr(weight, name)) for name in names}
    return ARCTensor.__tensor_unflatten__(tensors, attributes | {"orig_dtype": dtype}, None, None)


def _with_rows(weight: ARCTensor, fn) -> ARCTensor:
    """New plain ARCTensor whose per-row tensors went through `fn`; the rest is shared."""
    weight = weight.to_layout("plain")
    names, attributes = weight.__tensor_flatten__()
    tensors = {name: getattr(weight, name) for name in names}
    tensors |= {"qdata": fn(weight.qdata), "scale": fn(weight.scale)}
    return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)


@implements([aten.slice.Tensor])
def _(func, types, args, kwargs):
    weight, dim, start, end, step = (list(args) + [0, None, None, 1][len(args) - 1 :])[:5]
    if dim % 2 == 1:
        whole = (start in (None, 0)) and (end is None or end >= weight.in_features) and step == 1
        if not whole:
            raise ValueError(
                f"ARCTensor: slicing in_features [{start}:{end}:{step}] of {weight.in_features} "
                "would cut residual blocks and the channel order; slice rows, or quantize the shard"
            )
        return return_and_correct_aliasing(
            func, args, kwargs or {}, _with_rows(weight, lambda t: t)
        )
    sliced = _with_rows(weight, lambda t: func(t, 0, start, end, step))
    return return_and_correct_aliasing(func, args, kwargs or {}, sliced)


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, size = args[:2]
    dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", 0)
    if dim % 2 == 1:
        raise ValueError("ARCTensor: split along in_features is not possible; split rows")
    weight = weight.to_layout("plain")
    parts = zip(func(weight.qdata, size, 0), func(weight.scale, size, 0), strict=True)
    names, attributes = weight.__tensor_flatten__()
    shared = {name: getattr(weight, name) for name in names}
    return [
        ARCTensor.__tensor_unflatten__(shared | {"qdata": q, "scale": s}, attributes, None, None)
        for q, s in parts
    ]


@implements([aten.empty_like.default])
def _(func, types, args, kwargs):
    kwargs = kwargs or {}
    plain = {k: v for k, v in kwargs.items() if k in ("device", "pin_memory")}
    return _rebuilt(args[0], lambda t: func(t, **plain), kwargs.get("dtype"))


@implements([aten._to_copy.default, aten.zeros_like.default])
def _(func, types, args, kwargs):
    """`.to(device)` moves the stored bytes; `.to(dtype)` keeps them and changes `orig_dtype`.
    A zero weight keeps its block ids and its channel order. What moves to another kind of device
    leaves its device's layout behind, and on a GPU takes that of its kernels; on the meta device it
    keeps it."""
    kwargs = kwargs or {}
    plain = {k: v for k, v in kwargs.items() if k in ("device", "non_blocking")}
    source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
    if target.type not in (source.device.type, "meta"):
        source = source.to_layout(preferred_layout(target) if target.type == "cuda" else "plain")
    copy = _rebuilt(source, lambda t: t.to(**plain, copy=True), kwargs.get("dtype"))
    if func is aten.zeros_like.default:
        return _fill(copy, 0)
    return return_and_correct_aliasing(func, args, kwargs, copy)


def _signature(weight: ARCTensor) -> tuple:
    """What two weights must have in common for one to be copied into the other."""
    names, attributes = weight.__tensor_flatten__()
    attributes = {k: v for k, v in attributes.items() if k != "input_plan"}  # copied along
    return attributes, {name: getattr(weight, name).shape for name in names}


@implements([aten.copy_.default])
def _(func, types, args, kwargs):
    """Bytes of a weight that was quantized alike, into the layout that is here.

    Raises:
        ValueError: shapes, residual channels or settings that differ.
    """
    target, source = args[:2]
    if isinstance(source, ARCTensor):
        source = source.to_layout(target.weight_layout)
    if not isinstance(source, ARCTensor) or _signature(target) != _signature(source):
        raise ValueError(
            f"copy_ into {target!r}: expected a weight quantized alike, got {source!r}"
        )
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name))
    target.input_plan = source.input_plan
    return target


@implements([aten.fill_.Scalar])
def _(func, types, args, kwargs):
    return _fill(*args)


def _fill(weight: ARCTensor, value: float) -> ARCTensor:
    """Only zero can be filled in: loaders use it for padding rows."""
    if value != 0:
        raise ValueError(f"ARCTensor.fill_ takes 0 only, got {value}")
    weight.qdata.zero_()
    return weight


torch.serialization.add_safe_globals([ARCTensor])
