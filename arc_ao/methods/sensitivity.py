"""How much the model's output suffers from an error in each layer.

Blocks compete for one budget by the error that they remove relative to their layer's output. The
same relative error does not mean the same to the model: in the shipped Llama one at the first
attention input costs more than twenty times as much as one at the last output projection. So each
input's linears are quantized alone, to plain NVFP4, and

    weight = sqrt(divergence of the model's output / relative error of these linears)

multiplies the error removed there. Weights are relative to their mean. The square root measured as
good as the ratio itself on the shipped model with GPTQ (64.2 and 63.6 % of plain NVFP4's KL closed,
61.4 % with equal weights, all in a trial that also fitted the weights to the outputs), and moves
less where the measurement is noisy.
"""

import dataclasses
import math

from torch import Tensor, nn
from tqdm import tqdm

from arc_ao.calibration.data import Batch
from arc_ao.calibration.session import CalibrationSession
from arc_ao.config import ARCConfig
from arc_ao.eval.divergence import output_divergence
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.methods.plan import GroupAnalysis, analyse_session, make_plans
from arc_ao.methods.recipe import quantized_on_the_fly


def measure_layer_weights(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    *,
    progress: bool = True,
) -> dict[str, float]:
    """Name of each input's first linear -> weight of the errors of all that read the input.

    Args:
        session: calibrated, not observing. Of its config only the kinds of scales matter: what a
            search resolves must measure the same weights when it is given again.
    """
    for group in session.groups():
        session.observer_of(group).statistics()  # refuses a layer that saw no token
    given = session.config.resolve()
    plain = ARCConfig(
        budget=0.0,
        recipe="balanced",
        weight_scale=given.weight_scale,
        activation_scale=given.activation_scale,
        pad_in_features=given.pad_in_features,
    ).resolve()
    analyses = analyse_session(session, plain, progress=progress)
    plans = make_plans(analyses, plain)
    divergences = [0.0] * len(analyses)
    bar = tqdm(desc="weigh layers", total=len(batches), disable=not progress, leave=False)
    with bar, evaluation_mode(model):
        for batch in batches:
            reference = run_model(model, batch)
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            for i, analysis in enumerate(analyses):
                alone = dataclasses.replace(session, members=analysis.members)
                with quantized_on_the_fly(alone, plans):
                    output = run_model(model, batch)
                divergences[i] += output_divergence(reference, output, mask)
            bar.update()
    return _weights(analyses, divergences)


def _weights(analyses: list[GroupAnalysis], divergences: list[float]) -> dict[str, float]:
    """Layers without error, or with a divergence that is not finite, get the mean weight."""
    weights = {}
    for analysis, divergence in zip(analyses, divergences, strict=True):
        error = (analysis.scores.act_score.sum() + analysis.scores.weight_score.sum()).item()
        ratio = divergence / error if error > 0 else math.nan
        weights[analysis.scores.names[0]] = math.sqrt(ratio) if ratio >= 0 else math.nan
    known = [w for w in weights.values() if math.isfinite(w) and w > 0]
    mean = sum(known) / len(known) if known else 1.0
    return {name: w / mean if w in known else 1.0 for name, w in weights.items()}
