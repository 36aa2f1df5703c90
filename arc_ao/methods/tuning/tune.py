"""Train the codes and norms of a quantized model against what the unquantized one says.

Rounding is passed straight through (layer.py), block scales stay; what is added to where a weight
began is of low rank (latent.py). The loss is the mean KL of the logits per token (1 - cosine of
hidden states). Batches are taken in a shuffled order, again and again, all but some kept aside:
what is best on those is what the model ends with, and the state it began with counts.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arc_ao.blocks import checkpointed
from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.calibration.reference import Reference
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.inference import call_model, evaluation_mode, run_model, without_cache
from arc_ao.methods.tuning.layer import InputCache
from arc_ao.methods.tuning.parameters import Trainables, install, trainables, under_training
from arc_ao.methods.tuning.record import TuningRecord
from arc_ao.methods.tuning.schedule import EVALUATIONS, PATIENCE, Schedule
from arc_ao.progress import SILENT, Advance, Progress

KEPT_ASIDE = 0.125  # of the batches, and at least
LEAST_ASIDE = 2
SAVE_SECONDS = 180  # between states in the work folder, and 20 times what saving took


def tune(
    model: nn.Module,
    names: list[str],
    batches: list[Batch | Tensor],
    references: list[Reference],
    *,
    originals: dict[str, Tensor] | None = None,
    minutes: float = 20.0,
    max_steps: int | None = None,
    evaluations: int = EVALUATIONS,
    blocks: list[nn.Module] | None = None,
    work: WorkDir | None = None,
    progress: Progress = SILENT,
) -> TuningRecord:
    """Train the weights of quantized linears, and the norms, in place.

    Takes `bytes_per_weight` beside the model. An error leaves the model as it was.

    Args:
        names: of the linears whose codes are trained; none: norms alone.
        references: of the unquantized model, one a batch (reference.py).
        originals: unquantized weights, emptied as they are read: where a weight lies between two
            codes is where its latent starts.
        max_steps: end after so many steps; the same number gives the same bits on the same machine.
        evaluations: on the batches kept aside, while it runs.
        blocks: keep only their inputs for the backward pass, and run a second time.
        work: folder whose state a run goes on from and leaves its own in.

    Raises:
        ValueError: fewer than two batches.
    """
    train, aside = split(len(batches))
    schedule = Schedule(minutes, max_steps, evaluations)
    stage = progress.stage("tune", seconds=None if max_steps else 60 * minutes)
    with stage as advance, evaluation_mode(model), without_cache(model):
        before = _divergence(model, batches, references, aside)
        trained = trainables(model, names, originals or {})
        start = trained.norms()
        run = _Run(trained, schedule, Best(start, before), work)
        try:
            run.resume()
            with ExitStack() as stack:
                cache = stack.enter_context(under_training(model, trained))
                for block in blocks or ():
                    stack.enter_context(checkpointed(block))
                run.train(model, batches, references, train, aside, cache, advance)
            install(model, trained, run.best.finished)
            after = _divergence(model, batches, references, aside)
            if not after < before:
                install(model, trained, start)
                after = before
        except BaseException:
            install(model, trained, start)
            raise
    tokens = sum(num_tokens(batches[i]) for i in aside)
    what = "codes and norms" if names else "norms"
    return TuningRecord(what, schedule.step, before, after, tokens, schedule.elapsed)


def split(count: int) -> tuple[list[int], list[int]]:
    """Indices of the batches to train on and of those kept aside, which lie evenly among them.

    Raises:
        ValueError: fewer than two batches.
    """
    if count < 2:
        raise ValueError(
            f"recipe='tuned': expected at least 2 batches of calibration data, one of them to keep "
            f"aside, found {count}; cut the data into windows of a few hundred tokens"
        )
    number = min(count // 2, max(LEAST_ASIDE, round(KEPT_ASIDE * count)))
    aside = [(2 * i + 1) * count // (2 * number) for i in range(number)]
    return [i for i in range(count) if i not in aside], aside


def _divergence(
    model: nn.Module,
    batches: list[Batch | Tensor],
    references: list[Reference],
    indices: list[int],
) -> float:
    """Mean over some batches; inf where a model is broken."""
    total = 0.0
    with torch.no_grad():
        for i in indices:
            total += references[i].divergence(run_model(model, batches[i])).item()
    mean = total / len(indices)
    return mean if math.isfinite(mean) else math.inf


@dataclass
class Best:
    """What was best on the batches kept aside: codes and norms, or norms alone at the start."""

    finished: dict[str, Tensor]
    divergence: float
    age: int = 0  # evaluations since


@dataclass
class _Run:
    """One run: what it trains, how far it is, what was best."""

    trained: Trainables
    schedule: Schedule
    best: Best
    work: WorkDir | None
    saved: float = 0.0  # seconds of the run at the last save
    save_seconds: float = 0.0  # what it took

    def train(
        self,
        model: nn.Module,
        batches: list[Batch | Tensor],
        references: list[Reference],
        train: list[int],
        aside: list[int],
        cache: InputCache,
        advance: Advance,
    ) -> None:
        """Steps until the budget is spent or nothing gets better."""
        schedule, shown = self.schedule, 0.0
        while not schedule.over and self.best.age < PATIENCE:
            self.trained.set_rates(schedule.rate())
            i = train[_shuffled(schedule.step, len(train))]
            loss = references[i].divergence(call_model(model, batches[i]))
            loss.backward()
            cache.clear()
            schedule.step += 1
            if schedule.evaluation_due():
                began = time.monotonic()
                self.compare(_divergence(model, batches, references, aside))
                cache.clear()
                schedule.evaluation_done(time.monotonic() - began)
            self.save_if_due()
            advance(schedule.progress - shown)
            shown = schedule.progress
        self.save()

    def compare(self, divergence: float) -> None:
        """Keep the present state if it is the best on the batches kept aside."""
        if divergence < self.best.divergence:
            self.best = Best(self.trained.finished(), divergence)
        else:
            self.best.age += 1

    def save_if_due(self) -> None:
        """Save every SAVE_SECONDS, or less often where saving takes long."""
        if self.schedule.elapsed - self.saved >= max(SAVE_SECONDS, 20 * self.save_seconds):
            self.save()

    def save(self) -> None:
        """Leave everything in the work folder."""
        if self.work is None:
            return
        began = time.monotonic()
        tensors = {f"best:{name}": value for name, value in self.best.finished.items()}
        notes = {
            "step": self.schedule.step,
            "seconds": self.schedule.elapsed,
            "evaluated": self.schedule.evaluated,
            "divergence": self.best.divergence,
            "age": self.best.age,
        }
        self.work.save_tuning(tensors | self.trained.state(), notes)
        self.saved, self.save_seconds = self.schedule.elapsed, time.monotonic() - began

    def resume(self) -> None:
        """Go on from the work folder, if a run left something there."""
        loaded = None if self.work is None else self.work.load_tuning()
        if loaded is None:
            return
        tensors, notes = loaded
        prefix = "best:"
        best = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.best = Best(best, notes["divergence"], notes["age"])
        self.schedule.resume(notes["step"], notes["seconds"], notes["evaluated"])
        self.saved = notes["seconds"]
        self.trained.load_state(tensors)


def _shuffled(step: int, count: int) -> int:
    """Which of `count` batches a step takes: each once before any again, in random orders."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step // count))
    return int(order[step % count])
