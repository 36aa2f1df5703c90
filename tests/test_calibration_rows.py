"""Rows of data sets as calibration data; what is none is refused by batch and key."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_models import byte_tokenizer, tiny_llama
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from arc_ao.calibration.data import calibrate, to_batches
from arc_ao.inference import run_model
from arc_ao.quantize import quantize_

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def token_ids(text: str) -> list[list[int]]:
    return [byte_tokenizer()(text)["input_ids"]]


def ids(batches: list) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]},
        {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 0]]},
        {"input_ids": torch.tensor([1, 2, 3]), "attention_mask": torch.tensor([1, 1, 0])},
        {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])},
        {"input_ids": (1, 2, 3), "attention_mask": torch.tensor([1, 1, 0]).numpy()},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0], "text": "abc", "messages": CHAT},
    ],
)
def test_rows_become_tensors_with_a_batch_dimension(row):
    (batch,) = to_batches([row])
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert all(isinstance(value, Tensor) for value in batch.values())
    assert batch["input_ids"].tolist() == [[1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]
    assert torch.isfinite(run_model(tiny_llama(), batch).logits).all()


def test_every_input_of_a_single_row_gets_a_batch_dimension():
    """Those of several dimensions, too, and what comes beside them; nothing else changes."""
    row = {
        "input_ids": [1, 2],
        "pixel_values": torch.zeros(3, 8, 8),
        "labels": 1,
        "decoder_input_ids": torch.tensor([4, 5, 6]),
        "image_grid_thw": torch.zeros(1, 3),
        "use_cache": False,
        "layers": [1, 2],
    }
    (batch,) = to_batches([row])
    shapes = {k: tuple(v.shape) for k, v in batch.items() if isinstance(v, Tensor)}
    assert shapes == {
        "input_ids": (1, 2),
        "pixel_values": (1, 3, 8, 8),
        "labels": (1,),
        "decoder_input_ids": (1, 3),
        "image_grid_thw": (1, 3),
    }
    assert batch["use_cache"] is False and batch["layers"] == [1, 2]


def test_batches_stay_as_they_are():
    """The very objects, whatever else a model takes."""
    batch = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "lengths": torch.tensor([3, 2]),
        "labels": torch.tensor([0, 1]),
        "mode": "mean",
    }
    (found,) = to_batches([batch])
    assert found.keys() == batch.keys() and all(found[key] is batch[key] for key in batch)
    custom = {"x": torch.zeros(8), "text": torch.zeros(2)}
    (found,) = to_batches([custom])
    assert all(found[key] is custom[key] for key in custom)


def test_texts_are_tokenized():
    """Other columns and empty lines are left aside; a batch of texts is several."""
    rows = [{"text": "abc", "url": "x"}, {"text": " \n"}, {"text": ["de", "", "fgh"]}]
    found = to_batches(rows, byte_tokenizer(), max_length=2)
    assert ids(found) == [token_ids("ab"), token_ids("de"), token_ids("fg")]


def test_chats_go_through_the_chat_template():
    """As tokenizer.apply_chat_template writes them, cut like texts."""
    written = "<user>Why?<assistant>So."
    rows = [{"messages": CHAT, "source": "x"}, {"messages": [CHAT, CHAT[:1]]}]
    found = to_batches(rows, chat_tokenizer())
    assert ids(found) == [token_ids(written), token_ids(written), token_ids("<user>Why?")]
    (cut,) = to_batches(rows[:1], chat_tokenizer(), max_length=5)
    assert ids([cut]) == [token_ids(written[:5])]


@pytest.mark.parametrize(
    "form", ["texts", "chats", "tokenized", "torch", "numpy", "column", "batches"]
)
def test_hugging_face_data_sets_are_taken(form):
    texts = Dataset.from_dict({"text": ["abcd", "", "efgh"], "id": [1, 2, 3]})
    tokens = texts.filter(lambda row: row["text"]).map(
        lambda row: dict(byte_tokenizer()(row["text"]))
    )
    tokens = tokens.select_columns(["input_ids", "attention_mask"])
    forms = {
        "texts": texts,
        "chats": Dataset.from_dict({"messages": [[CHAT[0] | {"content": c}] for c in "ab"]}),
        "tokenized": tokens,
        "torch": tokens.with_format("torch"),
        "numpy": tokens.with_format("numpy"),
        "column": texts.select([0, 2])["text"],
        "batches": tokens.iter(batch_size=2),
    }
    expected = {
        "chats": [token_ids("<user>a"), token_ids("<user>b")],
        "batches": [token_ids("abcd") + token_ids("efgh")],
    }
    model = tiny_llama()
    found = to_batches(forms[form], chat_tokenizer())
    assert ids(found) == expected.get(form, [token_ids("abcd"), token_ids("efgh")])
    calibrate(model, found, progress=False)


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"input_ids": [[1, 2], [3]]}, ValueError, r"\[1\]\['input_ids'\]: .*rows of one length"),
        ({"input_ids": ["a"]}, ValueError, r"\[1\]\['input_ids'\]: expected numbers"),
        ({"input_ids": [0.5, 1.0]}, ValueError, r"\[1\]\['input_ids'\]: expected integers"),
        ({"input_ids": []}, ValueError, r"\[1\]\['input_ids'\]: expected some values"),
        (
            {"input_ids": [1, 2], "attention_mask": [1, 1, 1]},
            ValueError,
            r"\[1\]\['attention_mask'\]: .* of 'input_ids', \[1, 2\], found \[1, 3\]",
        ),
        (
            {"input_ids": [1, 2], "attention_mask": [0, 0]},
            ValueError,
            r"\[1\]\['attention_mask'\]: expected to keep some token",
        ),
        ({"text": ["a", 3]}, TypeError, r"\[1\]\['text'\]: expected a string, found int"),
        ({"messages": []}, TypeError, r"\[1\]\['messages'\]: expected a list of .*'role'"),
        ({"messages": ["hello"]}, TypeError, r"\[1\]\['messages'\]: .*found 'hello'"),
        ({"messages": [{"from": "a"}]}, TypeError, r"\[1\]\['messages'\]: .*found {'from': 'a'}"),
        ({"messages": CHAT}, ValueError, r"\[1\]\['messages'\]: expected a tokenizer with a chat"),
        ({"instruction": "a", "id": 3}, ValueError, r"\[1\]: .*found \['instruction', 'id'\]"),
        ({"text": None}, ValueError, r"\[1\]: expected 'text'.*found \['text'\]"),
        ({}, ValueError, r"\[1\]: expected 'text'"),
        ({0: torch.zeros(2)}, TypeError, r"\[1\]: expected names.*found \[0\]"),
    ],
)
def test_other_rows_are_refused_by_batch_and_key(row, error, message):
    with pytest.raises(error, match="calibration_data" + message):
        to_batches([torch.zeros(1, 2), row], byte_tokenizer())


def test_texts_and_chats_need_a_tokenizer():
    for row, key in (({"text": "a"}, "text"), ({"messages": CHAT}, "messages")):
        with pytest.raises(ValueError, match=rf"pass tokenizer=.*calibration_data\[0\]\['{key}'\]"):
            to_batches([row])


def test_splits_are_refused_by_name():
    splits = DatasetDict({"train": Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(
        TypeError, match=r"got a DatasetDict of splits; pass one of them: \['train'\]"
    ):
        to_batches(splits, byte_tokenizer())


def test_data_of_empty_texts_is_refused():
    with pytest.raises(ValueError, match="calibration_data is empty"):
        to_batches([{"text": ""}], byte_tokenizer())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_inputs_that_a_model_does_not_take_are_refused_before_it_runs():
    data = [{"x": torch.zeros(2, 16)}, {"x": torch.zeros(2, 16), "label": torch.zeros(2)}]
    with pytest.raises(TypeError, match=r"batch 1 of calibration_data: .*Plain \['x'\].*'label'"):
        quantize_(Plain(), calibration_data=data, progress=False)


def test_an_error_of_the_model_says_which_batch():
    data = [{"x": torch.zeros(2, 16)}, {"x": torch.zeros(2, 15)}]
    with pytest.raises(RuntimeError) as raised:
        quantize_(Plain(), calibration_data=data, progress=False)
    assert raised.value.__notes__ == ["while running batch 1 of calibration_data: x [2, 15]"]
