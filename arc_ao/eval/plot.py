"""Plots of reports, written as PNG without a display."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

from arc_ao.eval.report import LayerReport  # noqa: E402

PLAIN_COLOUR, ARC_COLOUR, WEIGHT_COLOUR = "#8a8f98", "#1f6feb", "#d9822b"
MANY_LAYERS = 80  # above, one panel for each projection, over the blocks


def plot_report(rows: list[LayerReport], path: Path, title: str = "") -> None:
    """Output SQNR per layer above, residual channels over in_features below."""
    groups = panels(rows)
    width = 0.28 * len(rows) if len(groups) == 1 else 2.6 * len(groups)
    figure, axes = plt.subplots(
        2,
        len(groups),
        sharex="col",
        sharey="row",
        squeeze=False,
        figsize=(max(6.0, width), 6.0),
        height_ratios=(3, 2),
    )
    for (top, bottom), (name, members) in zip(axes.T, groups.items(), strict=True):
        _plot_sqnr(top, members)
        _plot_residuals(bottom, members)
        top.set_title(name)
        labels = [_short(row.name) if len(groups) == 1 else _block(row.name) for row in members]
        step = 1 if len(groups) == 1 else max(1, len(members) // 8)
        bottom.set_xticks(range(0, len(members), step), labels[::step], rotation=90, fontsize=7)
    for axis in axes[:, 0]:
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("output SQNR (dB)")
    axes[1, 0].set_ylabel("extra channels (%)")
    figure.suptitle(title or "Output SQNR per layer")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def panels(rows: list[LayerReport]) -> dict[str, list[LayerReport]]:
    """Rows by panel: all in one, or MANY_LAYERS and more by the last part of their names."""
    if len(rows) < MANY_LAYERS:
        return {"": rows}
    found: dict[str, list[LayerReport]] = {}
    for row in rows:
        found.setdefault(row.name.rpartition(".")[2], []).append(row)
    return found


def _plot_sqnr(axis: Any, rows: list[LayerReport]) -> None:
    positions = range(len(rows))
    marker = {"marker": "o", "markersize": 4}
    plain = [row.sqnr_plain_db for row in rows]
    axis.plot(positions, plain, color=PLAIN_COLOUR, label="NVFP4", **marker)
    axis.plot(positions, [r.sqnr_db for r in rows], color=ARC_COLOUR, label="ARC", **marker)
    axis.grid(axis="y", alpha=0.3)


def _plot_residuals(axis: Any, rows: list[LayerReport]) -> None:
    positions = range(len(rows))
    act = [100 * row.act_channels / row.in_features for row in rows]
    weight = [100 * row.weight_channels / row.in_features for row in rows]
    axis.bar(positions, act, color=ARC_COLOUR, label="activation residuals")
    axis.bar(positions, weight, bottom=act, color=WEIGHT_COLOUR, label="weight residuals")
    axis.grid(axis="y", alpha=0.3)


def _block(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")


def _short(name: str) -> str:
    """Layer number and projection: "model.layers.3.mlp.up_proj" -> "3.up"."""
    return f"{_block(name)}.{name.split('.')[-1].removesuffix('_proj')}".lstrip(".")
