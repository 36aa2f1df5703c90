"""One forward before quantizing, which shows how weights are read, and one after, to see it run."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.flow.targets import Targets, refuse_no_targets
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.pretrained import is_pretrained_model


def try_out(
    model: nn.Module, targets: Targets, batches: list[Batch | Tensor] | None
) -> Batch | Tensor | None:
    """Run the unquantized model; targets whose weight others read leave, with one warning.

    Returns:
        What it ran on, for `check_runs`; None where nothing is known that it takes.

    Raises:
        ValueError: no target is left.
    """
    example = example_of(model, batches)
    if example is not None:
        targets.leave(misread_weights(model, targets.modules, example))
        refuse_no_targets(model, targets)
    return example


def example_of(model: nn.Module, batches: list[Batch | Tensor] | None) -> Batch | Tensor | None:
    """The shortest batch, or, without batches, a few made-up tokens for a text model.

    None, with a warning, where a text model does not take them; None for models of other inputs.
    """
    if batches:
        return min(batches, key=num_tokens)
    if not is_pretrained_model(model) or model.main_input_name != "input_ids":
        return None
    try:
        _run(model, model.dummy_inputs)
    except Exception as error:  # whatever a forward that wants other inputs raises
        warnings.warn(
            f"the quantized {type(model).__name__} is not tried out: it does not take the made-up "
            f"inputs {sorted(model.dummy_inputs)} ({error}); pass calibration_data, or run it once "
            "before it is saved",
            stacklevel=3,
        )
        return None
    return model.dummy_inputs


def misread_weights(
    model: nn.Module, linears: Mapping[str, nn.Linear], example: Batch | Tensor
) -> dict[str, str]:
    """Name -> why, of the linears whose weight something else than their own forward reads."""
    reads = _WeightReads(linears)
    handles = [linear.register_forward_pre_hook(reads.begin) for linear in linears.values()]
    try:
        with torch.compiler.set_stance("force_eager"), reads:
            _run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return reads.others()


def check_runs(model: nn.Module, example: Batch | Tensor | None) -> None:
    """Run a quantized model on what it ran on before.

    Raises:
        RuntimeError: it fails now.
    """
    if example is None:
        return
    try:
        _run(model, example)
    except Exception as error:
        raise RuntimeError(
            f"expected the quantized {type(model).__name__} to run as it did before, found "
            f"{type(error).__name__}: {error}. Do not save it: load the original again and leave "
            "out the linears whose weight is read in the frame where this error began (filter_fn)"
        ) from error


def _run(model: nn.Module, example: Batch | Tensor) -> None:
    with evaluation_mode(model):
        run_model(model, example)


class _WeightReads(TorchFunctionMode):
    """While it is active, records which functions make tensors from the weights of linears."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.keys = {linear: id(linear.weight) for linear in linears.values()}
        self.names: dict[int, list[str]] = {}  # by id of a weight, of all linears that have it
        for name, linear in linears.items():
            self.names.setdefault(self.keys[linear], []).append(name)
        self.found: dict[int, str] = {}  # id of a weight -> the function that read it
        self.begun = dict.fromkeys(self.names, 0)  # forwards of its linears less calls of F.linear

    def begin(self, module: nn.Module, args: tuple) -> None:
        """A forward of a linear begins."""
        self.begun[self.keys[module]] += 1

    def others(self) -> dict[str, str]:
        """Name of every linear whose weight was read outside of its forward -> why it is left."""
        unmatched = {key: "F.linear elsewhere" for key, count in self.begun.items() if count}
        return {
            name: f"its weight is read by {function}, not only by its own forward"
            for key, function in (unmatched | self.found).items()
            for name in self.names[key]
        }

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, result = kwargs or {}, func(*args, **(kwargs or {}))
        read = [id(t) for t in _tensors((args, kwargs)) if id(t) in self.names]
        if read and func is F.linear and id(_weight_of(args, kwargs)) == read[0] == read[-1]:
            self.begun[read[0]] -= 1
        elif read and next(_tensors(result), None) is not None:  # more than its shape or dtype
            self.found |= dict.fromkeys(read, resolve_name(func) or str(func))
        return result


def _weight_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The second argument of F.linear."""
    return args[1] if len(args) > 1 else kwargs["weight"]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
