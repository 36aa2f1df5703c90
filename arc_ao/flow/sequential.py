"""Quantize block by block, each linear on the inputs that the quantized ones before it produce.

A decoder or encoder is a chain of equal blocks. Its first block's inputs are recorded once, with
what every block is given besides the hidden states. Then block by block, and within a block input
by input in the order of execution (q/k/v, o, gate/up, down):

    run the block on all batches up to the input      products of what the weights will meet
    quantize the linears that read it                 their sum is freed
    ... and, when all are done, run the whole block   the next block's inputs

Memory beyond the model: the hidden states of all calibration tokens in the model's dtype (tokens *
hidden_size * 2 bytes in bf16), masks and position embeddings of every batch (which blocks share),
and one input's sum at a time. A block runs once for each of its inputs and once more.

A model without such a chain is one block: it runs as a whole for every input of its linears.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.blocks import find_blocks
from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.calibration.few_tokens import RoundingNote
from arc_ao.calibration.padding import kept_rows, watched
from arc_ao.calibration.session import Member
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.inference import evaluation_mode, run_model, without_cache
from arc_ao.memory import release_memory
from arc_ao.methods.gram import Gram
from arc_ao.methods.weights import LayerPlan
from arc_ao.progress import SILENT, Progress
from arc_ao.tensor import ARCTensor

HIDDEN = "hidden_states"
# Of every batch, by linear and call: which rows are no padding, bool [rows]; None: all.
Kept = list[dict[nn.Module, list[Tensor | None]]]


class _Seen(Exception):
    """Raised in a forward when nothing after this point is needed."""


@dataclass
class _Call:
    """What a block is called with, less its hidden states."""

    args: tuple
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
        if HIDDEN in self.kwargs:
            return self.args, self.kwargs | {HIDDEN: hidden}
        return (hidden, *self.args[1:]), self.kwargs


@dataclass
class Recording:
    """Inputs of a chain of blocks: [batch] hidden states of the current block, [batch][block]."""

    blocks: list[nn.Module]
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[_Call]] = field(default_factory=list)
    last_output: Tensor | None = None
    chained: bool = True

    def before(self, index: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """A block is called; the first one's hidden states are kept, others must be passed on."""
        hidden = kwargs.get(HIDDEN, args[0] if args else None)
        if index == 0:
            self.hidden.append(hidden)
            self.calls.append([])
        elif not self.calls or index != len(self.calls[-1]) or hidden is not self.last_output:
            self.chained = False
            return
        if HIDDEN in kwargs:
            kwargs = kwargs | {HIDDEN: None}
        else:
            args = (None, *args[1:])
        self.calls[-1].append(_Call(args, kwargs))

    def after(self, output: Any) -> None:
        """What a block passes on."""
        self.last_output = _first(output)

    def complete(self, batches: int) -> bool:
        """Whether every block ran once for every batch, on the output of the one before."""
        lengths = [len(calls) for calls in self.calls]
        return self.chained and lengths == [len(self.blocks)] * batches


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def quantize_sequentially(
    model: nn.Module,
    batches: list[Batch | Tensor],
    groups: list[list[Member]],
    plan_of: Callable[[Member], LayerPlan],
    convert: Callable[[list[Member], Gram | None], dict[str, RoundingNote]],
    finish: Callable[[Member, ARCTensor], None],
    *,
    token_weights: Callable[[list[Member]], list[list[Tensor]] | None] = lambda group: None,
    work: WorkDir | None = None,
    progress: Progress = SILENT,
) -> dict[str, RoundingNote]:
    """Convert the linears inside the model's blocks, in the order of execution.

    Args:
        groups: linears by shared input, from the ordinary calibration.
        plan_of: plan of a linear that is not converted yet.
        convert: quantizes the linears of one input in place, given the sum of its products, or
            None where their plan needs none; how each was rounded, by name.
        finish: puts one quantized weight in its place.
        token_weights: of the tokens that the linears of one input read, fp32 [rows] by batch and
            call, in the order of calls; None, or a call of other rows: by their energies.
        work: finished blocks to take over, and where to keep new ones.

    Returns:
        How each linear was rounded, by name.
    """
    all_notes: dict[str, RoundingNote] = {}
    linears = [member.module for group in groups for member in group]
    with evaluation_mode(model), torch.no_grad(), without_cache(model):
        chain = _record(model, find_blocks(model, linears), batches, linears)
        for index in progress.steps("round weights", range(len(chain.blocks))):
            inside = chain.groups(index, groups)
            members = [member for group in inside for member in group]
            kept = None if work is None else work.load_block(index)
            if kept is not None:
                weights, notes = kept
                for member in members:
                    finish(member, weights[member.name])
            else:
                notes = {}
                for group in inside:
                    first, weights = group[0], token_weights(group)
                    gram = chain.gather(index, first.module, plan_of(first), weights)
                    notes |= convert(group, gram)
                if work is not None:
                    work.save_block(index, {m.name: m.module.weight.data for m in members}, notes)
            all_notes |= notes
            chain.advance(index)
    return all_notes


@dataclass
class _Chain:
    """Blocks, the inputs of the current one, and when each linear runs."""

    blocks: list[nn.Module]
    recording: Recording | None  # None: the only block is the model
    batches: list[Batch | Tensor]
    times: dict[nn.Module, int]  # calls in one forward, linears in the order of execution
    kept: Kept

    def groups(self, index: int, groups: list[list[Member]]) -> list[list[Member]]:
        """Groups of one block in the order of execution."""
        inside = set(self.blocks[index].modules())
        parts = [[m for m in group if m.module in inside] for group in groups]
        rank = {module: i for i, module in enumerate(self.times)}
        last = len(rank)
        return sorted(
            (part for part in parts if part), key=lambda part: rank.get(part[0].module, last)
        )

    def gather(
        self, index: int, linear: nn.Module, plan: LayerPlan, weights: list[list[Tensor]] | None
    ) -> Gram | None:
        """Products of the inputs of `linear` over all batches, less their padding, where its plan
        needs them."""
        if not plan.config.needs_hessian:
            return None
        tokens = self.times.get(linear, 0) * sum(num_tokens(batch) for batch in self.batches)
        gram, left, calls, kept = Gram(plan, tokens), 0, iter(()), iter(())

        def see(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal left
            x = args[0] if args else kwargs["input"]
            rows, some = (_fitting(x, next(values, None)) for values in (kept, calls))
            gram.add(x, rows, weights=some)
            left -= 1
            if left == 0:
                raise _Seen

        handle = linear.register_forward_pre_hook(see, with_kwargs=True)
        try:
            for i in range(len(self.batches)):
                left = self.times.get(linear, 0)
                calls = iter(() if weights is None else weights[i])  # experts are not always called
                kept = iter(self.kept[i].get(linear, ()))
                self._run(index, i)
        finally:
            handle.remove()
        return gram

    def advance(self, index: int) -> None:
        """Replace the inputs by the outputs of block `index`."""
        if self.recording is None or index + 1 == len(self.blocks):
            return
        for i in range(len(self.batches)):
            self.recording.hidden[i] = _first(self._run(index, i))
            release_memory()

    def _run(self, index: int, batch: int) -> Any:
        try:
            if self.recording is None:
                return run_model(self.blocks[0], self.batches[batch])
            hidden = self.recording.hidden[batch]
            args, kwargs = self.recording.calls[batch][index].with_hidden(hidden)
            return self.blocks[index](*args, **kwargs)
        except _Seen:
            return None


def _fitting(x: Tensor, values: Tensor | None) -> Tensor | None:
    """Values [rows] of x [*, K]; None where there are none, or of other rows."""
    return values if values is not None and len(values) == x.shape[:-1].numel() else None


def _record(
    model: nn.Module,
    blocks: list[nn.Module],
    batches: list[Batch | Tensor],
    linears: list[nn.Linear],
) -> _Chain:
    """Run the model once on all batches and keep what its blocks are called with."""
    recording, times, kept = Recording(blocks), {}, []
    with _hooks(recording, linears, kept), watched(model):
        for batch in batches:
            kept.append({})
            run_model(model, batch)
            for linear, calls in kept[-1].items():
                times[linear] = max(times.get(linear, 0), len(calls))
            release_memory()
    if blocks and recording.complete(len(batches)):
        return _Chain(blocks, recording, batches, times, kept)
    return _Chain([model], None, batches, times, kept)


@contextmanager
def _hooks(recording: Recording, linears: list[nn.Linear], kept: Kept) -> Iterator[None]:
    """Inside, calls of blocks and linears are recorded."""
    handles = []

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        kept[-1].setdefault(module, []).append(kept_rows(x))

    for index, block in enumerate(recording.blocks):
        before = lambda _, args, kwargs, i=index: recording.before(i, args, kwargs)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda *call: recording.after(call[-1])))
    for linear in linears:
        handles.append(linear.register_forward_pre_hook(read, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
