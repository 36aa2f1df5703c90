"""Plans of a calibrated session's linears, and what the flows that cannot measure refuse."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.fisher import FISHER_TOKENS, measure_fisher
from arc_ao.calibration.session import CalibrationSession, detach, observer_on
from arc_ao.config import ARCConfig
from arc_ao.flow.targets import warn_of_left
from arc_ao.methods.hessian import shared_roundings
from arc_ao.methods.kronecker import forget_routed_tokens
from arc_ao.methods.mix import COMPARED_TOKENS, Mix, search_mix
from arc_ao.methods.plan import analyse_session, make_plans
from arc_ao.methods.recipe import Trial, search_batches, search_indices, search_recipe
from arc_ao.outputs.divergence import NotComparableError
from arc_ao.progress import SILENT, Progress


def unreached(sessions: Iterable[tuple[CalibrationSession, ARCConfig]]) -> dict[str, str]:
    """Name -> why, of the linears that no calibration token reached though their config needs some.

    Such as experts that were never chosen, and vision towers of models that saw text alone.

    Args:
        sessions: each with the config that its linears get.

    Raises:
        ValueError: no token reached any linear at all.
    """
    seen, missing = 0, {}
    for session, config in sessions:
        for member in session.members:
            count = int(observer_on(member.module).count)
            seen += count
            if not count and config.needs_calibration:
                missing[member.name] = "no calibration token reached it"
    if missing and not seen:
        raise ValueError(
            f"{next(iter(missing))}: expected calibration tokens, found none, as for all "
            f"{len(missing)} linears; run the prepared model on calibration data before convert"
        )
    return missing


def measure_session(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor] | None,
    *,
    progress: Progress = SILENT,
) -> list[Trial | Mix]:
    """Weigh the layers of a calibrated session and search its recipe or its mix of choices.

    Where the model's output cannot be compared, a warning says so, and both are left at what they
    are without: the recipe "balanced", or the mix of least weighed error.

    Returns:
        What was tried, the winner first; a mix is kept with the session, too.
    """
    if batches is None or not session.members:
        return []
    try:
        return _measure(model, session, batches, progress)
    except NotComparableError as error:
        warnings.warn(
            f"{type(model).__name__} is quantized without measuring its output, with layers that "
            f"weigh the same and the choices of recipe='balanced' ({error}). Let the model return "
            "what matters as a tensor or under one of these names, or ask for "
            "ARCConfig(recipe='balanced') to have the same without this warning",
            stacklevel=4,
        )
    session.fisher = None
    if not session.config.mixes:
        return []
    session.mix = search_mix(model, session, [], progress=progress)
    return session.mix.mixes


def _measure(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    progress: Progress,
) -> list[Trial | Mix]:
    config = session.config
    if config.weighs_layers or config.kronecker:
        session.fisher = measure_fisher(
            model,
            session,
            batches,
            search_indices(batches, FISHER_TOKENS),
            kronecker=config.kronecker,
            progress=progress,
        )
        for fisher in (session.fisher or {}).values():
            forget_routed_tokens(fisher, batches)
    if config.mixes:
        session.mix = search_mix(
            model, session, search_batches(batches, COMPARED_TOKENS), progress=progress
        )
        return session.mix.mixes
    if config.searched:
        return search_recipe(model, session, batches, progress=progress)
    return []


def plan_session(
    session: CalibrationSession, config: ARCConfig, *, progress: Progress = SILENT
) -> None:
    """Plan every linear of a session before the first one is touched.

    Linears that a mix leaves as they are leave the session.
    """
    if session.mix is not None:
        session.plans, session.choices = session.mix.plans(session), session.mix.by_linear()
        session.leave({m.name for m in session.members} - session.plans.keys())
        session.mix = None  # and the input rows in it
    else:
        analyses = analyse_session(session, config, progress=progress)
        session.plans = make_plans(analyses, config)
    if config.needs_hessian:  # which chooses other scales; these take 1/32 of the model's memory
        plans = session.plans.items()
        session.plans = {name: dataclasses.replace(plan, scale=None) for name, plan in plans}
    session.analyses = None  # every plan is dropped with its layer, its block scales too
    session.config.__dict__.pop("_session", None)  # complete: a config must not hold on to a model


def plan_unsearched(sessions: Collection[tuple[CalibrationSession, ARCConfig]]) -> None:
    """Plan sessions of the three-step flow, which has no data left to measure recipes on.

    Linears that no token reached leave their session, with one warning.
    """
    left, everyone = unreached(sessions), [session.members for session, _ in sessions]
    try:
        for session, config in sessions:
            refuse_one_call(config)
            _warn_of_unmeasured(config)
            session.members = [member for member in session.members if member.name not in left]
            roundings = shared_roundings(session) if config.needs_hessian else {}
            plan_session(session, config.resolve())
            session.roundings = roundings
    except BaseException:
        for (session, _), members in zip(sessions, everyone, strict=True):
            session.members = members  # convert may be called again, with data for all of them
        raise
    for member in (member for members in everyone for member in members):
        if member.name in left:
            detach(member.module)
    warn_of_left(left)


def _warn_of_unmeasured(config: ARCConfig) -> None:
    weighed = ["layer_weights"] if config.weighs_layers else []
    weighed += ["hessian"] if config.kronecker else []
    weighed += ["tuning"] if config.resolve().tuning != "none" else []
    if unmeasured := config.searched + weighed:
        warnings.warn(
            f"the three steps cannot measure {', '.join(unmeasured)}; taking those of "
            "recipe='balanced'. Call arc_ao.quantize_(..., calibration_data=...) to measure them",
            stacklevel=3,
        )


def refuse_one_call(config: ARCConfig) -> None:
    """The steps cannot compare mixes on the model's output, nor train codes against it.

    Raises:
        ValueError: a config whose mix of choices is measured, or one that trains.
    """
    if config.tunes_codes:
        raise ValueError(
            "expected a recipe that needs no training in a prepare/convert flow, found 'tuned'; "
            "take recipe='best', or call arc_ao.quantize_(model, config, calibration_data=...)"
        )
    if config.mixes:
        raise ValueError(
            f"expected a config that is the same for all layers in a prepare/convert flow, found "
            f"{type(config).__name__}, whose choices are compared on the model's output; call "
            "arc_ao.quantize_(model, config, calibration_data=...) instead"
        )
