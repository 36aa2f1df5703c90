"""Two NVFP4 checkpoints of one model, layer by layer: which codes and scales differ."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from arc_ao.checkpoints.files import CheckpointFiles
from arc_ao.checkpoints.layer import NVFP4Layer, check_layer
from arc_ao.checkpoints.read import form_of, read_layer
from arc_ao.formats import nvfp4


@dataclass(frozen=True)
class LayerDifference:
    """One linear of two checkpoints A and B.

    Attributes:
        codes, block_scales: shares of them that are equal bit for bit.
        weight_scale, input_scale: B's outer scale over A's; None where one has none.
        error: |W_B - W_A| over |W_A|, of the dequantized weights (Frobenius norms).
    """

    name: str
    codes: float
    block_scales: float
    weight_scale: float
    input_scale: float | None
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Layers of both checkpoints, and names of those that are in NVFP4 in one of them."""

    layers: list[LayerDifference]
    only_in_a: list[str]
    only_in_b: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable dictionary."""
        return asdict(self)


def compare_checkpoints(a: str | Path, b: str | Path) -> Comparison:
    """Compare two directories, of any form that `import_checkpoint` reads; their bases alone.

    One layer of each is held at a time.

    Raises:
        FileNotFoundError, ValueError: as `import_checkpoint`; or layers of different shapes, naming
            the first.
    """
    with CheckpointFiles(Path(a)) as files_a, CheckpointFiles(Path(b)) as files_b:
        forms_a, forms_b = dict(_layers(files_a)), dict(_layers(files_b))
        rows = [
            _difference(
                name, read_layer(files_a, name, form), read_layer(files_b, name, forms_b[name])
            )
            for name, form in forms_a.items()
            if name in forms_b
        ]
    return Comparison(
        rows, sorted(forms_a.keys() - forms_b.keys()), sorted(forms_b.keys() - forms_a.keys())
    )


def _layers(files: CheckpointFiles) -> Iterator[tuple[str, Any]]:
    """Name and form of every NVFP4 layer."""
    for key in files:
        form = form_of(files, key)
        if form is not None:
            yield key.rpartition(".")[0], form


def _difference(name: str, a: NVFP4Layer, b: NVFP4Layer) -> LayerDifference:
    for layer in (a, b):
        check_layer(name, layer)
    if a.shape != b.shape:
        raise ValueError(
            f"{name}: expected the same shape in both checkpoints, found {list(a.shape)} and "
            f"{list(b.shape)}; they are of different models"
        )
    squared, energy = 0.0, 0.0
    for rows in nvfp4.row_chunks(a.qdata, 1 << 18):
        weight = nvfp4.dequantize(a.qdata[rows], a.scale[rows], a.outer_scale)
        other = nvfp4.dequantize(b.qdata[rows], b.scale[rows], b.outer_scale)
        squared += (other - weight).double().square().sum().item()
        energy += weight.double().square().sum().item()
    return LayerDifference(
        name,
        _share(nvfp4.unpack(a.qdata) == nvfp4.unpack(b.qdata)),
        _share(a.scale == b.scale),
        (b.outer_scale / a.outer_scale).item(),
        _ratio(a.input_outer_scale, b.input_outer_scale),
        (squared / max(energy, torch.finfo(torch.float64).tiny)) ** 0.5,
    )


def _share(equal: torch.Tensor) -> float:
    return equal.double().mean().item()


def _ratio(a: torch.Tensor | None, b: torch.Tensor | None) -> float | None:
    return None if a is None or b is None else (b / a).item()


def format_comparison(comparison: Comparison) -> Table:
    """Table of the layers for a console; rows of layers in one checkpoint alone say so."""
    table = Table(title="NVFP4 checkpoints, B against A")
    table.add_column("layer", no_wrap=True)
    for column in ("equal codes", "equal block scales", "weight scale", "input scale", "error"):
        table.add_column(column, justify="right")
    for row in comparison.layers:
        given = "-" if row.input_scale is None else f"{row.input_scale:.4f}"
        table.add_row(
            row.name,
            f"{row.codes:.2%}",
            f"{row.block_scales:.2%}",
            f"{row.weight_scale:.4f}",
            given,
            f"{row.error:.2e}",
        )
    for side, names in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        for name in names:
            table.add_row(name, f"in {side} alone", "", "", "", "")
    return table
