"""The side file of an exported checkpoint: what arc_ao computes with beyond the base.

A safetensors file in a folder of its own, under another ending: engines read every file of weights
that lies beside the index and refuse names that they do not know, and converters look into folders.
Tensors of a linear are `NAME.PART`, with the parts of `Extras`; the metadata, one JSON document,
says how activations are scaled.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arc_ao.checkpoints.layer import Extras

KEY = "arc_ao"  # in config.json beside the format's own, and in the metadata
PATH = "arc_ao/residuals.data"
VERSION = 1
SETTINGS = ("activation_scale", "activation_block_scale")
E4M3_PARTS = ("residual_scale",)


def config_entry() -> dict[str, Any]:
    """What config.json says about the side file."""
    return {"version": VERSION, "side_file": PATH}


def write(directory: Path, extras: Mapping[str, Extras]) -> None:
    """Write the extras of every linear of a checkpoint."""
    path = directory / PATH
    path.parent.mkdir()
    tensors, settings = {}, {}
    for name, extra in extras.items():
        settings[name] = {field: getattr(extra, field) for field in SETTINGS}
        tensors |= {f"{name}.{part}": tensor for part, tensor in _parts(extra).items()}
    document = json.dumps({"version": VERSION, "layers": settings})
    save_file(tensors, path, metadata={"format": "pt", KEY: document})


def _parts(extra: Extras) -> dict[str, Tensor]:
    found = {f.name: getattr(extra, f.name) for f in fields(Extras) if f.name not in SETTINGS}
    return {
        name: tensor.view(torch.float8_e4m3fn) if name in E4M3_PARTS else tensor.clone()
        for name, tensor in found.items()
        if tensor is not None
    }


def read(directory: Path) -> dict[str, Extras]:
    """Extras by the name of their linear; nothing where the directory has no side file.

    Raises:
        ValueError: written by a newer arc_ao, or by something else.
    """
    path = directory / PATH
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        document = json.loads((file.metadata() or {}).get(KEY, "{}"))
        if document.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected version {VERSION}, found {document.get('version')}; update "
                "arc_ao, or import the base alone with residuals=False"
            )
        present = set(file.keys())
        return {
            name: Extras(**settings, **_read_parts(file, name, present))
            for name, settings in document["layers"].items()
        }


def _read_parts(file: Any, name: str, present: set[str]) -> dict[str, Tensor]:
    parts = {}
    for field in fields(Extras):
        key = f"{name}.{field.name}"
        if field.name not in SETTINGS and key in present:
            tensor = file.get_tensor(key)
            parts[field.name] = tensor.view(torch.uint8) if field.name in E4M3_PARTS else tensor
    return parts
