"""Run a model for its outputs only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def run_model(model: nn.Module, batch: dict[str, Any] | Tensor) -> Any:
    """model(batch) without gradients or key-value cache, the batch moved to the model's device."""
    with torch.no_grad(), without_cache(model):
        return call_model(model, batch)


def call_model(model: nn.Module, batch: dict[str, Any] | Tensor) -> Any:
    """model(batch), the batch moved to the model's device."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return model(**moved)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a transformers model returns no key-value cache, which would outlive its forward.

    The parts of a model, such as a decoder, may have configs of their own.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    asking = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asking:
            config.use_cache = True


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() inside; afterwards every module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
