"""What quantize_ did: the config it settled on, candidates tried, layers, bytes."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torchao.core.config import config_to_dict

from arc_ao.calibration.few_tokens import RoundingNote
from arc_ao.config import ARCConfig
from arc_ao.cost import PLAIN_BITS, extra_cost
from arc_ao.methods.tuning.record import TuningRecord
from arc_ao.tensor import ARCTensor

if TYPE_CHECKING:  # reads, by way of plans and the Fisher information, what a model is
    from arc_ao.methods.recipe import Trial

SUMMARY = "_arc_summary"  # attribute of a quantized model
SOURCE = "_arc_source"  # attribute of a model whose weights were quantized before: what they were
EXCLUDED = "left unquantized by the budget search"


@dataclass
class QuantizationSummary:
    """One call of `quantize_`.

    Attributes:
        configs: the configs that were applied, every field resolved.
        trials: candidates measured per config, the winner first.
        layers: fully qualified name -> residual channels of each kind, bits per weight, and how it
            was rounded (with GPTQ also damping and tokens; see calibration/few_tokens.py).
        skipped: linears left alone and why.
        bytes_before, bytes_after: parameters and buffers of the whole model.
        extra_channels: augmented columns over in_features, weighted by out_features.
        bits_per_weight: stored bits over the weights of the quantized linears.
        extra_multiply_adds: of residuals, low-rank branches and input transforms, over those of the
            plain products (cost.py).
        choices: under a BudgetConfig, fully qualified name -> what was chosen for the linear, its
            bits per weight, and the measured error of the linears behind its input.
        extra_bits: per weight over plain NVFP4's 4.5, linears that the budget left as they are
            included, as in extra_channels and extra_multiply_adds.
        seconds: that every stage took, by the clock.
        source: what had quantized the weights before, and to what; "" if nothing is known to.
        tuning: under recipe "tuned", what training did (methods/tuning/record.py).
    """

    configs: list[dict[str, Any]]
    trials: list[list[dict[str, Any]]]
    layers: dict[str, dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    extra_channels: float = 0.0
    bits_per_weight: float = 0.0
    extra_multiply_adds: float = 0.0
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra_bits: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    source: str = ""
    tuning: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable dictionary."""
        return asdict(self)

    def describe_choices(self) -> str:
        """One line for each linear of a BudgetConfig: its choice, bits per weight and error."""
        lines = []
        for name, choice in self.choices.items():
            numbers = {
                "act blocks": choice.get("act_blocks"),
                "weight blocks": choice.get("weight_blocks"),
                "rank": choice.get("rank"),
            }
            kept = ", ".join(f"{value} {label}" for label, value in numbers.items() if value)
            what = f"{choice['choice']}{f' ({kept})' if kept else ''}"
            bits, error = choice["bits_per_weight"], choice["error"]
            lines.append(f"{name}: {what}, {bits:.2f} bits per weight, error {error:.2e}")
        return "\n".join(lines)

    def __str__(self) -> str:
        tuned = f"; {TuningRecord(**self.tuning)}" if self.tuning else ""
        return (
            f"{len(self.layers)} linears quantized, {len(self.skipped)} left alone; "
            f"{self.extra_channels:.1%} extra channels, "
            f"{self.extra_multiply_adds:.1%} extra multiply-adds, "
            f"{self.bits_per_weight:.2f} bits per weight; "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB{tuned}"
            + (f"; {self.source}" if self.source else "")
        )


def summarize(
    model: nn.Module,
    resolved: list[tuple[ARCConfig, list["Trial"]]],
    skipped: dict[str, str],
    bytes_before: int,
    choices: dict[str, dict[str, Any]] | None = None,
    notes: dict[str, RoundingNote] | None = None,
    seconds: dict[str, float] | None = None,
    tuned: TuningRecord | None = None,
) -> QuantizationSummary:
    """Summary of a quantized model, also kept on it for `save_pretrained`."""
    tensors, choices, notes = arc_tensors(model), choices or {}, notes or {}
    weights = sum(t.shape[0] * t.in_features for t in tensors.values())
    left = [model.get_submodule(name).weight for name in choices if name not in tensors]
    skipped = skipped | dict.fromkeys(choices.keys() - tensors.keys(), EXCLUDED)
    stored = sum(t.nbytes_stored for t in tensors.values())
    total = weights + sum(weight.numel() for weight in left)
    summary = QuantizationSummary(
        configs=[config_to_dict(config.with_step(None)) for config, _ in resolved],
        trials=[[trial.to_dict() for trial in trials] for _, trials in resolved],
        layers={name: _layer(tensor, notes.get(name)) for name, tensor in tensors.items()},
        skipped=skipped,
        bytes_before=bytes_before,
        bytes_after=model_bytes(model),
        extra_channels=sum(t.shape[0] * t.extra_channels for t in tensors.values()) / max(1, total),
        bits_per_weight=8 * stored / max(1, weights),
        extra_multiply_adds=extra_cost(tensors.values()).multiply_adds_per_token / max(1, total),
        choices=choices,
        extra_bits=8 * (stored + sum(weight.nbytes for weight in left)) / max(1, total)
        - PLAIN_BITS,
        seconds=seconds or {},
        source=getattr(model, SOURCE, ""),
        tuning=None if tuned is None else asdict(tuned),
    )
    setattr(model, SUMMARY, summary.to_dict())
    return summary


def arc_tensors(model: nn.Module) -> dict[str, ARCTensor]:
    """Quantized weights by the fully qualified name of their linear."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, ARCTensor)
    }


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once, ARCTensors by their inner tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes_stored if isinstance(t, ARCTensor) else t.nbytes for t in tensors.values())


def _layer(tensor: ARCTensor, note: RoundingNote | None) -> dict[str, Any]:
    rounding = {"rounding": "nearest"}
    if note is not None and note.damping is not None:
        rounding = {key: getattr(note, key) for key in ("rounding", "damping", "tokens")}
    return rounding | {
        "shape": list(tensor.shape),
        "act_channels": tensor.num_act_channels,
        "weight_channels": tensor.num_weight_channels,
        "rank": tensor.rank,
        "bits_per_weight": tensor.bits_per_weight,
    }
