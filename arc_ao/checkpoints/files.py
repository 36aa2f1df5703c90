"""A Hugging Face directory's tensors by name, wherever the shards have them."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from arc_ao.checkpoints import modelopt
from arc_ao.checkpoints.model_files import INDEX, check_weight_files


@dataclass
class CheckpointFiles:
    """Open safetensors files of a directory; close with `with`.

    Attributes:
        config: of config.json.
        quantization: its quantization_config, or what hf_quant_config.json says; {} without.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    _where: dict[str, Any] = field(default_factory=dict)  # name -> open file
    _suffixes: dict[str, list[str]] = field(default_factory=dict)  # module -> last parts of names
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "CheckpointFiles":
        self.config = read_config(self.directory)
        check_weight_files(self.directory)
        self.quantization = quantization_of(self.directory, self.config)
        for path in self._paths():
            file = self._open.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():
                module, _, suffix = name.rpartition(".")
                self._where[name] = file
                self._suffixes.setdefault(module, []).append(suffix)
        return self

    def __exit__(self, *error: Any) -> None:
        self._where, self._suffixes = {}, {}
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, name: str) -> Tensor:
        """One tensor. KeyError: not there."""
        return self._where[name].get_tensor(name)

    def suffixes(self, module: str) -> list[str]:
        """Last parts of the names of a module's own tensors."""
        return self._suffixes.get(module, [])

    def dtype(self, name: str) -> str:
        """Of a tensor, in safetensors' spelling, such as "U8", "F8_E4M3" or "BF16"."""
        return self._where[name].get_slice(name).get_dtype()

    def shape(self, name: str) -> list[int]:
        """Of a tensor, without reading it."""
        return self._where[name].get_slice(name).get_shape()

    def _paths(self) -> list[Path]:
        """Files of the index, or all of the directory where there is none.

        Raises:
            FileNotFoundError: there is no file.
        """
        index = self.directory / INDEX
        paths = sorted(self.directory.glob("*.safetensors"))
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [self.directory / name for name in names]
        if not paths:
            raise FileNotFoundError(f"{self.directory}: expected *.safetensors, found no such file")
        return paths


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. FileNotFoundError: there is none."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: expected a Hugging Face model directory, found no config.json"
        )
    return json.loads(path.read_text())


def quantization_of(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json, or hf_quant_config.json beside it, says about quantization; {} without."""
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or text.get("quantization_config")
    if found:
        return found
    path = directory / modelopt.CONFIG_FILE
    return json.loads(path.read_text()) | {"quant_method": "modelopt"} if path.is_file() else {}
