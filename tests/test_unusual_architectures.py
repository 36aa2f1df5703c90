"""Weights that are no nn.Linear's, outputs with the classes in front, models that rescale."""

import math
import warnings

import pytest
import torch
from architectures import FAMILIES, load, outputs, quantize, relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from arc_ao import ARCConfig, quantize_
from arc_ao.outputs.divergence import output_divergence
from arc_ao.outputs.score import score_gradient

ROWS = {row.id: row for rows in FAMILIES.values() for row in rows}
PLAIN = ARCConfig(recipe="plain", budget=0.0)


class Mixed(nn.Module):
    """A linear beside a Conv1D, two experts in one matrix, and a scale of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.transposed = nn.Linear(32, 32), Conv1D(32, 32)
        self.experts = nn.Module()
        self.experts.w1 = nn.Parameter(torch.ones(2 * 16, 32))
        self.logit_scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.transposed(self.linear(x))


def test_weights_that_are_no_linear_are_listed():
    """Each by name and with one reason; a scale is no weight."""
    with pytest.warns(UserWarning) as caught:
        summary = quantize_(Mixed(), PLAIN, calibration_data=[torch.ones(2, 32)], progress=False)
    assert set(summary.layers) == {"linear"}
    assert set(summary.skipped) == {"transposed", "experts.w1"}
    listed = " ".join(str(warning.message) for warning in caught)
    assert "transposed (Conv1D is no nn.Linear)" in listed and "experts.w1" in listed


def test_logits_of_pixels_are_compared_by_pixel():
    """[B, C, H, W]: of two classes with even odds against e to 1, every pixel has the same KL."""
    reference = torch.zeros(1, 2, 3, 5)
    value = reference.clone()
    value[:, 1] = 1.0
    expected = math.log((1 + math.e) / 2) - 0.5  # log of the sum over 2, less the mean logit
    found = output_divergence({"logits": reference}, {"logits": value})
    assert found == pytest.approx(expected, rel=1e-6)


def test_outputs_that_are_not_contiguous_have_a_gradient():
    """Channels in front, as convolutional networks return them: onehot - p sums to 0 by pixel."""
    logits = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)
    value, gradient, count = score_gradient({"logits": logits}, None, torch.Generator())
    assert gradient.shape == value.shape == (2, 4, 4, 3) and count == 2 * 4 * 4
    assert torch.allclose(gradient.sum(-1), torch.zeros(2, 4, 4), atol=1e-6)


@pytest.mark.parametrize("name", ["ConvNextModel", "SegformerForSemanticSegmentation"])
def test_images_are_weighed_by_layers(name):
    """The default recipe differentiates them; nothing is warned of."""
    row = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantize(row, row.build(), "auto")


def test_marked_as_loading_marks(tmp_path):
    """FalconMamba reads a weight otherwise in a model that transformers holds for quantized."""
    row = ROWS["FalconMambaForCausalLM"]
    row.build().save_pretrained(tmp_path)
    model = load(row, tmp_path)
    quantize(row, model, "balanced")
    assert model.config._is_quantized


def test_rescaling_can_be_done_without():
    """What the refusal of RWKV tells to do gives the same outputs."""
    rescaling, steady = ROWS["RwkvForCausalLM"], ROWS["RwkvForCausalLM, rescale_every=0"]
    model, other = rescaling.build().float(), steady.build().float()
    model.config.rescale_every = 1  # the second block's weights are halved
    batch = next(rescaling.batches(1))
    before = model.rwkv.blocks[1].attention.output.weight.clone()
    found = outputs(model, batch)
    assert torch.equal(model.rwkv.blocks[1].attention.output.weight, before / 2)
    assert relative_error(outputs(other, batch), found) < 0.01  # by the epsilon of the norms
    with pytest.raises(ValueError, match="expected weights that a forward does not change"):
        quantize(rescaling, model, "balanced")
