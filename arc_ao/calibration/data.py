"""Calibration data: anything iterable becomes a list of keyword dicts that the model takes."""

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.calibration.padding import watched
from arc_ao.calibration.rows import row_batches, tokenized
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.memory import release_memory
from arc_ao.progress import Progress

Batch = dict[str, Any]
STATISTICS_TOKENS = 16_384


def to_batches(
    data: Iterable[Any], tokenizer: Any = None, max_length: int = 512
) -> list[Batch | Tensor]:
    """Read `data` once into a list.

    Args:
        data: tensors of input ids [B, T] or [T] (or whatever tensor the model takes), keyword
            dicts of tensors or lists, strings, or rows with a "text" or "messages" such as those of
            Hugging Face datasets (rows.py).
        tokenizer: Hugging Face tokenizer, for strings.
        max_length: strings are cut after this many tokens.

    Raises:
        TypeError, ValueError: an element that is neither, by its index and key; no element; or
            strings without a tokenizer.
    """
    if isinstance(data, Mapping) and any(hasattr(split, "column_names") for split in data.values()):
        raise TypeError(
            f"calibration_data must be an iterable of rows, got a {type(data).__name__} of splits; "
            f"pass one of them: {list(data)}"
        )
    if isinstance(data, (str, bytes, Mapping, Tensor)):
        raise TypeError(
            f"calibration_data must be an iterable of tensors, dicts or strings, got one "
            f"{type(data).__name__}; put it into a list"
        )
    batches = [
        batch
        for i, item in enumerate(data)
        for batch in _to_batches(item, f"calibration_data[{i}]", tokenizer, max_length)
    ]
    if not batches:
        raise ValueError("calibration_data is empty; expected at least one batch")
    return batches


def _to_batches(item: Any, where: str, tokenizer: Any, max_length: int) -> Iterable[Batch | Tensor]:
    if isinstance(item, Tensor):
        integral = not item.is_floating_point() and item.dim() == 1
        return [item.unsqueeze(0) if integral else item]
    if isinstance(item, Mapping):
        return row_batches(item, where, tokenizer, max_length)
    if isinstance(item, str):
        if not item.strip():
            raise ValueError(f"{where} is an empty string")
        return [tokenized(item, where, tokenizer, max_length)]
    raise TypeError(
        f"{where} is a {type(item).__name__}; expected a tensor, a keyword dict or a string"
    )


def text_batches(
    tokenizer: Any, text: str, *, window: int = 512, max_tokens: int = 16_384
) -> list[Tensor]:
    """Cut the first `max_tokens` tokens of a text into input ids [1, window].

    Raises:
        ValueError: the text has less than two tokens.
    """
    text = text[: 16 * max_tokens]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:max_tokens]
    if len(ids) < 2:
        raise ValueError("calibration text is empty; expected at least a few hundred tokens")
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    if len(windows) > 1 and len(windows[-1]) < window:
        windows.pop()
    return [torch.tensor([w]) for w in windows]


def tokens_for_statistics(window: int = 512) -> int:
    """Calibration tokens where only statistics of single channels are taken: 16,384, in whole
    windows, for a model of any width. With half of them the default closes a point less of plain
    NVFP4's divergence on SmolLM2-135M."""
    return -(-STATISTICS_TOKENS // window) * window


def tokens_for_width(in_features: int, window: int = 512) -> int:
    """Calibration tokens that the Hessians of a model want: 10 for every input channel of its
    widest linear, in whole windows, and at least 16,384.

    With fewer, GPTQ fits the sample: on held-out tokens the error of a linear with 1,536 channels
    was above plain rounding's after 4,096 tokens and a third below it after 16,384.
    """
    return max(16_384, -(-10 * in_features // window) * window)


def wanted_tokens(config: Any, in_features: int, window: int = 512) -> tuple[int, str]:
    """Calibration tokens that a config wants where the widest linear has `in_features` channels,
    and why, in words."""
    if not config.needs_hessian:
        return tokens_for_statistics(window), "enough where no GPTQ asks for more"
    reason = f"10 per input channel of the widest linear, {in_features:,}; at least 16,384"
    return tokens_for_width(in_features, window), reason


def num_tokens(batch: Batch | Tensor) -> int:
    """Tokens in a batch: elements of its input ids that are no padding (or of its leading tensor,
    rows)."""
    if isinstance(batch, Tensor):
        rows = batch.is_floating_point() and batch.dim() > 0
        return batch[..., 0].numel() if rows else batch.numel()
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None:
        masked = mask is not None and mask.shape == ids.shape
        return int(mask.count_nonzero()) if masked else ids.numel()
    return max((num_tokens(v) for v in batch.values() if isinstance(v, Tensor)), default=1)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    progress: bool = True,
) -> None:
    """Run a prepared model over calibration data in evaluation mode, with a progress bar.

    The data and its options are those of `quantize_`; this is the middle of the three steps.
    """
    bar = Progress({"calibrate": 1.0}, show=progress)
    observe(model, to_batches(data, tokenizer, max_length), bar)
    bar.close()


def observe(model: nn.Module, batches: list[Batch | Tensor], progress: Progress) -> None:
    """Run a prepared model over batches in evaluation mode; padding is not observed.

    Raises:
        TypeError: a batch with an input that the model does not take, by its index and key.
    """
    _check_names(model, batches)
    with evaluation_mode(model), watched(model):
        for i, batch in enumerate(progress.steps("calibrate", batches)):
            try:
                run_model(model, batch)
            except Exception as error:
                error.add_note(f"while running batch {i} of calibration_data: {_described(batch)}")
                raise
            release_memory()


def _check_names(model: nn.Module, batches: list[Batch | Tensor]) -> None:
    parameters = signature(model.forward).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for i, batch in enumerate(batches):
        unknown = [] if isinstance(batch, Tensor) else [k for k in batch if k not in parameters]
        if unknown:
            raise TypeError(
                f"batch {i} of calibration_data: expected inputs of {type(model).__name__} "
                f"{list(parameters)}, found {unknown[0]!r}; remove it"
            )


def _described(batch: Batch | Tensor) -> str:
    parts = {"a tensor": batch} if isinstance(batch, Tensor) else batch
    return ", ".join(f"{k} {list(getattr(v, 'shape', [type(v)]))}" for k, v in parts.items())
