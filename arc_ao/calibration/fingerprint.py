"""Digests of all that a quantized model depends on, so that no call takes over another one's work.

    versions    of this package's source, Python and the libraries that compute
    precision   how torch multiplies, by its settings
    model       weights, and every module's class, forward, attributes (an eps, an activation) and
                hooks, and the configuration of transformers
    config      of every linear that is to be quantized
    data        calibration batches

Not: where the model lies, the machine, and its number of threads, which may be another one in a
rerun and only change how sums round.
"""

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import platform
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig, config_to_dict

from arc_ao.calibration.data import Batch
from arc_ao.pretrained import is_pretrained_config

PACKAGE = Path(__file__).parents[1]
LEAVES = (type(None), bool, int, float, complex, str, bytes, range, enum.Enum)
TORCH_LEAVES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
MACHINERY = vars(nn.Module()).keys()  # of every module: parameters, hooks, and the mode
LIBRARIES = ("torch", "torchao", "transformers", "numpy")
PLACES = {"name_or_path", "_name_or_path"}  # where a model was loaded from


def fingerprint(
    model: nn.Module, configs: dict[str, AOBaseConfig], batches: list[Batch | Tensor]
) -> dict[str, str]:
    """What names the work of one call; equal for another call that gives the same result.

    Args:
        configs: config of every linear that is to be quantized, by fully qualified name.

    Raises:
        ValueError: a batch that holds an object of a kind that has no digest.
    """
    described = {name: config_to_dict(config) for name, config in configs.items()}
    return {
        "versions": versions(),
        "precision": precision(),
        "model": digest(list(_modules(model))),
        "config": digest(json.dumps(described, sort_keys=True, default=str)),
        "data": digest(list(batches), unknown=_refuse),
    }


def versions() -> str:
    """Of everything whose code computes."""
    source = digest([(str(f.relative_to(PACKAGE)), f.read_bytes()) for f in _source_files()])
    others = [f"{library} {_version(library)}" for library in LIBRARIES]
    return ", ".join([f"arc_ao {source[:12]}", f"Python {platform.python_version()}", *others])


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def precision() -> str:
    """Settings of torch by which the same call gives other numbers."""
    casts = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    casts = [f"{device} {torch.get_autocast_dtype(device)}" for device in casts]
    return (
        f"float32 products {torch.get_float32_matmul_precision()}, "
        f"autocast {' and '.join(casts) or 'off'}, default {torch.get_default_dtype()}"
    )


def _modules(model: nn.Module) -> Iterator[Any]:
    """What makes up a model's forward, module by module."""
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = {k: v for k, v in vars(module).items() if k not in MACHINERY}
        yield name, type(module), type(module).forward, attributes
        yield [dict(module._parameters), dict(module._buffers)]
        yield [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _type_name(value: Any) -> str:
    """Objects that a module holds, and that are none of its parts, count by their kind."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _refuse(value: Any) -> str:
    raise ValueError(
        f"work_dir: expected calibration data of tensors, numbers and strings, found a "
        f"{_type_name(value)}, which cannot be told from another one; leave work_dir out"
    )


def digest(value: Any, *, unknown: Callable[[Any], str] = _type_name) -> str:
    """SHA-256 of a value and all that it holds, in hexadecimal; equal in every process.

    Args:
        unknown: what to write of an object of a kind that has no parts here.
    """
    hasher, seen = hashlib.sha256(), {}

    def feed(value: Any) -> None:
        if isinstance(value, (Tensor, types.FunctionType)) or is_pretrained_config(value):
            if id(value) in seen:  # shared, such as a tied weight
                hasher.update(f"same as {seen[id(value)][0]}\n".encode())
                return
            seen[id(value)] = len(seen), value  # held, or another one could get its id
        kind, parts = _kind_and_parts(value, unknown)
        parts = list(parts)
        hasher.update(f"{kind} of {len(parts)}\n".encode())
        for part in parts:
            if isinstance(part, memoryview):
                hasher.update(part)
            else:
                feed(part)

    feed(value)
    return hasher.hexdigest()


def _kind_and_parts(value: Any, unknown: Callable[[Any], str]) -> tuple[str, Iterable[Any]]:
    """One line that tells a value from others, and what it holds."""
    if isinstance(value, (*LEAVES, *TORCH_LEAVES)):
        return f"{type(value).__name__} {value!r}", ()
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, numpy.ndarray) and value.dtype != object:
        values = memoryview(value.tobytes())
        return f"array {value.dtype.str} {value.shape}", [values]
    if is_pretrained_config(value):
        attention = getattr(value, "_attn_implementation", None)
        return f"config {type(value).__qualname__}", [value.to_dict(), attention]
    if isinstance(value, Mapping):
        keys = sorted(value.keys() - PLACES, key=repr)
        return "mapping", [part for key in keys for part in (key, value[key])]
    if isinstance(value, (set, frozenset)):
        return "set", sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _type_name(value), [vars(value)]
    if isinstance(value, types.CodeType):
        return "code", [value.co_code, value.co_names, value.co_consts]
    if callable(value) and not isinstance(value, nn.Module):
        return _callable(value, unknown)
    return unknown(value), ()


def _tensor(tensor: Tensor) -> tuple[str, Iterable[Any]]:
    kind = f"tensor {tensor.dtype} {list(tensor.shape)}"
    if hasattr(tensor, "__tensor_flatten__"):  # weights that are quantized already
        names, attributes = tensor.__tensor_flatten__()
        return f"{kind} {attributes}", [(name, getattr(tensor, name)) for name in names]
    values = tensor.detach().cpu().contiguous().reshape(-1)
    return kind, [memoryview(values.view(torch.uint8).numpy())]


def _callable(value: Any, unknown: Callable[[Any], str]) -> tuple[str, Iterable[Any]]:
    """A class or builtin by its name; a function by its code and what it has captured."""
    if isinstance(value, functools.partial):
        return "partial", [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return f"method of {_type_name(value.__self__)}", [value.__func__]
    if isinstance(value, types.FunctionType):
        captured = [cell.cell_contents for cell in value.__closure__ or () if _is_plain(cell)]
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, captured]
        return f"function {value.__module__}.{value.__qualname__}", parts
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', None)}.{value.__qualname__}", ()
    return unknown(value), ()


def _is_plain(cell: types.CellType) -> bool:
    """Whether a captured value says what a function computes; caches and the like change."""
    try:
        return isinstance(cell.cell_contents, (*LEAVES, Tensor, types.FunctionType))
    except ValueError:  # not set yet
        return False
