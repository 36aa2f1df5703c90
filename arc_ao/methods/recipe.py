"""Measure what a model wants: `ARCConfig()` tries candidates and the model's output decides.

For every candidate calibration tokens run through the model with each linear quantized just before
it is used, rounded to nearest, and restored right after, so that trying costs the memory of one
layer. The divergence of the output from the unquantized model (mean KL per token for logits,
1 - cosine for hidden states) ranks the candidates; among those within 2 % of the best, the one
that costs least at run time wins.

The values of one field run on a quarter of the batches first, and the better half of them on the
others (successive halving, arXiv 1502.07943), compared on the same tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.calibration.reference import Reference, record_references
from arc_ao.calibration.session import CalibrationSession
from arc_ao.config import ARCConfig
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.memory import release_memory
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.weights import LayerPlan, quantize_weight
from arc_ao.progress import SILENT, Progress
from arc_ao.recipes import SEARCHED_FIELDS

ROUNDS: dict[str, tuple[Any, ...]] = {
    "channel_order": ("none", "amax", "rms"),
    "activation_block_scale": ("amax", "mse"),
    "exchange_rate": (0.0, 0.3, 1.0, 3.0, "inf"),
    "granularity": ("block", "channel"),
}
# Where errors of both kinds are in the same units, by their Fisher information.
FISHER_RATES = (0.3, 1.0, 3.0)
SEARCH_TOKENS = 2048
SEARCH_BATCHES = 16  # weights are quantized anew for every batch and candidate
# Sorting and searched scales gain 3 to 12 % each on real models; a gather and a search of scales
# cost a few percent of a prompt.
EQUAL_WITHIN = 1.02
# Run-time cost, by which equals are ranked: nothing, a gather of the residuals, a search
# of every block's scale, a gather of the whole input.
RUN_TIME_COST = {"channel": 1, "block_scale": 2, "sorted": 4}


@dataclass(frozen=True)
class Trial:
    """One candidate and the divergence it measured, on how many batches."""

    config: ARCConfig
    divergence: float
    batches: int = 1

    @property
    def cost(self) -> int:
        """Rank of the run-time cost that the candidate adds to plain NVFP4."""
        c = self.config
        return (
            RUN_TIME_COST["sorted"] * (c.channel_order != "none")
            + RUN_TIME_COST["channel"] * (c.granularity == "channel")
            + RUN_TIME_COST["block_scale"] * (c.activation_block_scale != "amax")
        )

    def to_dict(self) -> dict[str, Any]:
        """Searched fields, divergence and number of batches."""
        fields = {name: getattr(self.config, name) for name in SEARCHED_FIELDS}
        return fields | {"divergence": self.divergence, "batches": self.batches}


def search_recipe(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    *,
    progress: Progress = SILENT,
) -> list[Trial]:
    """Try values for the None fields of a calibrated session's config; the winner comes first.

    One field after the other, each on the winner so far.
    """
    batches = search_batches(batches)
    observing, session.observing = session.observing, False
    try:
        with progress.stage("try recipes") as advance:
            step = 1 / expected_runs(session.config, len(batches))
            runs = _Runs(model, session, batches, lambda: advance(step))
            trials = _search(runs, session.config)
    finally:
        session.observing = observing
    winner = best(trials)
    return [winner, *sorted((t for t in trials if t is not winner), key=lambda t: t.divergence)]


def _search(runs: "_Runs", config: ARCConfig) -> list[Trial]:
    trials = halve(runs, [config.resolve()])
    for field in ROUNDS:
        winner = best(trials).config
        if field in config.searched and _matters(field, winner):
            tried = [v for v in _values(field, config) if v != getattr(winner, field)]
            trials += halve(runs, [dataclasses.replace(winner, **{field: v}) for v in tried])
    return trials


def _values(field: str, config: ARCConfig) -> tuple[Any, ...]:
    """What is tried of a field."""
    if field == "exchange_rate" and config.weighs_layers:
        return FISHER_RATES
    return ROUNDS[field]


def halve(runs: "_Runs", configs: list[ARCConfig]) -> list[Trial]:
    """Trials of every config: on the first batches, and for the better half on all."""
    few = first_batches(runs.count)
    firsts = runs.measure(configs, few)
    kept = sorted(firsts, key=lambda trial: trial.divergence)[: -(-len(firsts) // 2)]
    dropped = [trial for trial in firsts if trial not in kept]
    return runs.measure([trial.config for trial in kept], runs.count) + dropped


def first_batches(count: int) -> int:
    """How many of `count` batches every candidate runs on."""
    return max(1, count // 4)


def expected_runs(config: ARCConfig, count: int) -> int:
    """Forwards of candidates, for `count` batches each, that a search makes at most."""
    runs = count
    for field in config.searched:
        candidates = len(_values(field, config)) - 1
        kept = -(-candidates // 2)
        runs += candidates * first_batches(count) + kept * (count - first_batches(count))
    return runs


def _matters(field: str, config: ARCConfig) -> bool:
    """Sorted channels share blocks already; without activation residuals nothing is gathered."""
    if field != "granularity":
        return True
    return config.channel_order == "none" and not math.isinf(float(config.exchange_rate))


def best(trials: list[Trial]) -> Trial:
    """Least run-time cost among the trials within 2 % of the least divergence.

    Of those alone that ran on the most batches.
    """
    most = max(trial.batches for trial in trials)
    full = [trial for trial in trials if trial.batches == most]
    least = min(trial.divergence for trial in full)
    equals = [t for t in full if t.divergence <= least * EQUAL_WITHIN] or full
    return min(equals, key=lambda t: (t.cost, t.divergence))


class _Runs:
    """Divergences of candidates on batches, each measured when it is first asked for.

    Args:
        advance: called after every run.
    """

    def __init__(
        self,
        model: nn.Module,
        session: CalibrationSession,
        batches: list[Batch | Tensor],
        advance: Callable[[], None],
    ) -> None:
        self.model, self.session, self.batches, self.advance = model, session, batches, advance
        self.found: dict[str, list[float]] = {}  # by config: of the first batches
        self.references: dict[int, Reference] = {}  # of batches, as far as they are small

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def measure(self, configs: list[ARCConfig], count: int) -> list[Trial]:
        """Mean divergence of every config over the first `count` batches."""
        found = [self.found.setdefault(repr(config), []) for config in configs]
        plans = [self._plans(config) for config in configs]
        with evaluation_mode(self.model):
            for i, batch in enumerate(self.batches[:count]):
                missing = [k for k, measured in enumerate(found) if len(measured) <= i]
                if missing:
                    reference = self._reference(i)
                    divergences = self._divergences([plans[k] for k in missing], batch, reference)
                    for k, divergence in zip(missing, divergences, strict=True):
                        found[k].append(divergence)
        return [
            Trial(config, sum(measured[:count]) / count, count)
            for config, measured in zip(configs, found, strict=True)
        ]

    def _reference(self, index: int) -> Reference:
        """What the unquantized model says about a batch; logits themselves are not kept."""
        if index in self.references:
            return self.references[index]
        changing = {member.module for member in self.session.members}
        (found,) = record_references(self.model, [self.batches[index]], changing)
        if found.head is not None or not found.logits:
            self.references[index] = found
        return found

    def _divergences(
        self, plans: list[dict[str, LayerPlan]], batch: Batch | Tensor, reference: Reference
    ) -> Iterator[float]:
        for plan in plans:
            with quantized_on_the_fly(self.session, plan):
                output = run_model(self.model, batch)
            yield reference.measure(output)
            release_memory()
            self.advance()

    def _plans(self, config: ARCConfig) -> dict[str, LayerPlan]:
        return make_plans(analyse_session(self.session, config), config)


@contextmanager
def quantized_on_the_fly(
    session: CalibrationSession, plans: dict[str, LayerPlan]
) -> Iterator[None]:
    """Inside, every planned linear runs quantized; its weight is swapped only while it runs."""
    handles, originals = [], {}

    def swap_in(module: nn.Linear, args: tuple) -> None:
        originals[module] = module.weight
        quantized = quantize_weight(module.weight, by_module[module])
        quantized = quantized.packed()
        module.weight = nn.Parameter(quantized, requires_grad=False)

    def swap_out(module: nn.Linear, args: tuple, output: Tensor | None) -> None:
        if module in originals:  # not where an earlier pre-hook raised
            module.weight = originals.pop(module)

    by_module = {member.module: plans[member.name] for member in session.members}
    try:
        for module in by_module:
            handles.append(module.register_forward_pre_hook(swap_in))
            handles.append(module.register_forward_hook(swap_out, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, weight in originals.items():
            module.weight = weight


def search_batches(
    batches: list[Batch | Tensor], most_tokens: int | None = None
) -> list[Batch | Tensor]:
    """Evenly spaced batches of at most so many tokens together, by default SEARCH_TOKENS: 1 to
    SEARCH_BATCHES."""
    return [batches[i] for i in search_indices(batches, most_tokens)]


def search_indices(batches: list[Batch | Tensor], most_tokens: int | None = None) -> list[int]:
    """Which batches `search_batches` takes."""
    most = SEARCH_TOKENS if most_tokens is None else most_tokens
    tokens = [num_tokens(batch) for batch in batches]
    fitting = len(batches) * most // max(1, sum(tokens))
    count = min(len(batches), SEARCH_BATCHES, max(1, fitting))
    while True:
        chosen = [i * len(batches) // count for i in range(count)]
        if count == 1 or sum(tokens[i] for i in chosen) <= most:
            return chosen
        count -= 1
