"""Rows of a data set as batches: lists and arrays become tensors, texts and chats token ids.

    {"input_ids": [1, 2, 3]}                a row without a batch dimension gets one
    {"input_ids": [[1, 2, 3], [4, 5, 6]]}   rows of one length
    {"text": "..."}                         tokenized; {"text": ["...", "..."]} is several
    {"messages": [{"role": ..., "content": ...}, ...]}   by the tokenizer's chat template

Other columns of a row that is read as a text or a chat are left aside.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

TEXT, MESSAGES = "text", "messages"
# Inputs of transformers' models, and the dimensions of one row of each.
ROW_DIMENSIONS = {
    "input_ids": 1,
    "decoder_input_ids": 1,
    "inputs_embeds": 2,
    "input_values": 1,
    "input_features": 2,
    "pixel_values": 3,
}
BESIDE_THEM = ("_ids", "_mask", "labels")  # how names end of what has a batch dimension, too
MASKED = {"attention_mask": "input_ids", "decoder_attention_mask": "decoder_input_ids"}


def row_batches(
    row: Mapping[str, Any], where: str, tokenizer: Any, max_length: int
) -> Iterator[dict[str, Any]]:
    """Batches that a mapping stands for; empty texts are none.

    Args:
        where: what to call it in messages.

    Raises:
        ValueError, TypeError: what no model takes, by `where` and key.
    """
    if not all(isinstance(key, str) for key in row):
        raise TypeError(f"{where}: expected names of the model's inputs, found {list(row)}")
    texts, chats = row.get(TEXT), row.get(MESSAGES)
    of_inputs = any(key in row for key in ROW_DIMENSIONS)
    if isinstance(texts, (str, list, tuple)) and not of_inputs:
        for text in [texts] if isinstance(texts, str) else texts:
            yield from _of_text(text, f"{where}['text']", tokenizer, max_length)
    elif isinstance(chats, (list, tuple)) and not of_inputs:
        for chat in chats if chats and isinstance(chats[0], (list, tuple)) else [chats]:
            yield _of_chat(chat, f"{where}['messages']", tokenizer, max_length)
    else:
        kept = {k: v for k, v in row.items() if not of_inputs or k not in (TEXT, MESSAGES)}
        yield _of_inputs(kept, where)


def tokenized(text: str, where: str, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Token ids [1, T] of a string and what comes with them.

    Raises:
        ValueError: no tokenizer.
    """
    _require(tokenizer, where)
    return dict(tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt"))


def _require(tokenizer: Any, where: str) -> None:
    if tokenizer is None:
        raise ValueError(
            "calibration_data holds strings; pass tokenizer=, or pass input ids instead (found at "
            f"{where})"
        )


def _of_text(text: Any, where: str, tokenizer: Any, max_length: int) -> Iterator[dict[str, Any]]:
    if not isinstance(text, str):
        raise TypeError(f"{where}: expected a string, found {type(text).__name__}")
    if text.strip():
        yield tokenized(text, where, tokenizer, max_length)


def _of_chat(chat: Any, where: str, tokenizer: Any, max_length: int) -> dict[str, Any]:
    _require(tokenizer, where)
    expected = "expected a list of {'role': ..., 'content': ...}, found"
    if not isinstance(chat, (list, tuple)) or not chat:
        raise TypeError(f"{where}: {expected} {chat!r:.80}")
    for message in chat:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise TypeError(f"{where}: {expected} {message!r:.80} in it")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: expected a tokenizer with a chat template, found a "
            f"{type(tokenizer).__name__} without; set its chat_template, or pass chats as strings"
        )
    cut = {"truncation": True, "max_length": max_length}
    return dict(
        tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", **cut
        )
    )


def _of_inputs(row: dict[str, Any], where: str) -> dict[str, Any]:
    batch = {key: _as_tensor(key, value, f"{where}[{key!r}]") for key, value in row.items()}
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(batch)):
        raise ValueError(
            f"{where}: expected 'text', 'messages' or tensors that the model takes, found "
            f"{list(row)}; name the column with the text 'text'"
        )
    main = next((key for key in ROW_DIMENSIONS if isinstance(batch.get(key), Tensor)), None)
    if main is not None and batch[main].dim() == ROW_DIMENSIONS[main]:
        batch = {key: _with_batch_dimension(key, value) for key, value in batch.items()}
    _check_inputs(batch, where)
    return batch


def _as_tensor(key: str, value: Any, where: str) -> Any:
    """Arrays, and numbers and lists of the inputs that are known by name."""
    known = key in ROW_DIMENSIONS or key.endswith(BESIDE_THEM)
    numbers = isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool)
    if isinstance(value, Tensor) or not (hasattr(value, "__array__") or (known and numbers)):
        return value
    try:
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            return torch.stack(list(value))
        return torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{where}: expected numbers in rows of one length, found a {type(value).__name__} that "
            f"makes no tensor ({error}); pad the rows and add an attention_mask, or pass each as "
            "a batch of its own"
        ) from None


def _with_batch_dimension(key: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    lacking = value.dim() == ROW_DIMENSIONS.get(key, -1)
    beside = key not in ROW_DIMENSIONS and key.endswith(BESIDE_THEM)
    return value.unsqueeze(0) if lacking or beside else value


def _check_inputs(batch: dict[str, Any], where: str) -> None:
    """Refuse ids that are none, and masks that are of something else or keep nothing."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    for key in tensors.keys() & ROW_DIMENSIONS.keys():
        value = tensors[key]
        if not value.numel():
            raise ValueError(f"{where}[{key!r}]: expected some values, found {list(value.shape)}")
        if key.endswith("_ids") and value.is_floating_point():
            raise ValueError(f"{where}[{key!r}]: expected integers, found {value.dtype}")
    for key in tensors.keys() & MASKED.keys():
        mask, ids = tensors[key], tensors.get(MASKED[key])
        if not mask.any():
            raise ValueError(f"{where}[{key!r}]: expected to keep some token, found zeros only")
        both = ids is not None and ids.dim() == mask.dim() == 2 and "past_key_values" not in batch
        if both and mask.shape != ids.shape:
            raise ValueError(
                f"{where}[{key!r}]: expected the shape of {MASKED[key]!r}, {list(ids.shape)}, "
                f"found {list(mask.shape)}"
            )
