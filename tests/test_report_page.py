"""A report's page from its dictionary: complete, self-contained, harmless, small, readable."""

import base64
import copy
import hashlib
import io
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from report_cases import Page, report_dictionary

from arc_ao.report_page.charts import HEAT_PIXELS, nice_range, outlier_maps, runs, sqnr_panels
from arc_ao.report_page.page import change, layer_rows, render_page, show

SECTIONS = {"model", "quality", "samples", "outliers", "sqnr", "budget", "config"}
ATTACK = '"><script>document.title = "taken"</script><img src=x onerror=alert(1)>'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def attacked() -> dict:
    """A dictionary in which every text that comes from a model, or a user, is hostile."""
    data = report_dictionary()
    model, sample, layer = data["models"][0], data["samples"][0], data["layers"][0]
    data["title"] = model["name"] = model["path"] = model["architecture"] = ATTACK
    data["original"]["path"] = data["quality"]["text"] = data["layer_text"] = ATTACK
    data["quality"]["missing"] = data["layers_missing"] = ATTACK
    model["notes"] = [ATTACK]
    model["summary"]["skipped"] = {ATTACK: ATTACK}
    model["summary"]["configs"][0]["_data"] = {ATTACK: ATTACK}
    sample["prompt"] = sample["original"] = ATTACK
    sample["models"] = [{"text": "the " + ATTACK, "tokens": 9, "same_tokens": 0}]
    layer["name"] = layer["kind"] = layer["block"] = data["budget"][0]["kind"] = ATTACK
    return data


@pytest.mark.parametrize("models", [1, 2])
def test_the_page_nests_and_has_every_section(models):
    page = Page(render_page(report_dictionary(models=models)))
    assert page.ids() >= SECTIONS
    assert len(page.all("img")) == 7  # kinds of layers
    assert len([svg for svg in page.all("svg") if svg.get("class") == "chart"]) == 14


def test_sections_without_content_say_why_or_are_left_out():
    """No samples of encoders; what was not measured names the option that gives it."""
    data = report_dictionary()
    data["samples"], data["original"] = [], None
    data["quality"] |= {"metrics": [], "missing": "Not measured: give --original."}
    data["models"][0]["summary"] = None
    for layer in data["layers"]:
        layer["models"][0] |= {"sqnr_plain_db": None, "sqnr_db": None}
    text = render_page(data)
    assert Page(text).ids() >= SECTIONS - {"samples"} and 'id="samples"' not in text
    assert "Not measured: give --original." in text and "Not recorded" in text
    assert sqnr_panels(data) == []


def test_every_number_of_the_dictionary_is_on_the_page():
    """Cells hold the values themselves, beside the rounded ones that are shown."""
    data = report_dictionary(models=2)
    values = Page(render_page(data)).values()
    wanted = [v for row in data["facts"] + data["quality"]["metrics"] for v in row["models"]]
    keys = ("sqnr_db", "act_channels", "weight_channels", "bits_per_weight")
    wanted += [m[key] for layer in data["layers"] for m in layer["models"] for key in keys]
    wanted += [m[key] for row in data["budget"] for m in row["models"] for key in m]
    assert set(wanted) <= set(values)


def test_text_of_models_cannot_become_markup():
    """Names, generated text and notes are shown as they are; the one script is ours."""
    page = Page(render_page(attacked()))
    assert len(page.all("script")) == 1
    assert all(img["src"].startswith("data:image/png;base64,") for img in page.all("img"))
    assert ATTACK in "".join(page.data["blockquote"] + page.data["u"])


def test_the_browser_is_told_to_run_our_script_alone():
    """By its digest; everything else is off, so a mistake in escaping would stay harmless."""
    text = render_page(report_dictionary())
    (policy,) = [m["content"] for m in Page(text).all("meta") if "http-equiv" in m]
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("models", [1, 2])
def test_nothing_is_read_from_outside(models):
    text = render_page(report_dictionary(models=models))
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), value
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|\bfetch\(|XMLHttp", text)


def test_links_lead_somewhere():
    page = Page(render_page(report_dictionary()))
    assert {link["href"].removeprefix("#") for link in page.all("a")} == SECTIONS


def test_a_page_of_thirty_blocks_stays_small():
    """Two models with the layers of SmolLM2-135M; the bound leaves mail and chat programs alone."""
    assert len(render_page(report_dictionary(blocks=30, models=2)).encode()) < 2_000_000


def test_pictures_and_tables_can_be_heard():
    """Alternative texts, headings of rows and columns, captions, both colour schemes."""
    page = Page(text := render_page(report_dictionary(models=2)))
    assert all(img["alt"] for img in page.all("img"))
    charts = [svg for svg in page.all("svg") if svg.get("class") == "chart"]
    assert charts and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in text


def test_two_models_are_listed_by_how_much_they_differ():
    """The largest difference of SQNR first; before them what only one of them quantized."""
    layers = report_dictionary(models=2)["layers"]
    for layer, difference in zip(layers, range(len(layers)), strict=True):
        first, second = layer["models"]
        second["sqnr_db"] = first["sqnr_db"] + difference * (-1) ** difference
    layers[3]["models"][1] = None
    names = [row["name"] for row in layer_rows(layers)]
    expected = [layer["name"] for layer in reversed(layers)]
    expected.remove(layers[3]["name"])
    assert names == [layers[3]["name"], *expected]
    assert [row["name"] for row in layer_rows(copy.deepcopy(layers)[:1])] == [layers[0]["name"]]


def test_maps_show_outliers_and_where_residuals_are():
    """A column 64 times the median has the last colour, the median itself another one; below, a
    mark over the columns of each run."""
    data = report_dictionary(blocks=1)
    layer = data["layers"][0]
    layer["input"]["column_amax"] = [1.0] * 191 + [64.0]
    layer["models"][0] |= {"act_columns": [0, 1, 2, 9], "weight_columns": []}
    found = outlier_maps(data)[0]
    _, _, encoded = found["picture"].partition("base64,")
    pixels = plt.imread(io.BytesIO(base64.b64decode(encoded)))  # [row, column, 4]
    assert pixels.shape[:2] == (found["height"], 192) and found["rows"][0]["peak"] == 64
    assert (pixels[:HEAT_PIXELS, :191] == pixels[0, 0]).all() and pixels[0, 191, :2].min() > 0.9
    assert (pixels[HEAT_PIXELS:, :, 3] == 0).all()
    assert [(m["css"], m["x"], m["width"]) for m in found["marks"]] == [
        ("act", 0, 3),
        ("act", 9, 1),
    ]


def test_layers_that_no_token_reached_have_no_row():
    data = report_dictionary()
    data["layers"][0]["input"] = None
    data["layers"][1]["input"] |= {"column_amax": [0.0] * 192, "median_amax": 0.0}
    maps = {found["kind"]: found for found in outlier_maps(data)}
    assert [len(maps[f"self_attn.{kind}_proj"]["rows"]) for kind in "qk"] == [1, 2]
    Page(render_page(data))


def test_runs_and_scales():
    assert runs([0, 1, 2, 9, 11, 12]) == [(0, 3), (9, 1), (11, 2)] and runs([]) == []
    assert nice_range(17.2, 29.9) == (15.0, 30.0, [15.0, 20.0, 25.0, 30.0])
    assert nice_range(0.0, 36.0) == (0.0, 40.0, [0.0, 10.0, 20.0, 30.0, 40.0])
    low, high, _ = nice_range(20.0, 20.0)
    assert low < high


def test_numbers_read_as_they_should():
    assert show(None, "seconds") == "-" and show(2_831_000, "bytes") == "2.83 MB"
    assert show(0.5, "top1_agreement", signed=True) == "+50.00%"
    assert show(float("inf"), "perplexity") == "inf"
    inf = float("inf")
    assert change([1.0, None]) is None and change([inf, inf]) is None and change([1, 3]) == 2


def browse(page: Path, *options: str) -> bytes:
    """What headless Chromium prints of a page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={page.parent / 'browser'}", *options, page.as_uri()]
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.slow
def test_a_browser_draws_it_in_both_colour_schemes(tmp_path):
    """White and dark backgrounds with something on them."""
    page = tmp_path / "page.html"
    page.write_text(render_page(report_dictionary(models=2)))
    backgrounds = []
    for scheme in (1, 0):  # light, dark
        picture = tmp_path / f"{scheme}.png"
        options = [f"--screenshot={picture}", "--window-size=900,1200"]
        browse(page, f"--blink-settings=preferredColorScheme={scheme}", *options)
        pixels = plt.imread(picture)[..., :3]
        backgrounds.append(pixels[2, 2].mean())
        assert pixels.std() > 0.02
    light, dark = backgrounds
    assert light > 0.95 and dark < 0.2


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.slow
def test_a_browser_runs_our_script_and_no_other(tmp_path):
    """Tables get their buttons; a hostile page keeps its title, and even an unescaped script does
    not run."""
    page = tmp_path / "page.html"
    text = render_page(attacked())
    page.write_text(text.replace("<main>", "<main><script>document.title = 'taken'</script>"))
    shown = browse(page, "--dump-dom").decode()
    assert '<button type="button">layer</button>' in shown
    assert "<title>taken" not in shown
