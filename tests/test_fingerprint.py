"""Work of one call is taken over by no call whose result differs, whatever it is that differs."""

import functools

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

from arc_ao import ARCConfig
from arc_ao.calibration import fingerprint as module
from arc_ao.calibration.fingerprint import digest, fingerprint
from arc_ao.calibration.work_dir import WorkDir


def llama(**overrides):
    return tiny_llama(num_hidden_layers=1, **overrides)


def of(model, config=None, data=None) -> dict[str, str]:
    batches = [torch.arange(8)[None]] if data is None else data
    return fingerprint(model, {"model.layers.0.mlp.up_proj": config or ARCConfig()}, batches)


def change(model, path: str, name: str, value) -> nn.Module:
    setattr(model.get_submodule(path), name, value)
    return model


def scaled(factor: float):
    return lambda x: x * factor


def hooked(model) -> nn.Module:
    model.model.norm.register_forward_hook(lambda module, args, output: output * 2)
    return model


MLP = "model.layers.0.mlp"
OTHER_MODELS = {
    "activation by config": lambda: llama(hidden_act="gelu"),
    "eps by config": lambda: llama(rms_norm_eps=1e-3),
    "rotary base": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "attention by config": lambda: llama(attn_implementation="eager"),
    "patched activation": lambda: change(llama(), MLP, "act_fn", nn.ReLU()),
    "patched eps": lambda: change(llama(), "model.norm", "variance_epsilon", 1e-3),
    "patched forward": lambda: change(llama(), MLP, "forward", scaled(2.0)),
    "hook": lambda: hooked(llama()),
    "weight": lambda: llama(seed=1),
    "tied": lambda: llama(tie_word_embeddings=True),
}


@pytest.mark.parametrize("what", OTHER_MODELS)
def test_another_model_is_told_by_anything_that_its_output_depends_on(what, tmp_path):
    """Most of these have the same weights; the work folder of the one refuses the other."""
    mine = of(llama())
    assert mine == of(llama())
    WorkDir(tmp_path, mine).close()
    with pytest.raises(ValueError, match="found that of another model;"):
        WorkDir(tmp_path, of(OTHER_MODELS[what]()))


def test_where_a_model_lies_does_not_count():
    moved = change(llama(), "", "name_or_path", "elsewhere")
    moved.config._name_or_path = "elsewhere"
    assert of(moved) == of(llama())


def test_captured_values_and_arguments_of_functions_count():
    """Equal code, other numbers."""
    assert digest(scaled(2.0)) == digest(scaled(2.0)) != digest(scaled(3.0))
    gelu = functools.partial(nn.functional.gelu, approximate="tanh")
    assert digest(gelu) != digest(functools.partial(gelu, approximate="none"))
    assert digest(lambda x: x + 1) != digest(lambda x: x + 2)


@pytest.mark.parametrize(
    "other",
    [
        [{"input_ids": [torch.zeros(4000), torch.ones(4000)]}],  # whose repr is abbreviated
        [{"input_ids": (torch.zeros(4000), torch.zeros(4000))}],
        [{"inputs": [torch.zeros(4000), torch.zeros(4000)]}],
        [{"input_ids": [torch.zeros(8000)]}],
    ],
)
def test_other_data_is_told_at_any_depth(other):
    model, mine = nn.Linear(16, 16), [{"input_ids": [torch.zeros(4000), torch.zeros(4000)]}]
    one, two = of(model, data=mine), of(model, data=other)
    assert [key for key in one if one[key] != two[key]] == ["data"]


def test_data_of_unknown_kinds_is_refused():
    with pytest.raises(ValueError, match="found a builtins.object, which cannot be told"):
        of(nn.Linear(16, 16), data=[{"x": object()}])


def test_precision_and_versions_count_and_are_shown(tmp_path, monkeypatch):
    model = nn.Linear(16, 16)
    WorkDir(tmp_path, of(model)).close()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError) as raised:
        WorkDir(tmp_path, of(model))
    assert "another precision (" in str(raised.value) and "cpu torch.bfloat16" in str(raised.value)
    monkeypatch.setattr(module, "_version", {"transformers": "4.0"}.get)
    with pytest.raises(ValueError, match=r"another versions \(.* here: .*transformers 4\.0"):
        WorkDir(tmp_path, of(model))
    monkeypatch.undo()
    monkeypatch.setattr(module, "_source_files", lambda: [])
    with pytest.raises(ValueError, match="another versions"):
        WorkDir(tmp_path, of(model))
