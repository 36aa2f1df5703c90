"""Calibration data: every accepted form reaches the model, everything else is refused."""

from collections import UserDict

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from torch import nn

from arc_ao import ARCConfig
from arc_ao.calibration.data import (
    calibrate,
    num_tokens,
    to_batches,
    tokens_for_width,
    wanted_tokens,
)
from arc_ao.inference import evaluation_mode, run_model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def test_tensors_of_ids_get_a_batch_dimension_and_others_do_not():
    """[T] becomes [1, T]; [B, T] and floating-point inputs stay as they are."""
    batches = to_batches([ids(5), ids(2, 5), torch.zeros(3), torch.zeros(2, 3)])
    assert [tuple(b.shape) for b in batches] == [(1, 5), (2, 5), (3,), (2, 3)]
    assert torch.equal(batches[0][0], ids(5))


def test_mappings_become_plain_dicts():
    """BatchEncoding is a UserDict, which `**` would take but `isinstance(dict)` would not."""
    item = UserDict(input_ids=ids(1, 4))
    (batch,) = to_batches([item])
    assert type(batch) is dict and batch["input_ids"] is item["input_ids"]


def test_strings_are_tokenized_and_cut():
    first, second = to_batches(["abc", "a longer text"], byte_tokenizer(), max_length=4)
    tokenizer = byte_tokenizer()
    assert first["input_ids"].tolist() == [tokenizer("abc")["input_ids"]]
    assert second["input_ids"].tolist() == [tokenizer("a longer text")["input_ids"][:4]]


def test_a_generator_is_read_exactly_once():
    reads = []

    def stream():
        for i in range(3):
            reads.append(i)
            yield ids(1, 4, seed=i)

    assert len(to_batches(stream())) == 3
    assert reads == [0, 1, 2]


@pytest.mark.parametrize(
    "data, error, message",
    [
        ([], ValueError, "calibration_data is empty; expected at least one batch"),
        (iter(()), ValueError, "calibration_data is empty"),
        (["text"], ValueError, "holds strings; pass tokenizer="),
        ("text", TypeError, "iterable of tensors, dicts or strings, got one str"),
        (torch.zeros(2, 2), TypeError, "got one Tensor; put it into a list"),
        ({"input_ids": torch.zeros(1, 2)}, TypeError, "got one dict"),
        ([torch.zeros(1, 2), [1, 2]], TypeError, r"calibration_data\[1\] is a list"),
    ],
)
def test_other_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        to_batches(data)


@pytest.mark.parametrize(
    "batch, tokens",
    [
        (ids(2, 5), 10),
        (torch.zeros(2, 5, 8), 10),
        ({"input_ids": ids(3, 4), "attention_mask": torch.ones(3, 4)}, 12),
        ({"inputs_embeds": torch.zeros(2, 5, 8), "use_cache": False}, 10),
        ({"x": torch.zeros(4, 8), "scale": torch.tensor(2.0), "mode": "mean"}, 4),
        ({"mode": "mean"}, 1),
        (torch.tensor(1.0), 1),
    ],
)
def test_tokens_are_counted_in_every_form(batch, tokens):
    """Rows of the input, not values; flags and other non-tensors count nothing."""
    assert num_tokens(batch) == tokens


def test_all_forms_give_the_model_the_same_input():
    model = tiny_llama()
    text = "quantize me"
    row = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    for form in (row, row[0], {"input_ids": row, "use_cache": False}, text):
        (batch,) = to_batches([form], byte_tokenizer())
        output = run_model(model, batch)
        assert torch.equal(output.logits, model(row).logits)
        assert not output.logits.requires_grad


def mixed_modes() -> nn.Module:
    """A model in train mode with a frozen part in evaluation mode and one part of that not."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 4))
    model[0].eval()
    model[0][1].train()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_returns_to_its_own_mode(fails):
    """Also after an error; and inside, everything is in evaluation mode."""
    model = mixed_modes()
    before = modes(model)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(modes(model)))
    batches = [torch.zeros(2, 4), torch.zeros(2, 5 if fails else 4)]
    if fails:
        with pytest.raises(RuntimeError):
            calibrate(model, batches, progress=False)
    else:
        calibrate(model, batches, progress=False)
    assert seen[0] == [False] * len(before)
    assert modes(model) == before
    with evaluation_mode(model):
        assert not any(modes(model))
    assert modes(model) == before


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_can_be_turned_off(progress, capfd):
    calibrate(nn.Linear(4, 4), [torch.zeros(2, 4)], progress=progress)
    assert ("calibrate" in capfd.readouterr().err) is progress


@pytest.mark.parametrize(
    "in_features, window, tokens",
    [(576, 512, 16_384), (1639, 512, 16_896), (4864, 512, 48_640), (4865, 512, 49_152)]
    + [(2000, 96, 20_064)],
)
def test_tokens_follow_the_widest_linear_in_whole_windows(in_features, window, tokens):
    assert tokens_for_width(in_features, window) == tokens


@pytest.mark.parametrize(
    "recipe, in_features, tokens, reason",
    [
        ("auto", 4864, 16_384, "enough where no GPTQ asks for more"),
        ("best", 4864, 48_640, "10 per input channel of the widest linear, 4,864; at least 16,384"),
        ("best", 576, 16_384, "10 per input channel of the widest linear, 576; at least 16,384"),
    ],
)
def test_a_config_wants_more_tokens_where_it_builds_hessians(recipe, in_features, tokens, reason):
    assert wanted_tokens(ARCConfig(recipe=recipe), in_features) == (tokens, reason)
