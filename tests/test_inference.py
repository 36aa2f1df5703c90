"""Running a model for its outputs leaves its settings alone."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from arc_ao.inference import run_model


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).eval()


def test_no_cache_is_returned_and_the_config_is_as_before():
    model, ids = llama(), torch.arange(8)[None]
    assert model(ids).past_key_values is not None
    assert run_model(model, ids).past_key_values is None
    assert model.config.use_cache is True
    with pytest.raises(Exception, match="dim|shape|size|index"):
        run_model(model, torch.tensor([[99]]))
    assert model.config.use_cache is True


def test_a_batch_that_asks_for_a_cache_gets_one_and_plain_modules_have_no_config():
    batch = {"input_ids": torch.arange(8)[None], "use_cache": True}
    assert run_model(llama(), batch).past_key_values is not None
    assert run_model(nn.Linear(4, 2), torch.ones(3, 4)).shape == (3, 2)
