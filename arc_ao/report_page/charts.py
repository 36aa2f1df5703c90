"""Geometry of a report page's charts: numbers and paths, which the template draws as inline SVG.

One small chart for each kind of layer, over the blocks of the model, all on the same scale. What is
drawn is never text of a model: names and titles go through the template's escaping.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from matplotlib import image

Layer = dict[str, Any]

WIDTH, HEIGHT = 300.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 6.0, 8.0, 22.0  # of the axes inside of a chart
HEAT_PIXELS, LANE_PIXELS = 10, 3  # of a row of an outlier map
COLOURS = "magma"
LOWEST, HIGHEST = -2, 6  # log2 of amax over the layer's median channel
TICKS = 4


def by_kind(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Layers of each kind, in the model's order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer["kind"], []).append(layer)
    return found


def sqnr_panels(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Output SQNR by kind: a line for plain NVFP4 and one for each model; none if not measured."""
    labels = [model["label"] for model in data["models"]]
    values = [v for layer in data["layers"] for m in layer["models"] for v in _sqnr(m)]
    if not values:
        return []
    low, high, ticks = nice_range(min(values), max(values))
    y = _scale(low, high)
    panels = []
    for kind, layers in by_kind(data["layers"]).items():
        plain = [_plain(layer) for layer in layers]
        series = [_line("plain", "plain NVFP4", layers, plain, y)]
        for i, label in enumerate(labels):
            ours = [_finite(layer["models"][i], "sqnr_db") for layer in layers]
            series.append(_line(f"model-{i}", label, layers, ours, y))
        panels.append(_axes(kind, layers, ticks, y) | {"series": series})
    return panels


def _sqnr(model: dict[str, Any] | None) -> list[float]:
    values = [_finite(model, key) for key in ("sqnr_plain_db", "sqnr_db")]
    return [value for value in values if value is not None]


def _finite(model: dict[str, Any] | None, key: str) -> float | None:
    value = None if model is None else model[key]
    return value if value is not None and math.isfinite(value) else None


def _plain(layer: Layer) -> float | None:
    found = [_finite(model, "sqnr_plain_db") for model in layer["models"]]
    return next((value for value in found if value is not None), None)


def _line(
    css: str, name: str, layers: list[Layer], values: list[float | None], y: Callable
) -> dict[str, Any]:
    """Points with a title each, and the path through them."""
    step = (WIDTH - LEFT - RIGHT) / len(layers)
    points = [
        {
            "x": _round(LEFT + step * (i + 0.5)),
            "y": _round(y(value)),
            "title": f"{layer['name']}: {value:.2f} dB ({name})",
        }
        for i, (layer, value) in enumerate(zip(layers, values, strict=True))
        if value is not None
    ]
    path = "M" + "L".join(f"{point['x']:g},{point['y']:g}" for point in points) if points else ""
    return {"css": css, "name": name, "points": points, "path": path}


def budget_panels(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Residual channels over in_features by kind: a stacked bar for each layer and model."""
    shares = [sum(_shares(layer, m)) for layer in data["layers"] for m in layer["models"]]
    low, high, ticks = nice_range(0.0, max(shares, default=0.0) or 1.0)
    y = _scale(low, high)
    panels = []
    for kind, layers in by_kind(data["layers"]).items():
        bars = [bar for i, layer in enumerate(layers) for bar in _bars(layer, i, len(layers), y)]
        panels.append(_axes(kind, layers, ticks, y, "%") | {"bars": bars})
    return panels


def _shares(layer: Layer, model: dict[str, Any] | None) -> tuple[float, float]:
    """Channels with activation and weight residuals, percent of in_features."""
    if model is None:
        return 0.0, 0.0
    counts = model["act_channels"], model["weight_channels"]
    act, weight = (100 * count / layer["in_features"] for count in counts)
    return act, weight


def _bars(layer: Layer, position: int, count: int, y: Callable) -> list[dict[str, Any]]:
    step = (WIDTH - LEFT - RIGHT) / count
    width = min(0.8 * step, 24.0) / len(layer["models"])
    left = LEFT + step * (position + 0.5) - width * len(layer["models"]) / 2
    bars = []
    for i, model in enumerate(layer["models"]):
        act, weight = _shares(layer, model)
        spans = {"act": (0.0, act), "weight": (act, act + weight)}
        for css, (bottom, top) in spans.items():
            box = {"x": left + width * i, "y": y(top), "width": width, "height": y(bottom) - y(top)}
            title = f"{layer['name']}: {act:.1f} % activation, {weight:.1f} % weight residuals"
            box = {key: _round(value) for key, value in box.items()}
            bars.append(box | {"css": css, "model": i, "title": title})
    return [bar for bar in bars if bar["height"] > 0]


def _axes(
    kind: str, layers: list[Layer], ticks: list[float], y: Callable, unit: str = ""
) -> dict[str, Any]:
    """Frame of one chart: ticks of both axes."""
    step = (WIDTH - LEFT - RIGHT) / len(layers)
    every = max(1, -(-len(layers) // 8))
    marks = [
        {"x": _round(LEFT + step * (i + 0.5)), "label": layer["block"]}
        for i, layer in enumerate(layers)
        if i % every == 0
    ]
    lines = [{"y": _round(y(value)), "label": f"{value:g}{unit}"} for value in ticks]
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT}
    return {"kind": kind, "linears": len(layers), "x": marks, "y": lines, **frame}


def _scale(low: float, high: float) -> Callable[[float], float]:
    """Value -> y of a chart."""
    return lambda value: TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)


def nice_range(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round bounds around low and high, and the round values between them."""
    rough = max(high - low, 1e-6) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _round(value: float) -> float:
    return round(value, 2)


def outlier_maps(data: dict[str, Any]) -> list[dict[str, Any]]:
    """For each kind of layer, and width of its input: a picture with a row for each layer, and
    lanes below each row, one a model and kind of residual, that mark where residuals are."""
    measured = [layer for layer in data["layers"] if layer["input"] is not None]
    key = lambda layer: (layer["kind"], layer["in_features"])
    groups: dict[tuple[str, int], list[Layer]] = {}
    for layer in measured:
        groups.setdefault(key(layer), []).append(layer)
    lanes = 2 * len(data["models"])
    return [_map(kind, layers, lanes) for (kind, _), layers in groups.items()]


def _map(kind: str, layers: list[Layer], lanes: int) -> dict[str, Any]:
    height = HEAT_PIXELS + LANE_PIXELS * lanes + 1
    columns = len(layers[0]["input"]["column_amax"])
    relative = np.array([_relative(layer["input"]) for layer in layers])  # [layers, columns]
    peaks = [2 ** row.max() for row in relative]
    return {
        "kind": kind,
        "in_features": layers[0]["in_features"],
        "channels_per_column": layers[0]["input"]["channels_per_column"],
        "columns": columns,
        "row_height": height,
        "height": height * len(layers),
        "picture": _picture(relative, height),
        "marks": [mark for i, layer in enumerate(layers) for mark in _marks(layer, i * height)],
        "rows": [
            {
                "label": layer["block"] or layer["name"],
                "y": i * height,
                "peak": peaks[i],
                "title": f"{layer['name']}: largest channel {peaks[i]:.3g} x the median one",
            }
            for i, layer in enumerate(layers)
        ],
        "highest": max(peaks),
        "rotated": any(m is not None and m["rotated"] for la in layers for m in la["models"]),
    }


def _relative(found: dict[str, Any]) -> np.ndarray:
    """log2 of the columns' amax over the median channel's, [columns]; no less than LOWEST."""
    amax = np.array(found["column_amax"], dtype=np.float64)
    ratio = amax / (found["median_amax"] or 1.0)
    return np.log2(np.maximum(ratio, 2.0**LOWEST))


def _picture(relative: np.ndarray, height: int) -> str:
    """PNG as a data URI: each row HEAT_PIXELS high, transparent for the rest of `height`."""
    unit = (np.clip(relative, LOWEST, HIGHEST) - LOWEST) / (HIGHEST - LOWEST)
    colours = matplotlib.colormaps[COLOURS](unit, bytes=True)  # [layers, columns, 4]
    rows = np.repeat(colours[:, None], height, axis=1)  # [layers, height, columns, 4]
    rows[:, HEAT_PIXELS:] = 0
    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(rows.reshape(-1, *rows.shape[2:]))
    image.imsave(buffer, pixels, format="png", metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _marks(layer: Layer, top: int) -> list[dict[str, Any]]:
    """Rectangles in units of columns and pixels."""
    found = []
    for i, model in enumerate(layer["models"]):
        for lane, css in enumerate(("act", "weight")):
            columns = [] if model is None else model[f"{css}_columns"]
            y = top + HEAT_PIXELS + LANE_PIXELS * (2 * i + lane)
            for first, length in runs(columns):
                box = {"x": first, "y": y, "width": length, "height": LANE_PIXELS}
                found.append(box | {"css": css, "model": i})
    return found


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, length) of the runs of consecutive numbers in a sorted list."""
    grouped = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    members = [[number for _, number in group] for _, group in grouped]
    return [(group[0], len(group)) for group in members]


def colour_bar() -> dict[str, Any]:
    """CSS colours from LOWEST to HIGHEST, and labels at their places in percent."""
    colours = [matplotlib.colors.to_hex(matplotlib.colormaps[COLOURS](i / 8)) for i in range(9)]
    exponents = range(LOWEST, HIGHEST + 1, 2)
    ticks = [
        {"at": 100 * (e - LOWEST) / (HIGHEST - LOWEST), "label": f"{2.0**e:g}x"} for e in exponents
    ]
    return {"colours": colours, "ticks": ticks}
