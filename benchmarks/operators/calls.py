"""Random calls of the operators `arc::*`: mostly right ones, and ones with one argument spoilt.

A call is made anew from its number, so that one that ends a process can be repeated.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arc_ao import ops
from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import hadamard_signs
from arc_ao.ops import layout

SPOILT = 0.5  # share of calls with an argument that may not fit
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (
    *FLOATS,
    torch.float64,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
)
FLOAT_CHOICES = (0.0, -1.0, 1.0, 1e-300, 1e300, math.nan, math.inf, -math.inf)
INT_CHOICES = (-(2**63), -1, 0, 1, 2, 3, 2**31, 2**62)
STRINGS = ("", "token", "tensor", "static", "amax", "mse", "plain", "panels", "swizzled", "tanh")
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, 1e-40)
HUGE = 1 << 50  # rows that no memory holds, all of them the same


class Call(NamedTuple):
    """An operator of `arc_ao.ops`, its arguments by name in schema order, and what was spoilt."""

    op: str
    arguments: dict[str, Any]
    spoilt: str


class Maker:
    """Random numbers of one call."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int = 40) -> int:
        """Often small, now and then 0 or more than a tile of anything."""
        return self.pick(0, 1, 1, 2, 3, self.random.randint(1, most), self.random.randint(1, most))

    def floats(self, sizes: tuple[int, ...], dtype: torch.dtype, odd: bool = True) -> Tensor:
        x = torch.randn(sizes, generator=self.generator) * 10.0 ** self.random.randint(-3, 3)
        if odd and x.numel() and self.chance(0.2):
            at = torch.randint(x.numel(), (self.random.randint(1, 3),), generator=self.generator)
            x.view(-1)[at] = self.pick(*SPECIAL)
        return self.strided(x.to(dtype))

    def bytes(self, *sizes: int, most: int = 256) -> Tensor:
        x = torch.randint(0, most, sizes, generator=self.generator, dtype=torch.uint8)
        return self.strided(x)

    def scales(self, *sizes: int) -> Tensor:
        """Bits of block scales; rarely some that are none."""
        return self.bytes(*sizes, most=self.pick(0x7F, 0x7F, 0x7F, 0x80, 0x100))

    def ids(self, limit: int, count: int) -> Tensor:
        return torch.randint(0, limit, (count,), generator=self.generator, dtype=torch.int32)

    def strided(self, x: Tensor) -> Tensor:
        """The same values; sometimes with other strides, or from the middle of a storage."""
        if x.dim() == 0 or self.chance(0.6):
            return x
        if self.chance(0.3):
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), dtype=x.dtype)
        view = wide[..., 1::2] if self.chance(0.5) else wide[..., : x.shape[-1]]
        view.copy_(x)
        return view


def augmentation(make: Maker, channels: int) -> dict[str, Any]:
    """What quantizing operators share."""
    blocks, some = -(-channels // 16), lambda: make.pick(0, 0, make.random.randint(1, 5))
    mode = make.pick("token", "token", "tensor", "static")
    order = torch.randperm(channels, generator=make.generator).int()
    return {
        "act_blocks": make.ids(blocks, some()),
        "weight_blocks": make.ids(blocks, some()),
        "outer_scale": make.floats((1,), torch.float32).abs() if mode == "static" else None,
        "scale_mode": mode,
        "channel_order": order if make.chance(0.3) else None,
        "act_channels": make.ids(16 * blocks, 16 * some()) if make.chance(0.3) else None,
        "block_scale": make.pick(*nvfp4.BLOCK_SCALES),
        "plan": "",
        "scale_layout": make.pick("plain", "plain", "swizzled"),
    }


def rows_of(make: Maker) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape [*, K] and dtype of an input."""
    leading = tuple(make.size(12) for _ in range(make.pick(0, 1, 1, 1, 2)))
    return (*leading, make.random.randint(1, 100)), make.pick(*FLOATS)


def quant_augment(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    return {"x": make.floats(sizes, dtype), **augmentation(make, sizes[-1])}


def rms_norm_quant_augment(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    given = {"x": make.floats(sizes, dtype), "weight": make.floats(sizes[-1:], dtype)}
    return {**given, "eps": make.pick(0.0, 1e-6, 1e-5, 1.0), **augmentation(make, sizes[-1])}


def add_rms_norm_quant_augment(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    given = {name: make.floats(sizes, dtype) for name in ("x", "residual")}
    given |= {"weight": make.floats(sizes[-1:], dtype), "eps": make.pick(0.0, 1e-6, 1.0)}
    return {**given, **augmentation(make, sizes[-1])}


def silu_mul_quant_augment(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    given = {name: make.floats(sizes, dtype) for name in ("gate", "up")}
    return {**given, **augmentation(make, sizes[-1])}


def gelu_quant_augment(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    up = make.floats(sizes, dtype) if make.chance(0.5) else None
    given = {"x": make.floats(sizes, dtype), "up": up, "approximate": make.pick("none", "tanh")}
    return {**given, **augmentation(make, sizes[-1])}


def nvfp4_gemm(make: Maker) -> dict[str, Any]:
    rows, cols, base = make.size(), make.size(), make.random.randint(1, 9)
    act = make.ids(base, make.pick(0, 0, 2, 5)) if make.chance(0.7) else None
    repeated, more = 0 if act is None else act.shape[0], make.pick(0, 0, 2)
    a = make.bytes(rows, 8 * (base + repeated + more)), make.scales(rows, base + repeated + more)
    b = make.bytes(cols, 8 * (base + more)), make.scales(cols, base + more)
    b_layout = make.pick("plain", "panels", "swizzled")
    if b_layout == "swizzled":
        none = torch.zeros(0, dtype=torch.int32)
        a, b = layout.swizzle(*a), layout.to_swizzled(*b, none if act is None else act, base)
    elif b_layout == "panels":
        b = layout.to_panels(*b)
    bias = make.floats((cols,), make.pick(*FLOATS)) if make.chance(0.5) else None
    return {
        "a": a[0],
        "a_scale": a[1],
        "a_outer": make.floats((make.pick(1, rows),), torch.float32),
        "b": b[0],
        "b_scale": b[1],
        "b_outer": make.floats((1,), torch.float32),
        "bias": bias,
        "out_dtype": make.pick(*FLOATS),
        "act_blocks": act,
        "base_blocks": base,
        "b_layout": b_layout,
    }


def nvfp4_weight_only_gemm(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    base, cols = -(-sizes[-1] // 16), make.size()
    blocks = make.ids(base, make.pick(0, 0, 3))
    b = make.bytes(cols, 8 * (base + len(blocks))), make.scales(cols, base + len(blocks))
    b_layout = make.pick("plain", "panels")
    b = layout.to_panels(*b) if b_layout == "panels" else b
    bias = make.floats((cols,), make.pick(*FLOATS)) if make.chance(0.5) else None
    given = {"x": make.floats(sizes, dtype), "b": b[0], "b_scale": b[1]}
    given |= {"b_outer": make.floats((1,), torch.float32), "bias": bias}
    return {**given, "weight_blocks": blocks, "b_layout": b_layout}


def weight_values(make: Maker) -> Tensor:
    sizes = make.size(), 16 * make.random.randint(1, 20)
    return make.floats(sizes, torch.float32)


def search_block_scales(make: Maker) -> dict[str, Any]:
    values = weight_values(make)
    importance = make.floats(values.shape[1:], torch.float32).abs() if make.chance(0.5) else None
    return {"values": values, "importance": importance}


def encode_blocks(make: Maker) -> dict[str, Any]:
    values = weight_values(make)
    return {"values": values, "scale": make.scales(values.shape[0], values.shape[1] // 16)}


def round_columns(make: Maker) -> dict[str, Any]:
    columns, rows = make.size(20), make.size(150)
    sizes, tiles = (columns, rows), -(-rows // 64)
    matrix = lambda: make.floats(sizes, torch.float32, odd=False)
    lower = torch.randn(columns, columns, generator=make.generator).tril() + 4 * torch.eye(columns)
    outputs = torch.randn(tiles, 64, 64, generator=make.generator).triu() + 8 * torch.eye(64)
    return {
        "values": matrix(),
        "feedback": matrix(),
        "lower": make.strided(lower),
        "scale": matrix().abs(),
        "fine": matrix().abs() if make.chance(0.4) else None,
        "outputs": make.strided(outputs) if make.chance(0.4) else None,
    }


def attention(make: Maker) -> dict[str, Any]:
    batch, key_heads, queries, keys = make.pick(1, 2), make.pick(1, 2), make.size(), make.size(150)
    heads, channels = key_heads * make.pick(1, 2, 3), 2 * make.size(20)
    score_sizes = (batch, heads, queries, keys)
    given = {
        "query": make.floats((*score_sizes[:3], channels), torch.bfloat16),
        "key": make.floats((batch, key_heads, keys, channels), torch.bfloat16),
        "value": make.floats((batch, key_heads, keys, make.size(40)), torch.bfloat16),
        "attn_mask": None,
        "is_causal": make.chance(0.3),
        "scale": make.pick(0.1, 0.0, -0.3, 1.0),
    }
    if not given["is_causal"] and make.chance(0.5):
        sizes = (*(make.pick(1, size) for size in score_sizes[:3]), keys)[make.pick(0, 1, 2, 3) :]
        # Numbers of bf16, to which the meaning rounds them.
        mask = make.floats(sizes, torch.bfloat16, odd=False)
        mask = mask.to(make.pick(torch.bfloat16, torch.float32))
        hidden = torch.rand(sizes, generator=make.generator) < 0.3
        given["attn_mask"] = mask.masked_fill(hidden, -math.inf)
    return given


def bf16_linear(make: Maker) -> dict[str, Any]:
    rows, cols, channels = make.size(), make.size(), make.size(150)
    bias = make.floats((cols,), torch.bfloat16) if make.chance(0.5) else None
    x = make.floats((rows, channels), torch.bfloat16)
    return {"x": x, "weight": make.floats((cols, channels), torch.bfloat16), "bias": bias}


def transform_input(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    size = make.pick(0, 16, 32)
    sizes = (*sizes[:-1], size * make.pick(1, 3) if size else sizes[-1])
    scale = torch.exp2(make.ids(6, sizes[-1]).float()) if make.chance(0.5) else None
    signs = hadamard_signs(size) if size else None
    return {"x": make.floats(sizes, dtype), "input_scale": scale, "rotation": signs, "plan": ""}


def project_down(make: Maker) -> dict[str, Any]:
    sizes, dtype = rows_of(make)
    down = make.floats((make.size(), sizes[-1]), make.pick(torch.bfloat16, torch.float16))
    return {"x": make.floats(sizes, dtype), "down": down, "plan": ""}


MAKERS: dict[str, Callable[[Maker], dict[str, Any]]] = {
    "quant_augment": quant_augment,
    "rms_norm_quant_augment": rms_norm_quant_augment,
    "add_rms_norm_quant_augment": add_rms_norm_quant_augment,
    "silu_mul_quant_augment": silu_mul_quant_augment,
    "gelu_quant_augment": gelu_quant_augment,
    "nvfp4_gemm": nvfp4_gemm,
    "nvfp4_weight_only_gemm": nvfp4_weight_only_gemm,
    "search_block_scales": search_block_scales,
    "encode_blocks": encode_blocks,
    "block_residuals": encode_blocks,
    "round_columns": round_columns,
    "attention": attention,
    "bf16_linear": bf16_linear,
    "transform_input": transform_input,
    "project_down": project_down,
}


def make_call(number: int) -> Call:
    """Call `number`; operators take turns."""
    make, names = Maker(number), list(MAKERS)
    op = names[number % len(names)]
    arguments, spoilt = MAKERS[op](make), ""
    if make.chance(SPOILT):
        name = make.pick(*arguments)
        try:
            arguments[name], how = spoil(make, arguments[name])
            spoilt = f"{name}: {how}"
        except (RuntimeError, TypeError) as reason:  # not of this dtype, or not of this shape
            spoilt = f"{name}: torch makes none, {type(reason).__name__}"
    return Call(op, arguments, spoilt)


def spoil(make: Maker, value: Any) -> tuple[Any, str]:
    """Another value in the place of an argument, and what was done."""
    if isinstance(value, Tensor):
        name = make.pick(*SPOILS)
        return SPOILS[name](make, value), name
    if value is None:
        sizes = tuple(make.size(20) for _ in range(make.pick(0, 1, 2, 4)))
        return make.floats(sizes, torch.float32).to(make.pick(*DTYPES)), "a tensor"
    choices = {str: STRINGS, int: INT_CHOICES, float: FLOAT_CHOICES, bool: (True, False)}
    return make.pick(*choices.get(type(value), DTYPES)), "another value"


def as_float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def nested(make: Maker, x: Tensor) -> Tensor:
    parts = [as_float(x).flatten(), as_float(x).flatten()[:1]]
    return torch.nested.nested_tensor(parts, layout=make.pick(torch.strided, torch.jagged))


def compressed(make: Maker, x: Tensor) -> Tensor:
    return x.to_sparse_csr() if x.dim() == 2 else x.to_sparse()


def ids_outside(make: Maker, x: Tensor) -> Tensor:
    x = x.clone()
    if x.numel() and not (x.is_floating_point() or x.is_complex()):
        x.view(-1)[-1] = make.pick(*((-1, 10**6, 2**31 - 1) if x.dtype == torch.int32 else (0x7F,)))
    return x


def short_memory(make: Maker, x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(make.pick(0, x.untyped_storage().nbytes() // 2))
    return x


def huge(make: Maker, x: Tensor) -> Tensor:
    return x.reshape(-1)[:1].reshape((1,) * x.dim()).expand((HUGE, *x.shape[1:]))


SPOILS: dict[str, Callable[[Maker, Tensor], Tensor]] = {
    "a scalar": lambda make, x: x.new_zeros(()),
    "one dimension more": lambda make, x: x.unsqueeze(make.pick(0, -1)),
    "one dimension": lambda make, x: x.reshape(-1),
    "without the last": lambda make, x: x[..., :-1] if x.dim() else x,
    "without the first": lambda make, x: x[1:] if x.dim() else x,
    "twice": lambda make, x: torch.cat((x, x), make.pick(0, -1)) if x.dim() else x,
    "nothing": lambda make, x: x[:0] if x.dim() else x,
    "no channels": lambda make, x: x[..., :0] if x.dim() else x,
    "another dtype": lambda make, x: x.to(make.pick(*DTYPES)),
    "quantized": lambda make, x: torch.quantize_per_tensor(as_float(x), 0.1, 3, torch.quint8),
    "mkldnn": lambda make, x: as_float(x).to_mkldnn(),
    "sparse": lambda make, x: x.to_sparse(),
    "compressed": compressed,
    "nested": nested,
    "meta": lambda make, x: x.to("meta"),
    "requires a gradient": lambda make, x: as_float(x).requires_grad_(),
    "negated view": lambda make, x: torch._neg_view(x) if x.is_floating_point() else x,
    "one value for all": lambda make, x: x.reshape(-1)[:1].expand(x.shape) if x.numel() == 1 else x,
    "ids outside": ids_outside,
    "short memory": short_memory,
    "huge": lambda make, x: huge(make, x) if x.dim() and x.numel() else x,
}


def operator_of(call: Call) -> Callable:
    """The registered operator."""
    return getattr(ops, call.op)
