"""Mixes run through the model: plans of what they pick, weights for a trial, divergence."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.padding import kept_tokens_of_output, watched
from arc_ao.calibration.session import CalibrationSession
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.memory import release_memory
from arc_ao.methods.choice_errors import quantized
from arc_ao.methods.choices import Menu, Option
from arc_ao.methods.gptq import prepare_rounding
from arc_ao.methods.gram import Gram
from arc_ao.methods.plan import analyse_prepared, group_statistics, plan_member
from arc_ao.methods.weights import LayerPlan
from arc_ao.outputs.divergence import model_output, output_divergence
from arc_ao.progress import SILENT, Progress
from arc_ao.tensor import ARCTensor


def plans_of(session: CalibrationSession, menu: Menu, option: Option) -> dict[str, LayerPlan]:
    """Plans of the linears of one input that an option quantizes."""
    config = option.variant.config
    statistics = group_statistics(session, menu.members, config)
    analysis = analyse_prepared(
        menu.members, statistics, config, menu.sample, option.variant.prepared
    )
    plans = {
        member.name: plan_member(analysis, i, option.selected, config)
        for i, member in enumerate(menu.members)
        if i not in option.left
    }
    if config.needs_hessian:  # which chooses other scales
        return {name: replace(plan, scale=None) for name, plan in plans.items()}
    return plans


def _tensors(
    session: CalibrationSession, menu: Menu, option: Option
) -> list[tuple[nn.Linear, ARCTensor]]:
    """The linears of one input, quantized as they would be, by the kept rows alone."""
    if option.variant is None:
        return []
    plans = plans_of(session, menu, option)
    names, rounding = list(plans), None
    first = plans[names[0]]
    if first.config.needs_hessian:
        gram = Gram(first)
        gram.add(menu.sample)
        rounding = prepare_rounding(gram.take, first, names, gram.tokens)
    return [
        (m.module, quantized(m.module.weight.detach(), plans[m.name], rounding).packed())
        for m in menu.members
        if m.name in plans
    ]


def divergences(
    model: nn.Module,
    session: CalibrationSession,
    menus: list[Menu],
    mixes: list[list[Option]],
    batches: list[Batch | Tensor],
    *,
    progress: Progress = SILENT,
) -> Iterator[float]:
    """Mean divergence of the model's output under every mix, an option for each menu."""
    with evaluation_mode(model):
        for picks in progress.steps("compare mixes", mixes):
            made = [
                pair
                for menu, option in zip(menus, picks, strict=True)
                for pair in _tensors(session, menu, option)
            ]
            total = 0.0
            for batch in batches:
                with watched(model):  # anew: logits of all batches would not fit
                    reference = run_model(model, batch)
                    kept = kept_tokens_of_output(model_output(reference))
                with swapped(made):
                    output = run_model(model, batch)
                total += output_divergence(reference, output, kept)
                release_memory()
            del made
            yield total / len(batches)


@contextmanager
def swapped(tensors: list[tuple[nn.Linear, ARCTensor]]) -> Iterator[None]:
    """Inside, the linears have these weights."""
    originals = [module.weight for module, _ in tensors]
    try:
        for module, tensor in tensors:
            module.weight = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for (module, _), weight in zip(tensors, originals, strict=True):
            module.weight = weight
