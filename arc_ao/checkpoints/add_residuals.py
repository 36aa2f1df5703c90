"""Residual blocks for a model that another library quantized: they read the base's codes again.

The unquantized weights are gone, so that only activations have residuals, and nothing is stored but
the ids of their blocks. The base stays what it was, bit for bit.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.calibration.data import observe, to_batches
from arc_ao.calibration.observer import InputStatistics
from arc_ao.calibration.session import CalibrationSession, Member
from arc_ao.checkpoints.layer import join, split
from arc_ao.config import ARCConfig
from arc_ao.formats import nvfp4
from arc_ao.methods.scores import relative_errors
from arc_ao.methods.select import GroupScores, select
from arc_ao.methods.weights import CHUNK_ELEMENTS, WeightAnalysis, in_order
from arc_ao.progress import Progress
from arc_ao.quantized_linear import set_weight
from arc_ao.summary import QuantizationSummary, arc_tensors, model_bytes, summarize
from arc_ao.tensor import ARCTensor


def add_residuals_(
    model: nn.Module,
    calibration_data: Iterable[Any],
    *,
    budget: float = 0.06,
    tokenizer: Any = None,
    max_length: int = 512,
    progress: bool = True,
) -> QuantizationSummary:
    """Give the linears of an imported model activation residual blocks, in place.

    Args:
        model: of `import_checkpoint`; linears in W4A16 stay as they are.
        calibration_data: as `quantize_` takes it.
        budget: extra channels over in_features, for which blocks of all layers compete.

    Raises:
        ValueError: nothing that could have them, layers that have residuals or transforms already,
            or that calibration does not reach, naming one.
    """
    config = ARCConfig(budget=budget, recipe="balanced", exchange_rate=0.0)
    tensors = {name: t for name, t in arc_tensors(model).items() if t.quantizes_input}
    _refuse(tensors)
    before, batches = model_bytes(model), to_batches(calibration_data, tokenizer, max_length)
    session = CalibrationSession(config, sums_products=False)
    for name in tensors:
        session.attach(name, model.get_submodule(name))
    bar = Progress({"calibrate": 1.0}, show=progress)
    try:
        observe(model, batches, bar)
        groups = session.groups()
        statistics = [session.observer_of(group).statistics() for group in groups]
    finally:
        session.detach()
        bar.close()
    scores = [_scores(g, s, tensors) for g, s in zip(groups, statistics, strict=True)]
    for group, chosen in zip(groups, select(scores, config.resolve()), strict=True):
        blocks = torch.tensor(chosen.act_blocks, dtype=torch.int32)
        for member in group:
            weight = _with_blocks(member.name, tensors[member.name], blocks)
            set_weight(member.module, weight)
    return summarize(model, [(config.resolve(), [])], {}, before)


def _refuse(tensors: dict[str, ARCTensor]) -> None:
    if not tensors:
        raise ValueError(
            "add_residuals_: expected linears in W4A4, found none; without quantized activations "
            "there is no residual"
        )
    for name, tensor in tensors.items():
        if tensor.extra_channels or tensor.channel_order is not None or tensor.rank:
            raise ValueError(
                f"{name}: expected a plain NVFP4 weight, found {tensor!r}; quantize the original "
                "model with another budget instead"
            )


def _scores(
    group: list[Member], statistics: InputStatistics, tensors: dict[str, ARCTensor]
) -> GroupScores:
    """Relative output error that residuals of each channel of an input remove."""
    analyses = [_analysis(tensors[member.name]) for member in group]
    square, error = (
        in_order(value, None) for value in (statistics.mean_square, statistics.mean_error)
    )
    act, weight = relative_errors(analyses, square, error)
    return GroupScores(
        names=[member.name for member in group],
        out_features=sum(member.module.out_features for member in group),
        in_features=group[0].module.in_features,
        act_score=act,
        weight_score=weight,
        amax=in_order(statistics.amax, None),
    )


def _analysis(tensor: ARCTensor) -> WeightAnalysis:
    """Energy of the base's columns; errors are unknown, and count as none."""
    layer, _ = split(tensor, None)
    energy = torch.zeros(layer.shape[1])
    for rows in nvfp4.row_chunks(layer.qdata, CHUNK_ELEMENTS):
        values = nvfp4.dequantize(layer.qdata[rows], layer.scale[rows], layer.outer_scale)
        energy += values.square().sum(0)
    return WeightAnalysis(layer.scale, energy, torch.zeros_like(energy))


def _with_blocks(name: str, tensor: ARCTensor, blocks: Tensor) -> ARCTensor:
    layer, extras = split(tensor, tensor.act_outer_scale)
    extras = replace(extras, act_blocks=blocks)
    return join(name, layer, extras, tensor.orig_dtype).packed()
