"""Plots of reports, written as PNG without a display."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

from arc_ao.eval.report import LayerReport  # noqa: E402

PLAIN_COLOUR, ARC_COLOUR, WEIGHT_COLOUR = "#8a8f98", "#1f6feb", "#d9822b"


def plot_report(rows: list[LayerReport], path: Path, title: str = "") -> None:
    """Output SQNR per layer above, residual channels over in_features below."""
    positions = range(len(rows))
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(max(6.0, 0.28 * len(rows)), 6.0), height_ratios=(3, 2)
    )
    top.plot(positions, [r.sqnr_plain_db for r in rows], "o-", color=PLAIN_COLOUR, label="NVFP4")
    top.plot(positions, [r.sqnr_db for r in rows], "o-", color=ARC_COLOUR, label="ARC")
    top.set_ylabel("output SQNR (dB)")
    top.set_title(title or "Output SQNR per layer")
    act = [100 * r.act_channels / r.in_features for r in rows]
    weight = [100 * r.weight_channels / r.in_features for r in rows]
    bottom.bar(positions, act, color=ARC_COLOUR, label="activation residuals")
    bottom.bar(positions, weight, bottom=act, color=WEIGHT_COLOUR, label="weight residuals")
    bottom.set_ylabel("extra channels (%)")
    bottom.set_xticks(list(positions), [_short(r.name) for r in rows], rotation=90, fontsize=7)
    for axis in (top, bottom):
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(name: str) -> str:
    """Layer number and projection: "model.layers.3.mlp.up_proj" -> "3.up"."""
    parts = name.split(".")
    number = next((p for p in parts if p.isdigit()), "")
    return f"{number}.{parts[-1].removesuffix('_proj')}".lstrip(".")
