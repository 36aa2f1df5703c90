"""What calibration and search found, kept in a work folder and taken over from it."""

from typing import Any

import torch
from torch import Tensor
from torchao.core.config import config_from_dict, config_to_dict

from arc_ao.calibration.fisher import OutputFisher
from arc_ao.calibration.session import CalibrationSession, Member, observer_on
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.methods.recipe import Trial

FISHER_SUMS = ("token_square", "token_error", "output")


def save_sessions(
    work: WorkDir, sessions: list[CalibrationSession], trials: list[list[Trial]]
) -> None:
    """Keep the statistics, the Fisher information and the trials of calibrated sessions."""
    measured = [
        {
            "output_tokens": {name: f.count for name, f in (session.fisher or {}).items()},
            "calls": {
                name: [[len(call) for call in batch] for batch in f.tokens]
                for name, f in (session.fisher or {}).items()
            },
            "rows": {name: f.rows for name, f in (session.fisher or {}).items()},
            "trials": [(config_to_dict(t.config), t.divergence) for t in found],
        }
        for session, found in zip(sessions, trials, strict=True)
    ]
    tensors = {key: buffer for session in sessions for key, buffer in _buffers(session).items()}
    for session in sessions:
        for name, fisher in (session.fisher or {}).items():
            tensors |= _tensors_of(name, fisher)
    work.save_calibration(tensors, measured)


def load_sessions(work: WorkDir, sessions: list[CalibrationSession]) -> list[list[Trial]] | None:
    """Fill prepared sessions with what `save_sessions` kept; their trials, or None."""
    loaded = work.load_calibration()
    if loaded is None:
        return None
    tensors, measured = loaded
    for session, found in zip(sessions, measured, strict=True):
        for key, buffer in _buffers(session).items():
            if key in tensors:  # not of linears that no token reached
                buffer.copy_(tensors[key])
        session.fisher = {
            member.name: _fisher_of(member, tensors, found)
            for member in session.members
            if member.name in found["output_tokens"]
        } or None
    return [
        [Trial(config_from_dict(config), divergence) for config, divergence in found["trials"]]
        for found in measured
    ]


def _tensors_of(name: str, fisher: OutputFisher) -> dict[str, Tensor]:
    tensors = {f"{name}.{sums}": getattr(fisher, sums) for sums in FISHER_SUMS}
    if fisher.products is not None:
        tensors[f"{name}.products"] = fisher.products
    if fisher.tokens:
        tensors[f"{name}.tokens"] = torch.cat([call for batch in fisher.tokens for call in batch])
    return tensors


def _fisher_of(member: Member, tensors: dict[str, Tensor], found: dict[str, Any]) -> OutputFisher:
    """What was kept of a linear, on its device."""
    name, device = member.name, member.module.weight.device
    kept = lambda part: tensors[f"{name}.{part}"].to(device)
    fisher = OutputFisher(**{part: kept(part) for part in FISHER_SUMS})
    fisher.count, fisher.rows = found["output_tokens"][name], found["rows"][name]
    if f"{name}.products" in tensors:
        fisher.products = kept("products")
    if calls := found["calls"][name]:
        parts = iter(kept("tokens").split([rows for batch in calls for rows in batch]))
        fisher.tokens = [[next(parts) for _ in batch] for batch in calls]
    return fisher


def _buffers(session: CalibrationSession) -> dict[str, Tensor]:
    """Statistics of every linear by its name."""
    return {
        f"{member.name}.{name}": buffer
        for member in session.members
        for name, buffer in observer_on(member.module).named_buffers()
    }
