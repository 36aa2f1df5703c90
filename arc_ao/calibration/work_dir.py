"""A folder of finished work, so that an interrupted quantization goes on where it stopped.

    fingerprint.json             digests of model, config and data that the work belongs to
    calibration.safetensors      statistics of every input; what the search measured
    block_00003.safetensors      quantized weights of one block
    tuning.safetensors           how far training the codes has come

A file is written under another name, flushed and renamed: it is complete or absent, also after
SIGKILL. What a rerun takes over equals what it would compute again, bit for bit, on the same
machine with the same number of threads. The folder may be deleted once the model is saved.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig, config_to_dict
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from arc_ao.calibration.data import Batch
from arc_ao.methods.few_tokens import RoundingNote
from arc_ao.tensor import ARCTensor

ROUNDING = "arc_rounding"  # key in the metadata of a block
FINGERPRINT, CALIBRATION = "fingerprint.json", "calibration.safetensors"
TUNING = "tuning.safetensors"
FORMAT = "4"  # raised whenever the same inputs give other bits


def fingerprint(
    model: nn.Module, configs: dict[str, AOBaseConfig], batches: list[Batch | Tensor]
) -> dict[str, str]:
    """Digests of all that a quantized model depends on.

    Args:
        configs: config of every linear that is to be quantized, by fully qualified name.
    """
    state = [*model.named_parameters(), *model.named_buffers()]
    described = {name: config_to_dict(config) for name, config in configs.items()}
    return {
        "format": FORMAT,
        "model": _digest([str(type(model)), *(part for item in state for part in item)]),
        "config": _digest([json.dumps(described, sort_keys=True, default=str)]),
        "data": _digest([part for batch in batches for part in _parts(batch)]),
    }


def _parts(batch: Batch | Tensor) -> list[Any]:
    if isinstance(batch, Tensor):
        return ["tensor", batch]
    return [part for key in sorted(batch) for part in (key, batch[key])]


def _digest(parts: list[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, Tensor):
            digest.update(repr(part).encode())
            continue
        digest.update(f"{part.dtype} {list(part.shape)}".encode())
        if hasattr(part, "__tensor_flatten__"):  # weights that are quantized already
            names, attributes = part.__tensor_flatten__()
            inner = [getattr(part, name) for name in names]
            digest.update(_digest([*names, str(attributes), *inner]).encode())
            continue
        values = part.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


class WorkDir:
    """The folder of one quantization.

    Args:
        path: new or empty folder, or that of an earlier run.
        expected: `fingerprint` of this run.

    Raises:
        ValueError: the folder belongs to another run or holds something else, saying what differs.
    """

    def __init__(self, path: str | Path, expected: dict[str, str]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / FINGERPRINT
        if not file.exists():
            self._refuse_other_files()
            _replace(file, lambda temporary: temporary.write_text(json.dumps(expected, indent=2)))
        found = json.loads(file.read_text())
        differing = [key for key in expected if found.get(key) != expected[key]]
        if differing:
            raise ValueError(
                f"work_dir: expected the work of this call in {self.path}, found that of another "
                f"{' and '.join(differing)}; repeat the call that began it, or name another folder"
            )

    def _refuse_other_files(self) -> None:
        others = [f.name for f in self.path.iterdir() if not f.name.startswith(".tmp-")]
        if others:
            raise ValueError(
                f"work_dir: expected an empty folder or an earlier run in {self.path}, found "
                f"{sorted(others)[0]!r}; name another folder"
            )

    def save_calibration(self, tensors: dict[str, Tensor], measured: Any) -> None:
        """Keep statistics by name, and what was measured (JSON)."""
        self._save(CALIBRATION, tensors, {"measured": json.dumps(measured)})

    def load_calibration(self) -> tuple[dict[str, Tensor], Any] | None:
        """What `save_calibration` kept, or None."""
        loaded = self._load(CALIBRATION)
        return None if loaded is None else (loaded[0], json.loads(loaded[1]["measured"]))

    def save_block(
        self, index: int, weights: dict[str, ARCTensor], notes: dict[str, RoundingNote]
    ) -> None:
        """Keep the quantized weights of a finished block and how they were rounded, by fully
        qualified name."""
        plain = {f"{name}.weight": w.to_layout("plain") for name, w in weights.items()}
        tensors, metadata = flatten_tensor_state_dict(plain)
        described = {name: note.to_dict() for name, note in notes.items()}
        self._save(_block_file(index), tensors, metadata | {ROUNDING: json.dumps(described)})

    def load_block(self, index: int) -> tuple[dict[str, ARCTensor], dict[str, RoundingNote]] | None:
        """What `save_block` kept, weights in the plain layout; None if it is not finished."""
        loaded = self._load(_block_file(index))
        if loaded is None:
            return None
        tensors, metadata = loaded
        described = json.loads(metadata.pop(ROUNDING))
        weights, _ = unflatten_tensor_state_dict(tensors, metadata)
        notes = {name: RoundingNote(**fields) for name, fields in described.items()}
        return {name.removesuffix(".weight"): weight for name, weight in weights.items()}, notes

    def save_tuning(self, tensors: dict[str, Tensor], notes: Any) -> None:
        """Keep the state of a training run: tensors by name, and notes (JSON)."""
        self._save(TUNING, tensors, {"notes": json.dumps(notes)})

    def load_tuning(self) -> tuple[dict[str, Tensor], Any] | None:
        """What `save_tuning` kept, or None."""
        loaded = self._load(TUNING)
        return None if loaded is None else (loaded[0], json.loads(loaded[1]["notes"]))

    def _save(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        copies = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        _replace(self.path / name, lambda file: save_file(copies, file, metadata=metadata))

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        if not (self.path / name).exists():
            return None
        with safe_open(self.path / name, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def _block_file(index: int) -> str:
    return f"block_{index:05d}.safetensors"


def _replace(path: Path, write: Any) -> None:
    """Let `write` fill a temporary file, then rename it to `path`."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
