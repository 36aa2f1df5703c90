"""Outputs that cannot be compared: quantized without measuring them, with one warning."""

import copy
import warnings

import pytest
import torch
from encoder_decoders import built, ids, question_answering
from torch import Tensor, nn

from arc_ao import ARCConfig, BudgetConfig
from arc_ao.outputs.divergence import NotComparableError, is_logits, model_output
from arc_ao.quantize import quantize_
from arc_ao.summary import arc_tensors

OUTPUTS = {
    "dict": lambda h: {"scores": h},
    "None": lambda h: None,
    "number": lambda h: 1.0,
    "loss": lambda h: h.mean(),
    "integers": lambda h: h.argmax(-1),
    "tuple of none": lambda h: (None, {"a": h}),
}


class Returns(nn.Module):
    """Two linears and whatever comes of their output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(64, 128), nn.Linear(128, 64), kind

    def forward(self, x: Tensor):
        return OUTPUTS[self.kind](self.second(self.first(x).relu()))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 32, 64, generator=generator) for _ in range(4)]


def quantized(model: nn.Module, config, batches: list) -> tuple[dict, list[str]]:
    model = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, config, calibration_data=batches, progress=False)
    messages = [str(w.message) for w in caught if "rounding='gptq'" not in str(w.message)]
    tensors = arc_tensors(model)
    return {
        name: (t.qdata, t.scale, t.act_blocks, t.weight_blocks) for name, t in tensors.items()
    }, messages


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for n in first for a, b in zip(first[n], second[n], strict=True)
    )


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_default_recipe_falls_back_to_balanced(kind):
    """Its very bits; one warning says what was found and what would work."""
    model = built(lambda: Returns(kind))
    found, messages = quantized(model, ARCConfig(budget=0.2), data())
    balanced, none = quantized(model, ARCConfig(budget=0.2, recipe="balanced"), data())
    assert same(found, balanced) and not none
    assert len(messages) == 1
    for part in ("Returns is quantized without measuring", "expected .logits", "balanced"):
        assert part in messages[0]


def test_keys_of_an_output_are_named():
    batch = {"input_ids": ids(2, 12)}
    _, messages = quantized(built(question_answering), ARCConfig(), [batch] * 2)
    assert len(messages) == 1 and "start_logits" in messages[0]


def test_best_rounds_by_inputs_alone():
    model = built(lambda: Returns("None"))
    found, messages = quantized(model, ARCConfig(recipe="best"), data())
    gptq, _ = quantized(model, ARCConfig(recipe="balanced", rounding="gptq"), data())
    assert same(found, gptq) and len(messages) == 1


def test_tuned_trains_nothing():
    model = built(lambda: Returns("dict"))
    found, messages = quantized(model, ARCConfig(recipe="tuned"), data())
    best, _ = quantized(model, ARCConfig(recipe="best"), data())
    assert same(found, best)
    assert len(messages) == 2 and "nothing is tuned" in messages[1]


def test_a_budget_takes_the_mix_of_least_error():
    found, messages = quantized(built(lambda: Returns("dict")), BudgetConfig(), data())
    assert found.keys() == {"first", "second"} and len(messages) == 1


def test_a_loss_beside_logits_is_not_what_is_compared():
    """What transformers return as a tuple where labels are given."""
    logits = torch.randn(2, 3, 5)
    assert model_output((torch.tensor(1.0), logits)) is logits
    assert model_output({"logits": logits.long(), "last_hidden_state": logits}) is logits
    assert not is_logits({"logits": logits.long(), "last_hidden_state": logits})
    with pytest.raises(NotComparableError, match=r"got dict of \['a'\]"):
        model_output({"a": logits})
