"""Refusals: the layer is named, and a failed call leaves the model exactly as it was."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_

from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.quantize import quantize_weight

PLAIN = ARCConfig(recipe="plain", budget=0.0)
BALANCED = ARCConfig(recipe="balanced", budget=0.2)
Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


def batches(count: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 16), generator=g) for _ in range(count)]


def small_llama(**overrides) -> nn.Module:
    return tiny_llama(num_hidden_layers=1, **overrides)


def snapshot(model: nn.Module) -> tuple[dict, list]:
    """What a failed call could leave behind, and the objects whose ids it holds."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    modules = list(model.named_modules(remove_duplicate=False))
    parameters = list(model.named_parameters(remove_duplicate=False))
    values = {k: v for k, v in model.state_dict().items() if type(v) is torch.Tensor}
    state = {
        "modules": [(name, id(module)) for name, module in modules],
        "parameters": [(name, id(parameter)) for name, parameter in parameters],
        "attributes": [sorted(vars(module)) for _, module in modules],
        "modes": [module.training for _, module in modules],
        "hooks": [[dict(getattr(module, h)) for h in hooks] for _, module in modules],
        "values": {k: None if v.is_meta else v.numpy().tobytes() for k, v in values.items()},
    }
    return state, [modules, parameters]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The body must leave the same modules, parameters, attributes, modes, hooks and bits."""
    before, _alive = snapshot(model)
    yield
    after, _ = snapshot(model)
    for key, value in before.items():
        assert value == after[key], key


def refused(model: nn.Module, config=None, *, match: str, error=ValueError, **kwargs) -> None:
    with unchanged(model), pytest.raises(error, match=match):
        quantize_(model, config, progress=False, **kwargs)


def test_quantizing_twice_is_refused():
    model = small_llama()
    quantize_(model, PLAIN)
    refused(model, PLAIN, match=f"^{Q}: expected a floating-point .*, found ARCTensor; .*already")


@pytest.mark.parametrize("config", [PLAIN, FqnToConfig(OrderedDict(lm_head=PLAIN))])
def test_a_weight_tied_to_an_embedding_is_refused(config):
    """Chosen by filter_fn or by name; by default the head is left alone and stays tied."""
    model = small_llama(tie_word_embeddings=True)
    chosen = {} if isinstance(config, FqnToConfig) else {"filter_fn": lambda _, n: n == "lm_head"}
    refused(model, config, match="^lm_head: .*tied to embedding 'model.embed_tokens'", **chosen)
    quantize_(model, PLAIN)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda m: m.to("meta"), "expected a weight with data, found one on the meta device"),
        (lambda m: m.double(), "bfloat16, float16 or float32, found torch.float64; convert"),
    ],
)
def test_a_weight_without_data_or_of_another_dtype_is_refused(change, match):
    model = small_llama()
    change(model.get_submodule(DOWN))
    refused(model, PLAIN, match=f"^{DOWN}: .*{match}")


@pytest.mark.parametrize(
    "value, config", [(float("nan"), PLAIN), (float("-inf"), BALANCED), (float("inf"), None)]
)
def test_non_finite_weights_are_refused(value, config):
    model = small_llama()
    with torch.no_grad():
        model.get_submodule(DOWN).weight[3, 5] = value
    match = f"^{DOWN}: expected finite weights, found NaN or Inf"
    refused(model, config, match=match, calibration_data=batches())


@pytest.mark.parametrize(
    "data, match",
    [
        (None, "expected calibration_data for residual channels, channel scales or a low"),
        ([], "calibration_data is empty"),
        (["a text"], "strings; pass tokenizer="),
    ],
)
def test_missing_data_is_refused(data, match):
    refused(small_llama(), BALANCED, match=match, calibration_data=data)
    refused(nn.Identity(), PLAIN, match="found no linear layer to quantize", calibration_data=data)


class Routed(nn.Module):
    """The second expert runs only for batches of more than one row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if len(x) > 1 else self.first(x)


def test_data_that_reaches_no_layer_is_refused():
    """In one call and in three steps, where the model stays prepared."""
    model, match = Routed(), "^first: expected calibration tokens, found none, as for all 2 linears"
    refused(model, BALANCED, match=match, calibration_data=[torch.ones(0, 32)])
    quantize_(model, BALANCED.with_step("prepare"))
    refused(model, BALANCED.with_step("convert"), match=match)
    with unchanged(model), pytest.raises(ValueError, match=match):
        torchao_quantize_(model, BALANCED.with_step("convert"))
    model(torch.ones(2, 32))
    quantize_(model, BALANCED.with_step("convert"))
    assert isinstance(model.second.weight, ARCTensor)


def test_steps_out_of_order_are_refused():
    """Preparing a part twice, converting what was never prepared, loading without shapes."""
    model = Routed()
    steps = ("prepare", "convert", "prepare_for_loading")
    prepare, convert, loading = (BALANCED.with_step(step) for step in steps)
    refused(model, convert, match="^first: expected a prepared linear")
    refused(model, loading, match="expected num_act_channels .* found budget=0.2")
    quantize_(model, prepare, filter_fn=lambda _, name: name == "second")
    refused(model, prepare, match="^second: .*found a prepared one")
    refused(model, BALANCED, match="^second: ", calibration_data=[torch.ones(2, 32)])


def test_an_abandoned_model_does_not_join_the_next_one():
    """One config object prepares model after model: each competes for a budget of its own."""
    model, config = Routed(), BALANCED.with_step("prepare")
    quantize_(Routed(), config)
    quantize_(model, config)
    model(torch.ones(2, 32))
    quantize_(model, BALANCED.with_step("convert"))
    assert isinstance(model.first.weight, ARCTensor)


def test_data_that_fails_midway_changes_nothing():
    data = (batch if i == 0 else 1 / 0 for i, batch in enumerate(batches()))
    refused(small_llama(), match="by zero", error=ZeroDivisionError, calibration_data=data)


def test_activations_that_are_not_finite_are_refused():
    data = [torch.ones(2, 32), torch.full((2, 32), float("nan"))]
    refused(Routed(), match="^first: calibration input holds NaN", calibration_data=data)


@pytest.mark.parametrize("phase", ["calibrate", "search"])
def test_a_failure_before_conversion_changes_nothing(phase):
    """The second batch, after the forward that tries the model out, or a trial of the search; in
    train mode but for a part."""
    model = small_llama().train()
    down, calls = model.model.eval().get_submodule("layers.0.mlp.down_proj"), []
    forward = down.forward

    def failing_forward(x):
        calls.append(isinstance(down.weight, ARCTensor))
        if (phase == "search" and calls[-1]) or (phase == "calibrate" and len(calls) == 3):
            raise ZeroDivisionError
        return forward(x)

    down.forward = failing_forward
    config = None if phase == "search" else BALANCED
    note = "^$" if phase == "search" else "^\nwhile running batch 1 of calibration_data: a tensor"
    refused(model, config, match=note, error=ZeroDivisionError, calibration_data=batches())
    assert calls[-1] is (phase == "search")


def test_an_interrupt_during_conversion_leaves_no_observers(monkeypatch):
    """Linears that were not reached keep their weights; all of them run."""
    model, calls = small_llama(), []

    def interrupted(weight, plan):
        calls.append(weight)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return quantize_weight(weight, plan)

    monkeypatch.setattr("arc_ao.quantize.quantize_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, BALANCED, calibration_data=batches(), progress=False)
    linears = [m for n, m in model.named_modules() if n.endswith("_proj")]
    assert sum(isinstance(m.weight, ARCTensor) for m in linears) == 5
    assert not any(hasattr(m, "arc_observer") or m._forward_pre_hooks for m in linears)
    assert torch.isfinite(model(batches()[0]).logits).all()
