"""Which rows of what a linear reads are padding, found from the calls around it.

A model is told by a mask which positions of a batch are padding, and hands that mask on to the
parts that read those positions: an encoder gets its own, a decoder another one beside the
encoder's, a vision tower none. So hooks watch what every part is called with, and a call settles
what is padding inside it if it is given

    a mask             2-D `attention_mask` or `..._key_padding_mask`, 3-D `patch_attention_mask`;
                       under any name a tensor that an outer call was given as a mask
    the model's input  input_ids, pixel_values, ...: without a mask beside it, nothing is padding

The rows of a linear are those of the innermost such call's mask that fits their shape; rows that no
mask fits, or several that differ, all count. What a decoder reads of its encoder is recognised as
the tensor that it is, for its shape may be that of the decoder's own tokens.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MASK, INVERTED = "attention_mask", "key_padding_mask"  # the second is torch.nn's: 0 is kept
DIMENSIONS = {MASK: 2, "encoder_attention_mask": 2, "patch_attention_mask": 3, INVERTED: 2}
DIMENSIONS |= {f"{part}_{INVERTED}": 2 for part in ("src", "tgt", "memory")}
NO_PADDING = ("global_attention_mask", "cross_attention_mask")  # masks of something else
INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
# Arguments that hold tokens of another part of the model, and how the names of their masks begin.
OTHER_TOKENS = {"encoder_hidden_states": "encoder_", "memory": "memory_"}
OTHER_TOKENS |= {"key_value_states": MASK, "key": INVERTED}


@dataclass(frozen=True)
class _Mask:
    """0 for padding and other values [B, S] or [B, H, W]; or inverted, others for padding."""

    values: Tensor
    inverted: bool

    def rows(self, x: Tensor) -> Tensor | None:
        """Which rows of x [*, K] it keeps, bool [rows]; None if it is about other rows."""
        values, tokens = self.values, x.shape[:-1]
        if values.dim() == 2 and values.shape != tokens == values.shape[::-1]:
            values = values.T  # [S, B]
        if tokens[: values.dim()] == values.shape:
            further = len(tokens) - values.dim()
            values = values.reshape(*values.shape, *[1] * further).expand(tokens)
        elif values.numel() != tokens.numel() or (len(tokens) > 1 and tokens[0] != len(values)):
            return None
        return ((values != 0) ^ self.inverted).reshape(-1).to(x.device)


@dataclass
class _Call:
    """One call of a part of the model."""

    module: nn.Module
    masks: list[_Mask] = field(default_factory=list)
    others: list[tuple[Tensor, list[_Mask]]] = field(default_factory=list)  # tokens, their masks
    inputs: list[Tensor] = field(default_factory=list)
    settles: bool = False  # or the call around it does
    found: dict[tuple, Tensor | None] = field(default_factory=dict)

    def kept(self, x: Tensor, masks: list[_Mask]) -> Tensor | None:
        """Rows of x [*, K] that `masks` keep; None: all."""
        key = (*(id(mask.values) for mask in masks), x.shape[:-1], x.device)
        if key not in self.found:
            said = [(mask.rows(x), self._of_frames(mask, x)) for mask in masks]
            self.found[key] = _agreed([rows for both in said for rows in both])
        return self.found[key]

    def _of_frames(self, mask: _Mask, x: Tensor) -> Tensor | None:
        """Rows of x [B, T, K] where transformers' audio models say which of the frames that they
        make of samples [B, S] are padding."""
        shorten = getattr(self.module, "_get_feature_vector_attention_mask", None)
        if shorten is None or x.dim() != 3 or len(x) != len(mask.values):
            return None
        if mask.rows(x) is not None:
            return None
        return shorten(x.shape[1], mask.values).bool().reshape(-1).to(x.device)


class _Calls(threading.local):
    """The calls that this thread is in, outermost first; those that settled since the outermost."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []
        self.settling: list[_Call] = []

    def innermost(self) -> _Call | None:
        """The call that settles what is padding here."""
        return next((call for call in reversed(self.stack) if call.settles), None)

    def given(self) -> dict[int, _Mask]:
        """All masks that calls around were given, by the id of their tensor."""
        masks = [mask for call in self.stack for mask in call.masks]
        masks += [m for call in self.stack for _, of_others in call.others for m in of_others]
        return {id(mask.values): mask for mask in masks}


_CALLS = _Calls()


def watch(model: nn.Module) -> list[RemovableHandle]:
    """Watch what the parts of a model are called with, until the handles are removed."""
    parts = [module for module in model.modules() if module is model or any(module.children())]
    parts = [part for part in parts if not isinstance(part, torch.jit.ScriptModule)]  # has no hooks
    enter = [part.register_forward_pre_hook(_enter, with_kwargs=True) for part in parts]
    return enter + [part.register_forward_hook(_leave, always_call=True) for part in parts]


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of a model are watched."""
    handles = watch(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _CALLS.stack.clear()
        _CALLS.settling.clear()


@torch.no_grad()
def kept_rows(x: Tensor) -> Tensor | None:
    """Rows of x [*, K], as read here and now, that are no padding: bool [rows]; None: all."""
    for call in reversed(_CALLS.stack):
        for tokens, masks in call.others:
            if tokens.data_ptr() == x.data_ptr() and tokens.numel() == x.numel():
                return call.kept(x, masks)
    call = _CALLS.innermost()
    return None if call is None else call.kept(x, call.masks)


def without_padding(x: Tensor) -> Tensor:
    """x [*, K] itself, or those of its rows [M, K] that are no padding."""
    kept = kept_rows(x)
    return x if kept is None else x.reshape(-1, x.shape[-1])[kept]


@torch.no_grad()
def kept_tokens_of_output(value: Tensor) -> Tensor | None:
    """Tokens that are no padding, bool [*], of what a watched model returned, [*, D]; None: all.

    An output belongs to the part that started last, of those with a mask that fits: the decoder, or
    the only one.
    """
    for call in reversed(_CALLS.settling):
        if not call.masks:
            return None
        if any(mask.rows(value) is not None for mask in call.masks):
            kept = call.kept(value, call.masks)
            return None if kept is None else kept.view(value.shape[:-1])
    return None


def _enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    named = dict(zip(_parameters(type(module)), args, strict=False)) | kwargs
    given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    call = _Call(module, inputs=_inputs(given))
    told = _is_told(call.inputs, named)
    for name, beginning in OTHER_TOKENS.items():
        if name in given:
            theirs = [key for key in given if key.startswith(beginning) and key.endswith("mask")]
            masks = _masks({key: given.pop(key) for key in theirs})
            if masks or told:
                call.others.append((given[name], masks))
    call.masks = _masks(given)
    call.settles = told or bool(call.masks)
    if not _CALLS.stack:
        _CALLS.settling.clear()
    _CALLS.stack.append(call)
    if call.settles:
        _CALLS.settling.append(call)


def _leave(module: nn.Module, args: tuple, output: Any) -> None:
    if not any(call.module is module for call in _CALLS.stack):
        return  # an earlier pre-hook raised
    while True:
        call = _CALLS.stack.pop()
        call.others, call.inputs = [], []  # activations
        if call.module is module:
            return


def _inputs(given: Mapping[str, Tensor]) -> list[Tensor]:
    """The model's input among the arguments of a call, unless hidden states came of it already."""
    if "hidden_states" in given:
        return []
    return [given[name] for name in INPUTS if name in given]


def _is_told(inputs: list[Tensor], named: Mapping[str, Any]) -> bool:
    """Whether a call given `inputs` is also told what of them is padding, be it by no mask; not
    where a mask became a bias of scores already."""
    mask = named.get(MASK)
    if not inputs or (mask is not None and getattr(mask, "ndim", 0) != DIMENSIONS[MASK]):
        return False
    return MASK in named or not _are_known(inputs)


def _are_known(inputs: list[Tensor]) -> bool:
    """Whether the call around was given them, too, with a mask for them: these are embedded."""
    call = _CALLS.innermost()
    if call is None:
        return False
    return all(
        any(tensor is other for other in call.inputs)
        and any(mask.rows(tensor.unsqueeze(-1)) is not None for mask in call.masks)
        for tensor in inputs
    )


def _masks(given: Mapping[str, Tensor]) -> list[_Mask]:
    """The masks of a call's own tokens among its arguments."""
    known, found = _CALLS.given(), []
    for name, value in given.items():
        users = not _CALLS.stack and name.endswith("_" + MASK) and name not in NO_PADDING
        if id(value) in known:
            found.append(known[id(value)])
        elif value.dim() == DIMENSIONS.get(name, 2 if users else -1):
            inverted = name.endswith(INVERTED)
            if inverted or not _is_bias(value):
                found.append(_Mask(value, inverted))
    return found


def _is_bias(value: Tensor) -> bool:
    """Whether a mask became what is added to attention scores, 0 where there is no padding."""
    return value.is_floating_point() and not (value.amin() >= 0 and value.amax() > 0)


@cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional parameters of a class's forward."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in signature(kind.forward).parameters.values() if p.kind in positional]
    return tuple(found[1:])


def _agreed(found: list[Tensor | None]) -> Tensor | None:
    """What all masks that fit say; None if they differ, or keep every row."""
    fitting = [rows for rows in found if rows is not None]
    if not fitting or fitting[0].all():
        return None
    first, *others = fitting
    return first if all(torch.equal(first, other) for other in others) else None
