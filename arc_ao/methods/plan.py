"""From statistics to plans: analyse every weight once, then plan any number of configs from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from arc_ao.calibration.fisher import ChannelFisher
from arc_ao.calibration.observer import InputStatistics
from arc_ao.calibration.session import CalibrationSession, Member
from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.memory import release_memory
from arc_ao.methods.prepare import Preparation, prepare, search_rows, transformed_statistics
from arc_ao.methods.scores import (
    fisher_errors,
    output_energies,
    relative_errors,
    worth_of_errors,
)
from arc_ao.methods.select import GroupScores, Selected, select
from arc_ao.methods.weights import (
    CHUNK_ELEMENTS,
    LayerPlan,
    WeightAnalysis,
    analyse_weight,
    in_order,
    quantize_weight,
)
from arc_ao.progress import SILENT, Progress


@dataclass(frozen=True)
class GroupAnalysis:
    """Linears that read one input: their statistics and what plain NVFP4 costs them."""

    members: list[Member]
    order: Tensor | None  # int32 [K]
    amax: Tensor  # fp32 [], largest weight magnitude of all members
    weights: list[WeightAnalysis]
    scores: GroupScores
    mean_square: Tensor | None  # fp32 [K16] in plan order
    mean_error: Tensor | None
    act_amax: Tensor | None  # fp32 [K16], of the calibrated input
    prepared: Preparation


def analyse_session(
    session: CalibrationSession, config: ARCConfig, *, progress: Progress = SILENT
) -> list[GroupAnalysis]:
    """Analyse the weights of a session under a resolved config.

    The last result stays with the session: a search asks for the same one over and over. Only the
    last, since its block scales take 1/32 of the memory of bf16 weights.

    Raises:
        ValueError: a weight with NaN or Inf, or a layer without statistics, naming the layer.
    """
    groups = session.groups()
    seen = [int(session.observer_of(group).count) for group in groups]
    searched = config if config.smooth == "search" or config.rank else None  # by everything in it
    key = (config.channel_order, config.weight_scale, searched, seen)
    if session.analyses is None or session.analyses[0] != key:
        session.analyses = None  # freed before the next is made
        made = [
            analyse_group(
                group,
                group_statistics(session, group, config),
                config,
                session.sample_of(group),
                session.fisher_of(group, config.channel_order),
            )
            for group in progress.steps("analyse weights", groups)
        ]
        session.analyses = (key, made)
        release_memory()
    return session.analyses[1]


def make_plans(analyses: list[GroupAnalysis], config: ARCConfig) -> dict[str, LayerPlan]:
    """Plan of every linear, by name, under a resolved config."""
    selected = select([analysis.scores for analysis in analyses], config)
    return {
        member.name: plan_member(analysis, index, choice, config)
        for analysis, choice in zip(analyses, selected, strict=True)
        for index, member in enumerate(analysis.members)
    }


def group_statistics(
    session: CalibrationSession, group: list[Member], config: ARCConfig
) -> InputStatistics | None:
    """What was observed of a group's input; None where nothing was and nothing is needed."""
    observer = session.observer_of(group)
    if observer.count == 0 and not config.needs_calibration:
        return None
    return observer.statistics(config.channel_order)


def weight_amax(member: Member) -> Tensor:
    """Largest magnitude (fp32 []) of a weight.

    Raises:
        ValueError: NaN or Inf in it, naming the layer.
    """
    low, high = torch.aminmax(member.module.weight.detach())  # .abs() would copy the weight
    amax = torch.maximum(low.abs(), high.abs()).float()
    if not torch.isfinite(amax):
        raise ValueError(
            f"{member.name}: expected finite weights, found NaN or Inf; repair the checkpoint or "
            "exclude the layer"
        )
    return amax


@torch.no_grad()
def analyse_group(
    members: list[Member],
    statistics: InputStatistics | None,
    config: ARCConfig,
    sample: Tensor | None = None,
    fisher: list[ChannelFisher] | None = None,
) -> GroupAnalysis:
    """Analyse the linears that read one input; without statistics only their weights matter.

    Args:
        sample: rows [M, K] of the input, where config.sample_tokens asks for them.
        fisher: of every linear: errors are then divergences of the model's output per token,
            without it relative to the energy of the linear's output.

    Raises:
        ValueError: statistics without such rows, or in_features that no rotation fits, naming the
            layer.
    """
    weights = [member.module.weight for member in members]
    for member in members:
        check_rotation(member, config)
    if config.sample_tokens and statistics is not None and sample is None:
        raise ValueError(
            f"{members[0].name}: expected rows of the input for smooth, rotation or rank, found "
            "statistics alone (a state_dict does not carry rows); run calibration data again"
        )

    def error(prepared: Preparation) -> float:
        some = search_rows(sample)
        return _output_error(
            analyse_prepared(members, statistics, config, some, prepared), some, config
        )

    prepared = prepare(weights, statistics, sample, config, error)
    return analyse_prepared(members, statistics, config, sample, prepared, fisher)


def check_rotation(member: Member, config: ARCConfig) -> None:
    """Refuse a rotation that does not fit a layer.

    Raises:
        ValueError: in_features that are no multiple of it, naming the layer.
    """
    if config.rotation and member.module.in_features % config.rotation:
        raise ValueError(
            f"{member.name}: expected in_features to be a multiple of rotation={config.rotation}, "
            f"found {member.module.in_features}; take a smaller rotation or exclude the layer"
        )


def analyse_prepared(
    members: list[Member],
    statistics: InputStatistics | None,
    config: ARCConfig,
    sample: Tensor | None,
    prepared: Preparation,
    fisher: list[ChannelFisher] | None = None,
) -> GroupAnalysis:
    """Analyse what is left of the weights after a preparation."""
    amax = torch.stack([_prepared_amax(m, prepared, i) for i, m in enumerate(members)]).amax()
    saliency = statistics
    statistics = transformed_statistics(statistics, sample, prepared, config)
    order = mean_square = mean_error = act_amax = None
    if statistics is not None:
        order = statistics.order
        mean_square = in_order(statistics.mean_square, order)
        mean_error = in_order(statistics.mean_error, order)
        act_amax = in_order(statistics.amax, order)
    exact = fisher is not None and prepared.is_trivial  # by channel, of the input as it is
    weights = [
        analyse_weight(
            member.module.weight,
            amax,
            config,
            order,
            mean_square,
            prepared.of_member(index),
            fisher[index].output if exact else None,
        )
        for index, member in enumerate(members)
    ]
    ranked = act_amax
    if statistics is not None and config.smooth == "flatten":
        ranked = in_order(saliency.amax, order)  # flattening made all channels alike
    errors = None
    if exact:
        errors = fisher_errors(weights, fisher, order)
    elif statistics is not None:
        energies = output_energies(members, saliency.mean_square) if prepared.branches else None
        worths = None if fisher is None else worth_of_errors([m.module for m in members], fisher)
        errors = relative_errors(weights, mean_square, mean_error, energies, worths)
    scores = _scores(members, weights, errors, ranked)
    return GroupAnalysis(
        members, order, amax, weights, scores, mean_square, mean_error, act_amax, prepared
    )


def _prepared_amax(member: Member, prepared: Preparation, index: int) -> Tensor:
    """Largest magnitude (fp32 []) of what a preparation leaves of a weight."""
    amax = weight_amax(member)  # refuses NaN and Inf
    if prepared.is_trivial:
        return amax
    weight = member.module.weight.detach()
    chunks = nvfp4.row_chunks(weight, CHUNK_ELEMENTS)
    return torch.stack(
        [prepared.residual(weight, rows, index).abs().amax() for rows in chunks]
    ).amax()


def _output_error(analysis: GroupAnalysis, x: Tensor, config: ARCConfig) -> float:
    """Squared error of the linears' outputs on x, each relative to its output's energy, as if the
    budget were this group's alone."""
    plans = make_plans([analysis], config)
    total = 0.0
    for member in analysis.members:
        weight = member.module.weight.detach()
        exact = x.float() @ weight.float().t()
        quantized = quantize_weight(weight, plans[member.name])
        difference = torch.nn.functional.linear(x.to(weight.dtype), quantized).float() - exact
        energy = exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        total += (difference.square().sum() / energy).item()
    return total


def _scores(
    members: list[Member],
    weights: list[WeightAnalysis],
    errors: tuple[Tensor, Tensor] | None,
    act_amax: Tensor | None,
) -> GroupScores:
    """Removed errors per channel of a group; zeros where nothing was observed."""
    zeros = torch.zeros_like(weights[0].column_energy)
    act_score, weight_score = (zeros, zeros) if errors is None else errors
    return GroupScores(
        names=[member.name for member in members],
        out_features=sum(member.module.out_features for member in members),
        in_features=members[0].module.in_features,
        act_score=act_score,
        weight_score=weight_score,
        amax=zeros if act_amax is None else act_amax,
    )


def _static_amax(analysis: GroupAnalysis) -> Tensor:
    """Largest magnitude (fp32 [1]) of the calibrated input.

    Raises:
        ValueError: nothing but zeros, which a static scale would turn every input into.
    """
    amax = analysis.act_amax.amax().reshape(1)
    if not amax > 0:
        raise ValueError(
            f"{analysis.members[0].name}: expected calibration inputs other than zeros for "
            "activation_scale='static', found none; take 'token' or other data"
        )
    return amax


def plan_member(
    analysis: GroupAnalysis, index: int, selected: Selected, config: ARCConfig
) -> LayerPlan:
    """Plan of one linear of a group with chosen residuals, under a resolved config."""
    weight = analysis.weights[index]
    device = weight.scale.device

    def ids(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    act_outer_scale = None
    if config.activation_scale == "static":
        act_outer_scale = nvfp4.outer_scale(_static_amax(analysis))
    return LayerPlan(
        config=config,
        amax=analysis.amax,
        scale=weight.scale,
        act_blocks=ids(selected.act_blocks),
        weight_blocks=ids(selected.weight_blocks),
        channel_order=analysis.order,
        act_channels=ids(selected.act_channels) if selected.act_channels else None,
        act_outer_scale=act_outer_scale,
        mean_square=analysis.mean_square,
        mean_error=analysis.mean_error,
        prepared=analysis.prepared.of_member(index),
    )
