"""The operators on Blackwell: csrc/cuda, called on the current stream of the tensors' device.

Each function takes the arguments of its operator and gives the same codes and scales, bit for bit.
Products want operands in the swizzled layout; others are brought into it at every call, which is
right and slow. These kernels have been compiled and their machine code looked at; they have never
run on a device.
"""

from ctypes import byref
from functools import cache

import torch
from torch import Tensor

from arc_ao.ops import producers
from arc_ao.ops.checks import check, check_same
from arc_ao.ops.cuda import library
from arc_ao.ops.cuda.library import reason_absent
from arc_ao.ops.layout import from_panels, swizzle, to_swizzled
from arc_ao.ops.nvfp4_gemm import check_gemm
from arc_ao.ops.quant_augment import augmented_shapes, check_augmentation, quant_augment_eager

__all__ = [
    "add_rms_norm_quant_augment",
    "gelu_quant_augment",
    "nvfp4_gemm",
    "quant_augment",
    "reason_absent",
    "rms_norm_quant_augment",
    "silu_mul_quant_augment",
]

IDS = ("act_blocks", "weight_blocks", "channel_order", "act_channels")


def quant_augment(x: Tensor, *augmentation, **named) -> tuple[Tensor, Tensor, Tensor]:
    """`arc::quant_augment` of x [*, K] on a GPU; arguments and errors as there."""
    how = _Augmentation(x, "quant_augment", *augmentation, **named)
    if x.numel() == 0:
        return quant_augment_eager(x, *augmentation, **named)
    return how.run("plain", x)


def rms_norm_quant_augment(
    x: Tensor, weight: Tensor, eps: float, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`arc::rms_norm_quant_augment` on a GPU; arguments and errors as there."""
    op = "rms_norm_quant_augment"
    producers.check_norm(op, x, weight)
    how = _Augmentation(x, op, *augmentation)
    if x.numel() == 0:
        return producers.rms_norm_quant_augment_eager(x, weight, eps, *augmentation)
    return how.run("rms_norm", x, weight=weight, eps=eps)


def add_rms_norm_quant_augment(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *augmentation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`arc::add_rms_norm_quant_augment` on a GPU; arguments and errors as there."""
    op = "add_rms_norm_quant_augment"
    check_same(op, "residual", x, residual)
    producers.check_norm(op, x, weight)
    how = _Augmentation(x, op, *augmentation)
    if x.numel() == 0:
        return producers.add_rms_norm_quant_augment_eager(x, residual, weight, eps, *augmentation)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    rest = {"other": residual, "weight": weight, "eps": eps, "total": total}
    return *how.run("add_rms_norm", x, **rest), total


def silu_mul_quant_augment(
    gate: Tensor, up: Tensor, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`arc::silu_mul_quant_augment` on a GPU; arguments and errors as there."""
    op = "silu_mul_quant_augment"
    check_same(op, "up", gate, up)
    how = _Augmentation(gate, op, *augmentation)
    if gate.numel() == 0:
        return producers.silu_mul_quant_augment_eager(gate, up, *augmentation)
    return how.run("silu_mul", gate, other=up)


def gelu_quant_augment(
    x: Tensor, up: Tensor | None, approximate: str, *augmentation
) -> tuple[Tensor, Tensor, Tensor]:
    """`arc::gelu_quant_augment` on a GPU; arguments and errors as there."""
    producers.check_gelu(x, up, approximate)
    how = _Augmentation(x, "gelu_quant_augment", *augmentation)
    if x.numel() == 0:
        return producers.gelu_quant_augment_eager(x, up, approximate, *augmentation)
    return how.run("tanh_gelu" if approximate == "tanh" else "gelu", x, other=up)


class _Augmentation:
    """The arguments that quantizing operators share, checked, and the call of the kernel."""

    def __init__(
        self,
        x: Tensor,
        op: str,
        act_blocks: Tensor,
        weight_blocks: Tensor,
        outer_scale: Tensor | None,
        scale_mode: str,
        channel_order: Tensor | None = None,
        act_channels: Tensor | None = None,
        block_scale: str = "amax",
        plan: str = "",
        scale_layout: str = "plain",
    ) -> None:
        check_augmentation(
            op, x, act_blocks, weight_blocks, outer_scale, scale_mode, channel_order, act_channels,
            block_scale, plan, scale_layout,
        )  # fmt: skip
        given = (act_blocks, weight_blocks, channel_order, act_channels)
        self.ids = dict(zip(IDS, given, strict=True))
        self.op, self.x, self.scale_mode, self.outer_scale = op, x, scale_mode, outer_scale
        self.block_scale, self.scale_layout = block_scale, scale_layout

    def run(
        self,
        producer: str,
        x: Tensor,
        *,
        other: Tensor | None = None,
        weight: Tensor | None = None,
        eps: float = 0.0,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize what `producer` makes of its inputs; `total` receives the sum of a norm's."""
        ids = self.ids
        outputs = augmented_shapes(
            x,
            ids["act_blocks"],
            ids["weight_blocks"],
            self.scale_mode,
            ids["act_channels"],
            self.scale_layout,
        )
        tensors = {"x": x, "other": other, "weight": weight, "sum": total, **ids}
        tensors |= {"outer_scale": self.outer_scale}
        # The kernels read rows one after the other; these references keep the copies alive.
        tensors = {k: v.contiguous() for k, v in tensors.items() if v is not None}
        if self.scale_mode == "tensor":
            tensors["amax"] = torch.zeros(1, dtype=torch.int32, device=x.device)
        tensors |= dict(zip(("qdata", "scale", "outer"), outputs, strict=True))
        channels = x.shape[-1]
        arguments = library.Quantize(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            rows=x.numel() // channels,
            channels=channels,
            **{f"num_{n}": _length(ids[n]) for n in ("act_blocks", "weight_blocks")},
            num_act_channels=_length(ids["act_channels"]),
            eps=eps,
            number=library.NUMBERS[x.dtype],
            producer=library.PRODUCERS[producer],
            scale_mode=library.SCALE_MODES[self.scale_mode],
            block_scale=library.BLOCK_SCALES[self.block_scale],
            swizzled=self.scale_layout == "swizzled",
        )
        _quantize_on_device(arguments, x.device, self.op)
        return outputs


def nvfp4_gemm(
    a: Tensor,
    a_scale: Tensor,
    a_outer: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_outer: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    act_blocks: Tensor | None = None,
    base_blocks: int = 0,
    b_layout: str = "plain",
) -> Tensor:
    """`arc::nvfp4_gemm` on a GPU; arguments and errors as there."""
    check_gemm(
        a, a_scale, a_outer, b, b_scale, b_outer, bias, out_dtype, act_blocks, base_blocks, b_layout
    )
    if b_layout != "swizzled":
        if b_layout == "panels":
            b, b_scale = from_panels(b, b_scale)
        if act_blocks is None:
            act_blocks = torch.empty(0, dtype=torch.int32, device=b.device)
        (a, a_scale), (b, b_scale) = (
            swizzle(a, a_scale),
            to_swizzled(b, b_scale, act_blocks, base_blocks),
        )
    tensors = {"a": a, "a_scale": a_scale, "a_outer": a_outer, "b": b, "b_scale": b_scale}
    tensors |= {"b_outer": b_outer, "bias": bias}
    tensors = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    y = torch.empty((a.shape[0], b.shape[0]), dtype=out_dtype, device=a.device)
    if y.numel() == 0:
        return y
    arguments = library.Gemm(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        y=y.data_ptr(),
        m=y.shape[0],
        n=y.shape[1],
        blocks=a.shape[1] // 8,
        a_outer_per_row=a_outer.shape[0] > 1,
        bias_number=library.NUMBERS[out_dtype if bias is None else bias.dtype],
        y_number=library.NUMBERS[out_dtype],
    )
    _multiply_on_device(arguments, a.device)
    return y


def _length(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[0]


@cache
def _device(index: int) -> tuple[int, int]:
    """Compute capability, such as 120, and number of multiprocessors."""
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count


def _quantize_on_device(arguments: library.Quantize, device: torch.device, op: str) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        error = library.load().arc_ao_cuda_quantize(byref(arguments), device.index, stream)
    check(error is None, f"{op}: {_text(error)}")


def _multiply_on_device(arguments: library.Gemm, device: torch.device) -> None:
    capability, multiprocessors = _device(device.index)
    kernel, calls = library.Kernel(), library.load()
    with torch.cuda.device(device):
        error = calls.arc_ao_cuda_select(
            byref(arguments), capability, multiprocessors, byref(kernel)
        )
        check(error is None, _text(error))
        # From torch's allocator, which keeps it for the stream until the kernel is through.
        workspace = torch.empty(kernel.workspace, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        error = calls.arc_ao_cuda_gemm(
            byref(arguments),
            byref(kernel),
            device.index,
            multiprocessors,
            workspace.data_ptr(),
            stream,
        )
    check(error is None, _text(error))


def _text(error: bytes | None) -> str:
    return "" if error is None else error.decode()
