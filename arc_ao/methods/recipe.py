"""Measure what a model wants: `ARCConfig()` tries candidates and the model's output decides.

For every candidate the calibration tokens run through the model with each linear quantized just
before it is used, rounded to nearest, and restored right after, so that trying costs the memory of
one layer. The divergence of the output from the unquantized model (mean KL per token for logits,
1 - cosine for hidden states) ranks the candidates; among those within 5 % of the best, the one
that costs least at run time wins.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.calibration.session import CalibrationSession
from arc_ao.config import ARCConfig
from arc_ao.eval.divergence import output_divergence
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.memory import release_memory
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.weights import LayerPlan, quantize_weight

ROUNDS: dict[str, tuple[Any, ...]] = {
    "channel_order": ("none", "amax"),
    "exchange_rate": (0.0, 0.3, 1.0, 3.0, "inf"),
    "granularity": ("block", "channel"),
    "activation_block_scale": ("amax", "mse"),
}
SEARCH_TOKENS = 4096
SEARCH_BATCHES = 16  # weights are quantized anew for every batch and candidate
EQUAL_WITHIN = 1.05
# Run-time cost, by which equals are ranked: nothing, a gather of the residuals, a search
# of every block's scale, a gather of the whole input.
RUN_TIME_COST = {"channel": 1, "block_scale": 2, "amax": 4}


@dataclass(frozen=True)
class Trial:
    """One candidate and the divergence it measured."""

    config: ARCConfig
    divergence: float

    @property
    def cost(self) -> int:
        """Rank of the run-time cost that the candidate adds to plain NVFP4."""
        c = self.config
        return (
            RUN_TIME_COST["amax"] * (c.channel_order == "amax")
            + RUN_TIME_COST["channel"] * (c.granularity == "channel")
            + RUN_TIME_COST["block_scale"] * (c.activation_block_scale != "amax")
        )

    def to_dict(self) -> dict[str, Any]:
        """Searched fields and divergence."""
        names = ("channel_order", "granularity", "exchange_rate", "activation_block_scale")
        return {n: getattr(self.config, n) for n in names} | {"divergence": self.divergence}


def search_recipe(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    *,
    progress: bool = True,
) -> list[Trial]:
    """Try values for the None fields of a calibrated session's config; the winner comes first.

    One field after the other, each on the winner so far.
    """
    observing, session.observing = session.observing, False
    try:
        search = _Search(model, session, search_batches(batches), progress)
        searched = session.config.searched
        trials = search.measure([session.config.resolve()])
        for field, values in ROUNDS.items():
            winner = best(trials).config
            if field in searched and _matters(field, winner):
                tried = [v for v in values if v != getattr(winner, field)]
                trials += search.measure([dataclasses.replace(winner, **{field: v}) for v in tried])
    finally:
        session.observing = observing
    winner = best(trials)
    return [winner, *sorted((t for t in trials if t is not winner), key=lambda t: t.divergence)]


def _matters(field: str, config: ARCConfig) -> bool:
    """Sorted channels share blocks already; without activation residuals nothing is gathered."""
    if field != "granularity":
        return True
    return config.channel_order == "none" and not math.isinf(float(config.exchange_rate))


def best(trials: list[Trial]) -> Trial:
    """Least run-time cost among the trials within 5 % of the least divergence."""
    least = min(trial.divergence for trial in trials)
    equals = [t for t in trials if t.divergence <= least * EQUAL_WITHIN] or trials
    return min(equals, key=lambda t: (t.cost, t.divergence))


class _Search:
    """Measures candidates on one set of batches; those of one call share their channel order."""

    def __init__(
        self,
        model: nn.Module,
        session: CalibrationSession,
        batches: list[Batch | Tensor],
        progress: bool,
    ) -> None:
        self.model, self.session, self.batches = model, session, batches
        self.progress = progress

    def measure(self, configs: list[ARCConfig]) -> list[Trial]:
        """Mean divergence of every config over the batches."""
        sums = [0.0] * len(configs)
        plans = [self._plans(config) for config in configs]
        total = len(self.batches) * len(configs)
        bar = tqdm(total=total, desc="try recipes", disable=not self.progress, leave=False)
        with bar, evaluation_mode(self.model):
            for batch in self.batches:
                reference = run_model(self.model, batch)
                mask = batch.get("attention_mask") if isinstance(batch, dict) else None
                for i, plan in enumerate(plans):
                    with quantized_on_the_fly(self.session, plan):
                        output = run_model(self.model, batch)
                    sums[i] += output_divergence(reference, output, mask)
                    release_memory()
                    bar.update()
        return [
            Trial(config, total / len(self.batches))
            for config, total in zip(configs, sums, strict=True)
        ]

    def _plans(self, config: ARCConfig) -> dict[str, LayerPlan]:
        analyses = analyse_session(self.session, config, progress=self.progress)
        return make_plans(analyses, config)


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
            release_memory()

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
    most = SEARCH_TOKENS if most_tokens is None else most_tokens
    tokens = [num_tokens(batch) for batch in batches]
    fitting = len(batches) * most // max(1, sum(tokens))
    count = min(len(batches), SEARCH_BATCHES, max(1, fitting))
    while True:
        chosen = [i * len(batches) // count for i in range(count)]
        if count == 1 or sum(tokens[i] for i in chosen) <= most:
            return [batches[i] for i in chosen]
        count -= 1
