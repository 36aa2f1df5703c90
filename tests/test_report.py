"""The per-layer report: SQNR, blocks, bits, plot."""

import copy
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao.eval.plot import panels, plot_report
from arc_ao.eval.report import (
    LayerReport,
    format_report,
    layer_report,
    quantize_plain,
    save_report,
)


def _pair(config: ARCConfig):
    original = tiny_llama().eval()
    model = tiny_llama().eval()
    batches = [torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(0))]
    quantize_(model, config, calibration_data=batches, progress=False)
    return model, original, batches


def test_plain_layers_report_equal_columns():
    """A plainly quantized model has the SQNR of plain NVFP4: exactly where no input is shared, and
    up to the shared outer scale of q/k/v and gate/up."""
    model, original, batches = _pair(ARCConfig(budget=0.0, recipe="plain"))
    rows = layer_report(model, original, batches, progress=False)
    assert len(rows) == 14
    alone = [row for row in rows if "o_proj" in row.name or "down_proj" in row.name]
    assert len(alone) == 4 and all(row.sqnr_db == row.sqnr_plain_db for row in alone)
    assert all(row.sqnr_db == pytest.approx(row.sqnr_plain_db, abs=0.3) for row in rows)
    assert all(10 < row.sqnr_db < 30 for row in rows)
    assert all(row.act_channels == row.weight_channels == 0 for row in rows)


def test_sqnr_against_a_direct_computation():
    """The reported figure is 10 log10(signal / noise) of the layer's output."""
    torch.manual_seed(0)
    original, model = nn.Sequential(nn.Linear(64, 32)), nn.Sequential(nn.Linear(64, 32))
    model.load_state_dict(original.state_dict())
    x = torch.randn(40, 64)
    quantize_(
        model,
        ARCConfig(recipe="balanced", num_act_channels=16, num_weight_channels=16),
        calibration_data=[x],
        progress=False,
    )
    (row,) = layer_report(model, original, [x], progress=False)
    reference = x @ original[0].weight.t()
    noise = model(x) - original[0].bias - reference
    expected = 10 * torch.log10(reference.square().sum() / noise.square().sum())
    assert row.sqnr_db == pytest.approx(expected.item(), abs=1e-3)
    assert row.sqnr_db > row.sqnr_plain_db
    assert (row.act_channels, row.weight_channels) == (16, 16)
    # Base and one stored residual block of 16: 4.5 bits * 80 / 64, then the block ids and scale.
    assert row.bits_per_weight == pytest.approx(4.5 * 80 / 64 + 8 * (4 + 4 + 4) / (32 * 64))


def test_residuals_raise_every_layers_sqnr():
    model, original, batches = _pair(
        ARCConfig(recipe="balanced", num_act_channels=16, num_weight_channels=16)
    )
    rows = layer_report(model, original, batches, progress=False)
    assert all(row.sqnr_db > row.sqnr_plain_db for row in rows)


def test_original_is_left_as_it_was():
    model, original, batches = _pair(ARCConfig(budget=0.0, recipe="plain"))
    layer_report(model, original, batches, progress=False)
    assert not any(module._forward_pre_hooks for module in original.modules())


def test_files(tmp_path):
    """JSON holds the rows, the PNG is a picture, the table names every layer."""
    model, original, batches = _pair(ARCConfig(budget=0.2, recipe="balanced"))
    rows = layer_report(model, original, batches, progress=False)
    save_report(rows, tmp_path / "rows.json")
    plot_report(rows, tmp_path / "rows.png")
    assert [r["name"] for r in json.loads((tmp_path / "rows.json").read_text())] == [
        row.name for row in rows
    ]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert format_report(rows).row_count == len(rows)


def test_wrong_models_are_refused():
    model, original, batches = _pair(ARCConfig(budget=0.0, recipe="plain"))
    with pytest.raises(ValueError, match="found no ARCTensor"):
        layer_report(original, original, batches)
    with pytest.raises(ValueError, match="has no linear 'model.layers.0"):
        layer_report(model, nn.Sequential(nn.Linear(4, 4)), batches)


def test_plain_quantization_pads_ragged_layers():
    assert quantize_plain(nn.Linear(172, 8)).qdata.shape == (8, 176 // 2)


def test_inputs_in_every_form_and_by_keyword():
    """Strings with a tokenizer; linears that are called by keyword; no input is refused."""
    model, original, _ = _pair(ARCConfig(budget=0.0, recipe="plain"))
    rows = layer_report(model, original, ["some text"], tokenizer=byte_tokenizer(), progress=False)
    assert len(rows) == 14
    with pytest.raises(ValueError, match="empty"):
        layer_report(model, original, [])

    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 16)

        def forward(self, x):
            return self.linear(input=x)

    original, x = Keyword(), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(original)
    quantize_(model, ARCConfig(budget=0.0, recipe="plain"), progress=False)
    assert len(layer_report(model, original, [x], progress=False)) == 1


def test_deep_models_have_a_panel_for_each_projection(tmp_path):
    """210 layers on one axis cannot be read: one panel per projection, its blocks in order."""
    names = [f"layers.{block}.{name}" for block in range(30) for name in ("q_proj", "up_proj")]
    row = LayerReport("", 64, 64, 10.0, 12.0, 16, 0, 4.5)
    rows = [replace(row, name=name) for name in [*names, *(f"x.{name}" for name in names[:30])]]
    found = panels(rows)
    assert list(found) == ["q_proj", "up_proj"] and len(found["q_proj"]) == 45
    assert [r.name for r in found["up_proj"][:2]] == ["layers.0.up_proj", "layers.1.up_proj"]
    assert panels(rows[:14]) == {"": rows[:14]}
    plot_report(rows, tmp_path / "rows.png")
    width, height = plt.imread(tmp_path / "rows.png").shape[1::-1]
    assert width < 2 * height
