"""Complaints about an NVFP4 checkpoint, ours or another library's, before an engine makes them.

Only headers and scales are read, no codes: a checkpoint of hundreds of GB takes what its scales do.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arc_ao.checkpoints import compressed_tensors, modelopt, side_file
from arc_ao.checkpoints.files import CheckpointFiles
from arc_ao.checkpoints.layer import fused_groups
from arc_ao.checkpoints.model_files import INDEX
from arc_ao.formats.nvfp4 import BLOCK_SIZE, E4M3_NAN

ROW_PARALLEL = ("o_proj", "down_proj", "w2", "out_proj", "dense_4h_to_h", "fc2")  # split along K
RANK_MULTIPLE = 32  # of in_features on a rank, which kernels of engines expect
TENSOR_DTYPES = {"weight_scale": "F8_E4M3"} | dict.fromkeys(
    ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale"), "F32"
)


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong.

    Attributes:
        kind: of the list below.
        name: of the linear or the file.
        message: what was expected and what was found.
    """

    kind: str
    name: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: {self.message}"

    def to_dict(self) -> dict[str, str]:
        """Plain dictionary."""
        return asdict(self)


@dataclass
class _Layer:
    """Tensors of one linear, by header, and what of them was read."""

    name: str
    form: Any  # format module
    files: CheckpointFiles

    def has(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self.files

    def dtype(self, suffix: str) -> str:
        return self.files.dtype(f"{self.name}.{suffix}")

    def shape(self, suffix: str) -> list[int]:
        return self.files.shape(f"{self.name}.{suffix}")

    def read(self, suffix: str) -> Tensor:
        return self.files.read(f"{self.name}.{suffix}")

    @property
    def in_features(self) -> int:
        """K of the weight."""
        return 2 * self.shape(self.form.WEIGHT)[1]

    @property
    def weight_scale(self) -> str:
        """Suffix of the weight's outer scale."""
        return self.form.SUFFIXES[2]

    @property
    def input_scale(self) -> str:
        """Suffix of the input's."""
        return self.form.SUFFIXES[3]


def check_checkpoint(directory: str | Path, ranks: Sequence[int] = (1,)) -> list[Complaint]:
    """Everything that is wrong with a checkpoint, in the order of its files.

    Kinds: "index" (files and index disagree), "missing" (a tensor of a layer), "dtype", "shape",
    "scale" (zero, negative, NaN or Inf), "fused" (linears that engines run as one differ),
    "activations" (W4A4 and W4A16 confused), "ignore" (a quantized layer is excluded, or the other
    way round), "alignment" (per rank of `ranks`), "side file".

    Raises:
        FileNotFoundError: no config.json or no file of weights. ValueError: nothing in NVFP4.
    """
    path = Path(directory)
    complaints = list(_index(path))
    with CheckpointFiles(path) as files:
        layers = list(_layers(files))
        if not layers:
            raise ValueError(f"{path}: expected linears in NVFP4, found none")
        sound = []
        for layer in layers:
            found = list(_tensors(layer))
            complaints += found
            if not found:
                sound.append(layer)
                complaints += [*_scales(layer), *_activations(layer), *_alignment(layer, ranks)]
        complaints += [*_fused(files, sound), *_ignored(files, layers)]
    return complaints + list(_side_file(path, {layer.name for layer in layers}))


def _layers(files: CheckpointFiles) -> Iterator[_Layer]:
    """Linears with any tensor that only NVFP4 has."""
    seen = set()
    for key in files:
        name, _, suffix = key.rpartition(".")
        if suffix in ("weight_packed", "weight_global_scale"):
            form = compressed_tensors
        elif suffix == "weight_scale_2" or (suffix == "weight" and files.dtype(key) == "U8"):
            form = modelopt
        else:
            continue
        if name not in seen:
            seen.add(name)
            yield _Layer(name, form, files)


def _index(path: Path) -> Iterator[Complaint]:
    """Engines read what the index lists; a tensor beside it is lost, or read twice."""
    index = path / INDEX
    if not index.is_file():
        return
    listed = json.loads(index.read_text())["weight_map"]
    with CheckpointFiles(path) as files:
        for name in sorted(listed.keys() - set(files)):
            yield Complaint("index", name, f"expected in {listed[name]}, found none")
        for name in sorted(set(files) - listed.keys()):
            yield Complaint("index", name, "expected in the index, found in a file alone")


def _tensors(layer: _Layer) -> Iterator[Complaint]:
    """Missing tensors, dtypes, shapes."""
    for suffix in layer.form.SUFFIXES[:3]:
        if not layer.has(suffix):
            yield Complaint("missing", layer.name, f"expected {suffix}, found none")
    for suffix, expected in ({layer.form.WEIGHT: "U8"} | TENSOR_DTYPES).items():
        if layer.has(suffix) and layer.dtype(suffix) != expected:
            found = layer.dtype(suffix)
            yield Complaint("dtype", layer.name, f"expected {suffix} in {expected}, found {found}")
    if layer.has(layer.form.WEIGHT) and layer.has("weight_scale"):
        rows, half = layer.shape(layer.form.WEIGHT)
        expected_shape, shape = [rows, 2 * half // BLOCK_SIZE], layer.shape("weight_scale")
        if shape != expected_shape:
            message = f"expected weight_scale {expected_shape}, found {shape}"
            if shape == [-(-rows // 128) * 128, -(-expected_shape[1] // 4) * 4]:
                message += ", as padded for a kernel; checkpoints have plain rows"
            yield Complaint("shape", layer.name, message)
    for suffix in layer.form.SUFFIXES[2:]:
        if layer.has(suffix) and torch.Size(layer.shape(suffix)).numel() != 1:
            found_shape = layer.shape(suffix)
            yield Complaint("shape", layer.name, f"expected one {suffix}, found {found_shape}")


def _scales(layer: _Layer) -> Iterator[Complaint]:
    """Scales that give no numbers, or nothing but zeros."""
    bits = layer.read("weight_scale").view(torch.uint8)
    if (bits & 0x7F == E4M3_NAN).any() or (bits >= 0x80).any():
        yield Complaint("scale", layer.name, "expected weight_scale of 0 to 448, found NaN or < 0")
    elif not bits.any():
        yield Complaint("scale", layer.name, "expected weight_scale above 0, found zeros alone")
    for suffix in layer.form.SUFFIXES[2:]:
        if not layer.has(suffix):
            continue
        value = layer.read(suffix).float()
        if not (torch.isfinite(value).all() and (value > 0).all()):
            found = value.flatten().tolist()
            yield Complaint(
                "scale", layer.name, f"expected a finite {suffix} above 0, found {found}"
            )


def _activations(layer: _Layer) -> Iterator[Complaint]:
    """An input scale where the configuration has no activations quantized, or the reverse."""
    try:
        said = layer.form.quantizes_input(layer.files.quantization, layer.name)
    except ValueError as error:
        yield Complaint("activations", layer.name, str(error))
        return
    has_scale = layer.has(layer.input_scale)
    if said is None:
        yield Complaint(
            "activations", layer.name, "expected a config group that has the layer, found none"
        )
    elif said and not has_scale:
        yield Complaint(
            "activations",
            layer.name,
            f"expected {layer.input_scale}, as its configuration quantizes activations (W4A4), "
            "found none",
        )
    elif has_scale and not said:
        yield Complaint(
            "activations",
            layer.name,
            f"expected no {layer.input_scale}, as its configuration leaves activations alone "
            "(W4A16), found one",
        )


def _alignment(layer: _Layer, ranks: Sequence[int]) -> Iterator[Complaint]:
    """in_features of a row-parallel layer that do not fill kernels' tiles on a rank."""
    if layer.name.rpartition(".")[2] not in ROW_PARALLEL:
        return
    for size in ranks:
        if size > 1 and layer.in_features % (size * RANK_MULTIPLE):
            yield Complaint(
                "alignment",
                layer.name,
                f"expected a multiple of {RANK_MULTIPLE} in_features on each of {size} ranks, "
                f"found {layer.in_features} / {size}",
            )


def _fused(files: CheckpointFiles, layers: list[_Layer]) -> Iterator[Complaint]:
    """Linears that engines run as one: all in NVFP4 or none, with equal outer scales."""
    by_name = {layer.name: layer for layer in layers}
    linears = {key.rpartition(".")[0] for key in files}
    for group in fused_groups(sorted(linears | by_name.keys())):
        there = [by_name[name] for name in group if name in by_name]
        plain = [n for n in group if n not in by_name and f"{n}.weight" in files]
        if there and plain:
            yield Complaint("fused", group[0], f"expected {', '.join(plain)} in NVFP4, too")
        for suffix in there[0].form.SUFFIXES[2:] if there else ():
            values = {m.name: m.read(suffix).float().max().item() for m in there if m.has(suffix)}
            if len(set(values.values())) > 1:
                yield Complaint("fused", group[0], f"expected one {suffix} for all, found {values}")


def _ignored(files: CheckpointFiles, layers: list[_Layer]) -> Iterator[Complaint]:
    """Layers that the configuration excludes and that are quantized all the same."""
    details = files.quantization.get("quantization", files.quantization)
    excluded = set(details.get("ignore") or details.get("exclude_modules") or [])
    for layer in layers:
        if layer.name in excluded:
            yield Complaint("ignore", layer.name, "expected unquantized, as its configuration says")


def _side_file(path: Path, layers: set[str]) -> Iterator[Complaint]:
    """A side file of another checkpoint, or none where the configuration names one."""
    try:
        extras = side_file.read(path)
    except ValueError as error:
        yield Complaint("side file", side_file.PATH, str(error))
        return
    with CheckpointFiles(path) as files:
        named = side_file.KEY in files.quantization
    if named and not extras:
        yield Complaint("side file", side_file.PATH, "expected, as config.json says, found none")
    if extras and extras.keys() != layers:
        differing = min(extras.keys() ^ layers)
        yield Complaint("side file", differing, "expected in the side file and in the checkpoint")


def format_complaints(complaints: list[Complaint], most: int = 20) -> str:
    """A line for each, those past `most` of a kind counted."""
    by_kind: dict[str, list[Complaint]] = defaultdict(list)
    for complaint in complaints:
        by_kind[complaint.kind].append(complaint)
    lines = []
    for kind, found in by_kind.items():
        lines += [str(complaint) for complaint in found[:most]]
        if len(found) > most:
            lines.append(f"{kind}: and {len(found) - most} more")
    return "\n".join(lines)
