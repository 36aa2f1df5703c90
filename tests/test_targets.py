"""What quantize_ leaves alone and says so."""

import pickle

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from arc_ao import ARCConfig, ARCTensor, quantize_

PLAIN = ARCConfig(budget=0.0, weight_scale="amax")


def test_plain_nvfp4_is_plain_with_calibration_data_too():
    """budget=0 and amax scales: nothing is searched, sorted or stored beside the base weight."""
    model = tiny_llama()
    batches = [torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(0))]
    summary = quantize_(model, PLAIN, calibration_data=batches, progress=False)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert summary.trials == [[]] and summary.extra_channels == 0
    assert weight.channel_order is None and weight.activation_block_scale == "amax"


class Experts(nn.Module):
    """One ordinary linear, and experts fused into a 3-D weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 64))
        self.convolution = nn.Conv1d(4, 4, 3)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 17, 32))

    def forward(self, x):
        return self.linear(x)


def test_fused_experts_are_listed_with_one_warning():
    model = Experts()
    with pytest.warns(UserWarning, match="1 weights of fused experts, .* stay.*gate_up_proj"):
        summary = quantize_(model, PLAIN, progress=False)
    assert set(summary.skipped) == {"experts.gate_up_proj"}
    assert isinstance(model.linear.weight, ARCTensor)


def test_linear_layers_of_other_classes_are_named():
    with pytest.raises(ValueError, match=r"found no linear layer.*Unsupported: \['Conv1D'\]"):
        quantize_(nn.Sequential(Conv1D(8, 16)), PLAIN)


def test_a_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="expected an ARCConfig or FqnToConfig, got 0.06"):
        quantize_(tiny_llama(), 0.06)


def test_three_steps_say_that_they_do_not_search():
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, ARCConfig(step="prepare"))
    model(torch.ones(4, 32))
    with pytest.warns(UserWarning, match="three steps cannot measure channel_order"):
        quantize_(model, ARCConfig(step="convert"))


def test_a_quantized_module_pickles_and_says_what_it_is():
    linear = nn.Sequential(nn.Linear(32, 32))
    quantize_(linear, PLAIN, progress=False)
    copy = pickle.loads(pickle.dumps(linear))
    assert "ARCTensor([32, 32]" in repr(copy) and "bits_per_weight=" in repr(copy)
    assert torch.equal(copy(torch.ones(1, 32)), linear(torch.ones(1, 32)))
