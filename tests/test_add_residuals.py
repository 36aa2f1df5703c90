"""Residual blocks for models that another library quantized."""

import pytest
import torch
from test_checkpoints import CONFIGS, batches, export, logits, quantized

from arc_ao import NVFP4Config, add_residuals_, import_checkpoint
from arc_ao.summary import arc_tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An ordinary NVFP4 checkpoint."""
    model = quantized(NVFP4Config(exportable=True))
    return export(model, tmp_path_factory.mktemp("base") / "out")


def output_error(model, exact):
    return (logits(model).float() - exact).square().mean().item()


@pytest.mark.parametrize("scale", ["token", "static"])
def test_residuals_bring_the_output_nearer(base, scale):
    """To that of the same weights with activations as they are; with all of them, by 95 %."""
    exact = import_checkpoint(base, residuals=False, activation_scale=scale)
    for name, tensor in arc_tensors(exact).items():
        weight = torch.nn.Parameter(tensor.dequantize(), requires_grad=False)
        exact.get_submodule(name).weight = weight
    expected = logits(exact).float()
    errors = []
    for budget in (0.0, 0.25, 1.0):
        model = import_checkpoint(base, residuals=False, activation_scale=scale)
        before = {n: t.to_layout("plain").qdata.clone() for n, t in arc_tensors(model).items()}
        summary = add_residuals_(model, batches(), budget=budget, progress=False)
        assert summary.extra_channels <= budget and summary.bits_per_weight < 4.6
        for name, tensor in arc_tensors(model).items():
            assert torch.equal(tensor.to_layout("plain").qdata, before[name])
            assert tensor.activation_scale == scale
        errors.append(output_error(model, expected))
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.05 * errors[0]


def test_a_model_with_residuals_is_exported_again(base, tmp_path):
    model = import_checkpoint(base, residuals=False, activation_scale="token")
    add_residuals_(model, batches(), budget=0.25, progress=False)
    again = import_checkpoint(export(model, tmp_path / "out"))
    assert torch.equal(logits(again), logits(model))


def test_what_has_no_use_for_residuals_is_refused():
    with pytest.raises(ValueError, match="expected a plain NVFP4 weight"):
        add_residuals_(quantized(CONFIGS["residuals"]), batches(), progress=False)
    with pytest.raises(ValueError, match="expected linears in W4A4"):
        add_residuals_(quantized(CONFIGS["weights alone"]), batches(), progress=False)
