"""A report as one HTML page that needs nothing else: no network, no other file, no script to read.

    path.write_text(render_page(data))       # data: that of data.py

Names and generated text come from models, so the template escapes everything. Besides, the page
forbids the browser by its Content-Security-Policy to load anything or to run any script but ours,
which sorts the tables and is known by its digest.
"""

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from arc_ao.report_page.charts import budget_panels, colour_bar, outlier_maps, sqnr_panels
from arc_ao.report_page.quality import common_length
from arc_ao.shipped import ASSETS

FOLDER = ASSETS / "report"
FORMS = {
    "bits_per_weight": ".3f",
    "extra_channels": ".2%",
    "extra_multiply_adds": ".2%",
    "linears": ",",
    "skipped": ",",
    "count": ",",
    "seconds": ",.1f",
    "perplexity": ".4f",
    "mean_kl": ".6f",
    "divergence": ".6f",
    "top1_agreement": ".2%",
    "sqnr_db": ".2f",
    "extra": ".2%",
    "share": ".1%",
}
MEGABYTES = "bytes"


def render_page(data: dict[str, Any]) -> str:
    """HTML of a dictionary of data.py."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"show": show, "change": change, "common": common_length}
    style, script = ((FOLDER / name).read_text() for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        **data,
        compared=len(data["models"]) > 1,
        rows=layer_rows(data["layers"]),
        ranked=any(model and model["rank"] for row in data["layers"] for model in row["models"]),
        config=config_table(data["models"]),
        maps=outlier_maps(data),
        colours=colour_bar(),
        sqnr=sqnr_panels(data),
        bars=budget_panels(data),
        style=style,
        script=script,
        script_hash=digest,
    )


def show(value: float | None, key: str, signed: bool = False) -> str:
    """A number as its row or column wants it; "-" for none."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    if key == MEGABYTES:
        return f"{value / 1e6:{sign},.2f} MB"
    return f"{value:{sign}{FORMS[key]}}"


def change(values: list[float | None]) -> float | None:
    """Second less first; None if one is missing, or both are infinite."""
    if len(values) < 2 or values[0] is None or values[1] is None:
        return None
    difference = values[1] - values[0]
    return None if math.isnan(difference) else difference


def layer_rows(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers as the table has them: in the model's order, or of two models by how much they
    differ, those of one model alone first."""
    rows = [layer | _figures(layer["models"]) for layer in layers]
    if rows and len(rows[0]["models"]) > 1:
        rows.sort(key=_difference, reverse=True)
    return rows


def _figures(models: list[dict[str, Any] | None]) -> dict[str, Any]:
    plain = [model["sqnr_plain_db"] for model in models if model is not None]
    sqnr = [None if model is None else model["sqnr_db"] for model in models]
    return {"plain": next((value for value in plain if value is not None), None), "sqnr": sqnr}


def _difference(row: dict[str, Any]) -> float:
    if None in row["models"]:
        return math.inf
    return abs(change(row["sqnr"]) or 0.0)


def config_table(models: list[dict[str, Any]]) -> dict[str, Any]:
    """A column for each resolved config, a row for each field."""
    columns, configs = [], []
    for model in models:
        found = (model["summary"] or {}).get("configs", [])
        for i, config in enumerate(found):
            number = f" {i + 1}" if len(found) > 1 else ""
            columns.append(f"{model['label'] if len(models) > 1 else 'value'}{number}")
            configs.append({"class": config.get("_type")} | config.get("_data", {}))
    fields = dict.fromkeys(field for config in configs for field in config)
    rows = [_config_row(field, configs) for field in fields if not field.startswith("_")]
    return {"columns": columns, "rows": rows}


def _config_row(field: str, configs: list[dict[str, Any]]) -> dict[str, Any]:
    values = [json.dumps(c[field]).strip('"') if field in c else "-" for c in configs]
    return {"field": field, "values": values, "differs": len(set(values)) > 1}


def write_page(data: dict[str, Any], path: Path) -> None:
    """Render a page into a file."""
    path.write_text(render_page(data), encoding="utf-8")
