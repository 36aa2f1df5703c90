"""What recipe "tuned" adds to one call of `quantize_`: before anything changes, and at the end."""

import os
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.config import ARCConfig
from arc_ao.eval.divergence import NotComparableError
from arc_ao.eval.reference import Reference, record_references
from arc_ao.methods.tuning.parameters import bytes_per_weight
from arc_ao.methods.tuning.tune import TuningRecord, split, tune
from arc_ao.progress import Progress
from arc_ao.tensor import ARCTensor


@dataclass
class TuningSession:
    """The linears to train, and what is kept of the unquantized model: its weights until training
    begins (they say where latents start) and its outputs."""

    linears: dict[str, nn.Linear]
    batches: list[Batch | Tensor]
    minutes: float
    originals: dict[str, Tensor] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)

    def record(self, model: nn.Module, changing: set[nn.Module], progress: Progress) -> None:
        """Run the unquantized model; `changing` are all modules that will be quantized.

        Warns where its output cannot be compared, and nothing will be trained.
        """
        try:
            self.references = record_references(model, self.batches, changing, progress=progress)
        except NotComparableError as error:
            warnings.warn(f"recipe='tuned' trains nothing: {error}", stacklevel=3)
            return
        self.originals = {name: m.weight.detach() for name, m in self.linears.items()}

    def run(
        self, model: nn.Module, work: WorkDir | None, progress: Progress
    ) -> TuningRecord | None:
        """Train, where there is an output to train for; linears that a budget left as they are stay
        so."""
        if not self.references:
            return None
        quantized = [n for n, m in self.linears.items() if isinstance(m.weight, ARCTensor)]
        return tune(
            model,
            quantized,
            self.batches,
            self.references,
            originals=self.originals,
            minutes=self.minutes,
            work=work,
            progress=progress,
        )


def tuning_session(
    groups: list[tuple[ARCConfig, dict[str, nn.Linear]]], batches: list[Batch | Tensor] | None
) -> TuningSession | None:
    """Session of the linears whose config tunes, or None; the longest of their minutes counts.

    Raises:
        ValueError: too few batches, or less free memory than training takes.
    """
    linears: dict[str, nn.Linear] = {}
    for config, modules in groups:
        if config.tunes:
            linears |= modules
    if not linears:
        return None
    split(len(batches or []))
    _check_memory(list(linears.values()))
    minutes = max(config.tuning_minutes for config, _ in groups if config.tunes)
    return TuningSession(linears, batches, minutes)


def _check_memory(linears: list[nn.Linear]) -> None:
    weights = sum(linear.weight.numel() for linear in linears)
    device, each = linears[0].weight.device, bytes_per_weight(linears[0].weight.dtype)
    needed, free = weights * each, _free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"recipe='tuned': expected {needed / 1e9:.1f} GB of free memory on {device} to train "
            f"{weights / 1e6:.0f} million weights ({each:.1f} bytes each), found "
            f"{free / 1e9:.1f} GB; take recipe='best', or a machine with more memory"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024
