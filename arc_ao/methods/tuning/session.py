"""What training adds to one call of `quantize_`: before anything changes, and at the end."""

import math
import os
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from arc_ao.blocks import find_blocks
from arc_ao.calibration.data import Batch, num_tokens
from arc_ao.calibration.reference import Reference, record_references
from arc_ao.calibration.work_dir import WorkDir
from arc_ao.config import ARCConfig
from arc_ao.methods.tuning.parameters import bytes_per_weight, norm_parameters
from arc_ao.methods.tuning.record import TuningRecord
from arc_ao.methods.tuning.tune import KEPT_ASIDE, split, tune
from arc_ao.outputs.divergence import NotComparableError
from arc_ao.progress import Progress
from arc_ao.tensor import ARCTensor

# Where norms alone are tuned. SmolLM2-135M from "best", 30 steps of 512 tokens: KL on tokens kept
# aside .1129 -> .1079, WikiText-2 .1195 -> .1191, books .1047 -> .1033.
NORM_STEPS = 32
LEAST_NORM_STEPS = 8
NORM_TOKENS = 16_384  # in all steps, where that leaves LEAST_NORM_STEPS
NORM_EVALUATIONS = 3


@dataclass
class TuningSession:
    """What to train, and what is kept of the unquantized model: its outputs and, until training
    begins, the weights whose codes are trained (they say where latents start).

    Attributes:
        linears: all that are quantized by a config that tunes.
        codes: names of those whose codes are trained; none: norms alone.
        minutes, steps: at most; steps None: by the time alone.
    """

    linears: dict[str, nn.Linear]
    codes: list[str]
    batches: list[Batch | Tensor]
    minutes: float
    steps: int | None
    originals: dict[str, Tensor] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)

    def record(self, model: nn.Module, changing: set[nn.Module], progress: Progress) -> None:
        """Run the unquantized model; `changing` are all modules that will be quantized.

        Warns where its output cannot be compared, and nothing will be trained.
        """
        try:
            self.references = record_references(model, self.batches, changing, progress=progress)
        except NotComparableError as error:
            _warn_of_untrained(str(error))
            return
        self.originals = {name: self.linears[name].weight.detach() for name in self.codes}

    def run(
        self, model: nn.Module, work: WorkDir | None, progress: Progress
    ) -> TuningRecord | None:
        """Train, where there is an output to train for; linears that a budget left as they are stay
        so. Warns where a model whose norms alone would be trained cannot be differentiated."""
        if not self.references:
            return None
        quantized = [n for n in self.codes if isinstance(self.linears[n].weight, ARCTensor)]
        run = lambda **options: tune(
            model,
            quantized,
            self.batches,
            self.references,
            originals=self.originals,
            minutes=self.minutes,
            work=work,
            progress=progress,
            **options,
        )
        if self.codes:
            return run()
        blocks = find_blocks(model, list(self.linears.values()))
        try:
            return run(max_steps=self.steps, evaluations=NORM_EVALUATIONS, blocks=blocks)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return _warn_of_untrained(f"the model cannot be differentiated ({error})")


def _warn_of_untrained(reason: str) -> None:
    warnings.warn(
        f"nothing is tuned: {reason}. ARCConfig(tuning='none') asks for that without this warning",
        stacklevel=4,
    )


def tuning_session(
    model: nn.Module,
    groups: list[tuple[ARCConfig, dict[str, nn.Linear]]],
    batches: list[Batch | Tensor] | None,
) -> TuningSession | None:
    """Session of the linears whose config tunes, or None where there is nothing to train.

    The longest of their minutes counts. Where norms alone are trained, warns of too few batches.

    Raises:
        ValueError: too few batches to train codes, or less free memory than that takes.
    """
    linears: dict[str, nn.Linear] = {}
    codes: dict[str, nn.Linear] = {}
    minutes, batches = 0.0, batches or []
    for config, modules in groups:
        if config.resolve().tuning != "none":
            linears |= modules
        if config.tunes_codes:
            codes |= modules
            minutes = max(minutes, config.tuning_minutes)
    if codes:
        split(len(batches))
        _check_memory(list(codes.values()))
        return TuningSession(linears, list(codes), batches, minutes, None)
    if not linears or not norm_parameters(model):
        return None
    if len(batches) < 2:
        return _warn_of_untrained(
            "norms need at least 2 batches of calibration data, one of them to keep aside, found "
            f"{len(batches)}"
        )
    steps = norm_steps(batches)
    return TuningSession(linears, [], some_batches(batches, steps), math.inf, steps)


def norm_steps(batches: list[Batch | Tensor]) -> int:
    """How many steps of one batch norms are trained for."""
    mean = sum(map(num_tokens, batches)) / len(batches)
    return int(max(LEAST_NORM_STEPS, min(NORM_STEPS, NORM_TOKENS // max(1.0, mean))))


def some_batches(batches: list[Batch | Tensor], steps: int) -> list[Batch | Tensor]:
    """Those that `steps` steps need, and some to keep aside, evenly spread."""
    count = min(len(batches), math.ceil(steps / (1 - KEPT_ASIDE)))
    return [batches[i * len(batches) // count] for i in range(count)]


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
