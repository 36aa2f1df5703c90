"""Recipe "best" ends with norms that are tuned: what changes, what does not, when nothing does."""

import warnings

import pytest
import torch
from test_tuning import Case, sharp_llama, tokens
from torch import nn

from arc_ao import ARCConfig, quantize_
from arc_ao.methods.tuning import session
from arc_ao.methods.tuning.parameters import norm_parameters
from arc_ao.summary import arc_tensors

BEST = ARCConfig(recipe="best", budget=0.2)
UNTUNED = ARCConfig(recipe="best", budget=0.2, tuning="none")


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in norm_parameters(model).items()}


def test_norms_change_and_codes_do_not():
    tuned, untuned, batches = sharp_llama(), sharp_llama(), tokens(24)
    summary = quantize_(tuned, BEST, calibration_data=batches, progress=False)
    other = quantize_(untuned, UNTUNED, calibration_data=batches, progress=False)
    for name, tensor in arc_tensors(tuned).items():
        assert torch.equal(tensor, arc_tensors(untuned)[name])
    before, after = norms(untuned), norms(tuned)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert summary.tuning["trained"] == "norms" and summary.tuning["steps"] == session.NORM_STEPS
    assert summary.tuning["after"] < 0.98 * summary.tuning["before"]
    assert "norms tuned in 32 steps" in str(summary)
    assert other.tuning is None and "tuned" not in str(other)
    assert not any(p.requires_grad for n, p in tuned.named_parameters() if "proj" in n)


def test_blocks_that_run_twice_give_the_same_norms():
    found = []
    for with_blocks in (False, True):
        case = Case()
        case.names = []
        blocks = list(case.model.model.layers) if with_blocks else None
        forwards = [block.forward for block in case.model.model.layers]
        case.tune(max_steps=8, blocks=blocks)
        assert [block.forward for block in case.model.model.layers] == forwards
        found.append(norms(case.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_gets_no_better_is_taken_back(monkeypatch):
    """Steps that are far too long: norms end as they began."""
    from arc_ao.methods.tuning import parameters

    monkeypatch.setattr(parameters, "GAIN_RATE", 30.0)
    model = sharp_llama()
    expected = norms(model)
    summary = quantize_(model, BEST, calibration_data=tokens(8), progress=False)
    assert summary.tuning["after"] == summary.tuning["before"]
    assert all(torch.equal(expected[name], value) for name, value in norms(model).items())


class Rounded(nn.Module):
    """Rounds in the middle: no gradient comes through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second((self.norm(self.first(x)).detach() * 8).round())


def _quantized(model: nn.Module, config: ARCConfig, data: list) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = quantize_(model, config, calibration_data=data, progress=False)
    return summary, [str(w.message) for w in caught if "tuned" in str(w.message)]


def test_one_batch_is_too_few_and_is_said():
    summary, messages = _quantized(sharp_llama(), BEST, tokens(1))
    assert summary.tuning is None and len(messages) == 1
    assert "nothing is tuned: norms need at least 2 batches" in messages[0]
    assert "tuning='none'" in messages[0]
    assert not _quantized(sharp_llama(), UNTUNED, tokens(1))[1]


def test_a_model_without_gradients_keeps_its_norms():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Rounded(), [torch.randn(8, 64) for _ in range(4)]
    expected = norms(model)
    config = ARCConfig(recipe="best", layer_weights="equal", hessian="inputs")
    summary, messages = _quantized(model, config, data)
    assert summary.tuning is None and len(messages) == 1
    assert "cannot be differentiated" in messages[0]
    assert all(torch.equal(expected[name], value) for name, value in norms(model).items())


def test_a_model_without_norms_has_nothing_to_tune():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    summary, messages = _quantized(model, BEST, [torch.randn(8, 64) for _ in range(4)])
    assert summary.tuning is None and not messages


def test_steps_and_batches_are_bounded():
    """By tokens where batches are large; what is kept aside comes on top."""
    long, short = [torch.zeros(4, 1024).long()] * 100, [torch.zeros(1, 32).long()] * 100
    assert session.norm_steps(short) == session.NORM_STEPS
    assert session.norm_steps(long) == session.LEAST_NORM_STEPS
    assert session.norm_steps([torch.zeros(2, 512).long()] * 9) == session.NORM_TOKENS // 1024
    assert session.some_batches(list(range(100)), 7) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert session.some_batches([1, 2, 3], 32) == [1, 2, 3]


def test_the_three_steps_tune_nothing():
    model = sharp_llama()
    expected = norms(model)
    with pytest.warns(UserWarning, match="cannot measure .*tuning"):
        quantize_(model, BEST.with_step("prepare"), progress=False)
        for batch in tokens(4):
            model(batch)
        quantize_(model, BEST.with_step("convert"), progress=False)
    assert arc_tensors(model)
    assert all(torch.equal(expected[name], value) for name, value in norms(model).items())
