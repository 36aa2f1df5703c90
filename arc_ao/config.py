"""ARCConfig: what to quantize to, how much to spend on correction, and what to measure."""

import dataclasses
import enum
import math
from dataclasses import InitVar, dataclass
from typing import Any, Literal

from torchao.core.config import AOBaseConfig

from arc_ao.formats.nvfp4 import BLOCK_SIZE, BlockScale
from arc_ao.recipes import (
    CHOICES,
    EXPORTABLE,
    RECIPES,
    SAMPLE_TOKENS,
    SEARCHED_FIELDS,
    SEARCHING,
    WEIGHT_ONLY,
    Activation,
    Branch,
    ChannelOrder,
    Granularity,
    Hessian,
    LayerWeights,
    Recipe,
    Rounding,
    Selection,
    Smooth,
    Step,
    Tuning,
    WeightScale,
)


@dataclass
class ARCConfig(AOBaseConfig):
    """NVFP4 W4A4 with augmented residual channels (ARCQuant, arXiv 2601.07475).

    Fields left None are measured on the calibration data (`recipe="auto"`) or filled in by the
    named recipe.

    Args:
        budget: extra channels over in_features, model-wide and weighted by out_features; blocks of
            all layers compete for it. 0 is plain NVFP4. None, with selection "threshold": the
            paper's rule (channels with amax > 2^-3 of the layer's, rounded up to 64).
        recipe: "auto" (measure, with layers weighed by measured sensitivity), "best" (the same,
            weights rounded by GPTQ, and norms tuned), "tuned" (best, and codes tuned, too),
            "balanced" (no search, no reordering),
            "paper" (ARCQuant as published: sorted channels, activation residuals, amax scales),
            "plain" (NVFP4 with amax scales; the budget is 0 unless numbers of channels are given).
        selection: rank blocks by the output error they remove ("energy") or by amax ("threshold").
        channel_order: "none", or a per-layer sort of the channels at run time: "amax" by their
            largest magnitude (the paper's), "rms" by their root mean square.
        granularity: activation residuals of 16-channel blocks ("block", nothing extra stored) or
            of single channels gathered into blocks ("channel").
        exchange_rate: worth of removed weight error against removed activation error; 0 keeps
            activation residuals only, "inf" weight residuals only.
        num_act_channels, num_weight_channels: residual channels of each kind for every layer,
            instead of a budget; multiples of 16.
        weight_scale: block scales of weights: "amax", "mse" (searched, weighted by E[x^2]),
            "four_over_six", "local_hessian" (searched, weighted by the 16 x 16 diagonal blocks of
            E[x x^T]; which Hessian as for rounding "gptq").
        rounding: of weights: "nearest", or "gptq", which rounds column by column and lets later
            columns make up for the error (methods/gptq.py), wherever that leaves less error on
            tokens kept aside. The one call goes block by block, with Hessians of inputs from
            quantized predecessors; the three steps and the graph flow take those of the unquantized
            model (methods/hessian.py), 4 in_features^2 bytes and 1024 rows for every distinct input
            while it is under calibration.
        damping: what is added to the diagonal of GPTQ's Hessian, over the mean of that diagonal.
            None: by the number of tokens for each input channel, 0.1 to 1, or 0.02 where that
            leaves less error on tokens kept aside.
        hessian: what GPTQ goes by: "inputs" (E[x x^T]), or "kronecker" (Kronecker factors of the
            Fisher information: tokens weigh what their errors cost the model's output, and errors
            of correlated outputs make up for each other, as in YAQA, arXiv 2505.22988;
            methods/kronecker.py). The second takes a backward pass over all calibration data; the
            three steps and the graph flow have "inputs".
        layer_weights: the worth of removed error in each layer: "equal" (errors relative to the
            layer's output), or "fisher" (by what they cost the model's output, its diagonal Fisher
            information; one backward pass a batch, calibration/fisher.py).
        tuning: what is trained against the unquantized model's output once codes are found: "none",
            "norms" (the parameters of all norms, a few steps; norm tweaking, arXiv 2309.02784), or
            "codes" (norms and codes, for `tuning_minutes`). What ends no better on batches kept
            aside is taken back. The three steps and the graph flow train nothing (methods/tuning).
        activation_scale: outer scale of activations: "token" (one per row), "tensor", "static"
            (calibrated constant). "none" belongs to activation="bf16" and follows from it.
        activation_block_scale: block scales of activations, chosen at run time: "amax" (amax/6),
            "four_over_six" (amax/6 or amax/4), "mse" (searched around amax/6); the two choose by
            the block's squared error.
        four_over_six: the old spelling of `activation_block_scale`, for arguments alone: True is
            "four_over_six", False is "amax".
        smooth: channel scales moved from inputs to weights: "none", "flatten" (SERQ: inputs to amax
            1), "search" (SmoothQuant: by the layer's output error), "awq" (by the error of rounding
            the weight alone; the usual partner of activation="bf16").
        rotation: size of a block Hadamard rotation, 0 for none (formats/rotation.py).
        rank: of a 16-bit low-rank branch, 0 for none.
        branch: how it is found: "svd" (SVDQuant) or "arhq".
        branch_iterations: decompositions after the first that may be tried; 0 also leaves the
            branch out of the search of channel scales.
        tuning_minutes: of wall time that tuning="codes" takes at most.
        pad_in_features: pad in_features that are not a multiple of 16 instead of skipping the
            layer.
        activation: "nvfp4" quantizes activations (W4A4); "bf16" leaves them as they are (W4A16):
            the memory saving alone, with weight residuals only; budget=0 needs no calibration.
        exportable: keep to layers that engines without arc_ao can hold, so that
            `export_checkpoint` takes the model: channels in their own order, residuals of whole
            blocks, no channel scales, rotation, branch or padding, and one outer scale for linears
            that share an input, for which it needs calibration data.
        step: None (one call), or torchao's steps "prepare", "convert", "prepare_for_loading".

    Raises:
        ValueError: a field outside its choices, naming the field and the choices; both spellings
            of `activation_block_scale`, if they disagree.
    """

    budget: float | None = 0.06
    recipe: Recipe = "auto"
    selection: Selection | None = None
    channel_order: ChannelOrder | None = None
    granularity: Granularity | None = None
    exchange_rate: float | str | None = None
    num_act_channels: int | None = None
    num_weight_channels: int | None = None
    weight_scale: WeightScale | None = None
    activation_scale: Literal["token", "tensor", "static", "none"] | None = None
    activation_block_scale: BlockScale | None = None
    rounding: Rounding | None = None
    damping: float | None = None
    hessian: Hessian | None = None
    layer_weights: LayerWeights | None = None
    tuning: Tuning | None = None
    smooth: Smooth = "none"
    rotation: int = 0
    rank: int = 0
    branch: Branch = "svd"
    branch_iterations: int = 100
    tuning_minutes: float = 20.0
    pad_in_features: bool = False
    activation: Activation = "nvfp4"
    exportable: bool = False
    step: Step | None = None
    version: int = 1
    four_over_six: InitVar[bool | None] = None

    def __post_init__(self, four_over_six: bool | None) -> None:
        self._take_old_spelling(four_over_six)
        if self.layer_weights == "measured":  # by one forward a layer, in earlier checkpoints
            self.layer_weights = "fisher"
        if isinstance(self.step, enum.Enum):
            self.step = self.step.value  # torchao's QuantizationStep, which does not deserialise
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"ARCConfig.{field} must be one of {choices}, got {value!r}")
        if self.recipe == "plain" and not self.explicit:
            self.budget = 0.0
        if self.exchange_rate is not None:
            self.exchange_rate = _checked_rate(self.exchange_rate)
        self._check_activation()
        self._check_exportable()
        self._check_numbers()

    def _take_old_spelling(self, four_over_six: bool | None) -> None:
        if four_over_six is None:
            return
        if not isinstance(four_over_six, bool):
            raise ValueError(
                f"ARCConfig.four_over_six must be one of (True, False, None), got {four_over_six!r}"
            )
        method = block_scale_of(four_over_six)
        if self.activation_block_scale not in (None, method):
            raise ValueError(
                f"ARCConfig.four_over_six={four_over_six} is the old spelling of "
                f"activation_block_scale={method!r}, got "
                f"activation_block_scale={self.activation_block_scale!r}, too; give one of them"
            )
        self.activation_block_scale = method

    def _check_activation(self) -> None:
        """Settle what activation="bf16" settles; refuse what contradicts it."""
        if self.activation == "nvfp4":
            if self.activation_scale == "none":
                raise ValueError(
                    "ARCConfig.activation_scale='none' means activations that are not quantized; "
                    "say activation='bf16'"
                )
            return
        if self._recipe_value("selection") == "threshold" or self.selection == "threshold":
            raise ValueError(
                "ARCConfig.activation='bf16' keeps no activation residuals, which is all that "
                "selection='threshold' and recipe='paper' choose; expected selection='energy'"
            )
        if self.num_act_channels:
            raise ValueError(
                "ARCConfig.num_act_channels must be 0 or None with activation='bf16', which keeps "
                f"no activation residuals, got {self.num_act_channels}"
            )
        for field, value in WEIGHT_ONLY.items():
            if getattr(self, field) not in (None, value):
                raise ValueError(
                    f"ARCConfig.{field} must be {value!r} or None with activation='bf16', got "
                    f"{getattr(self, field)!r}"
                )
            setattr(self, field, value)

    def _check_exportable(self) -> None:
        """Settle what exportable=True settles; refuse what contradicts it."""
        if not self.exportable:
            return
        if self._recipe_value("channel_order") != "none":
            raise ValueError(
                f"ARCConfig.recipe={self.recipe!r} sorts channels, which exportable=True excludes; "
                "take recipe='auto', 'best', 'tuned', 'balanced' or 'plain'"
            )
        for field, value in EXPORTABLE.items():
            if getattr(self, field) not in (None, value):
                raise ValueError(
                    f"ARCConfig.{field} must be {value!r} or None with exportable=True, got "
                    f"{getattr(self, field)!r}; other engines hold no such layer"
                )
            setattr(self, field, value)

    def _check_numbers(self) -> None:
        if self.budget is None:
            if "threshold" not in (self.selection, self._recipe_value("selection")):
                raise ValueError(
                    "ARCConfig.budget=None is the paper's rule and needs selection='threshold'; "
                    "give a budget such as 0.06 otherwise"
                )
        elif not (isinstance(self.budget, (int, float)) and 0 <= self.budget <= 2):
            raise ValueError(
                f"ARCConfig.budget is extra channels over in_features, expected 0 to 2 (0.06 is "
                f"6 %), got {self.budget!r}"
            )
        for field in ("rank", "branch_iterations"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"ARCConfig.{field} must be a number >= 0, got {value!r}")
        damping = self.damping
        if damping is not None and not (isinstance(damping, (int, float)) and 0 < damping <= 10):
            raise ValueError(
                f"ARCConfig.damping is relative to the Hessian's mean diagonal, expected None, or "
                f"more than 0 and at most 10, got {damping!r}"
            )
        if not (isinstance(self.tuning_minutes, (int, float)) and self.tuning_minutes > 0):
            raise ValueError(
                f"ARCConfig.tuning_minutes must be more than 0, got {self.tuning_minutes!r}"
            )
        for field in ("num_act_channels", "num_weight_channels"):
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, int) or value < 0 or value % BLOCK_SIZE:
                raise ValueError(
                    f"ARCConfig.{field} must be a non-negative multiple of {BLOCK_SIZE}, got "
                    f"{value!r}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Fields only: a copy or pickle of a config must not carry the model under calibration."""
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def _recipe_value(self, field: str) -> Any:
        return RECIPES[self.recipe][field]

    @property
    def explicit(self) -> bool:
        """True where the numbers of residual channels are given instead of a budget."""
        return self.num_act_channels is not None or self.num_weight_channels is not None

    @property
    def has_residuals(self) -> bool:
        """True where any layer may get residual channels."""
        if self.explicit:
            return bool(self.num_act_channels or self.num_weight_channels)
        return self.budget is None or self.budget > 0

    @property
    def searched(self) -> list[str]:
        """Fields that `recipe="auto"` measures: the None ones that make a difference."""
        if self.recipe not in SEARCHING or not self.has_residuals:
            return []
        by_energy = self.selection != "threshold"
        matters = {
            "granularity": by_energy and not (self.explicit and not self.num_act_channels),
            "exchange_rate": by_energy and not self.explicit,
        }
        return [
            field
            for field in SEARCHED_FIELDS
            if getattr(self, field) is None and matters.get(field, True)
        ]

    @property
    def mixes(self) -> bool:
        """True where layers get methods of their own (config_budget.py)."""
        return False

    @property
    def tunes_codes(self) -> bool:
        """True where codes are trained after they were found."""
        return self.resolve().tuning == "codes"

    @property
    def weighs_layers(self) -> bool:
        """True where layers' weights are measured: blocks of all layers compete."""
        competing = self.has_residuals and not self.explicit
        return competing and self.resolve().layer_weights == "fisher"

    @property
    def kronecker(self) -> bool:
        """True where weights are rounded by Kronecker factors of the Fisher information."""
        resolved = self.resolve()
        return resolved.rounding == "gptq" and resolved.hessian == "kronecker"

    @property
    def needs_calibration(self) -> bool:
        """False where only weights matter: no residuals, nothing to measure, dynamic scales."""
        resolved = self.resolve()
        static = resolved.activation_scale == "static"
        is_sorted = resolved.channel_order != "none"
        transformed = self.smooth != "none" or self.rank > 0
        if self.exportable:  # tells which linears share an input, and so an outer scale
            return True
        if resolved.tuning != "none":
            return True
        return self.has_residuals or static or is_sorted or transformed or self.needs_hessian

    @property
    def sample_tokens(self) -> int:
        """Input rows that calibration keeps of every layer."""
        return SAMPLE_TOKENS if self.rank or self.rotation or self.smooth != "none" else 0

    @property
    def needs_hessian(self) -> bool:
        """True where weights need E[x x^T] of their inputs."""
        resolved = self.resolve()
        return resolved.rounding == "gptq" or resolved.weight_scale == "local_hessian"

    def resolve(self, **measured: Any) -> "ARCConfig":
        """Copy without None fields: `measured` values first, then the recipe's."""
        fields = RECIPES[self.recipe]
        values = {
            name: measured.get(name, default)
            for name, default in fields.items()
            if getattr(self, name) is None
        }
        return dataclasses.replace(self, **values)

    def with_step(self, step: Step | None) -> "ARCConfig":
        """Copy for one of torchao's steps."""
        return dataclasses.replace(self, step=step)


def block_scale_of(four_over_six: bool) -> BlockScale:
    """What `four_over_six`, in checkpoints before `activation_block_scale`, stands for."""
    return "four_over_six" if four_over_six else "amax"


def _checked_rate(rate: float | str) -> float | str:
    """Exchange rate as a float, or "inf", which JSON can hold."""
    try:
        value = float(rate)
    except (TypeError, ValueError):
        value = math.nan
    if not value >= 0:
        raise ValueError(f"ARCConfig.exchange_rate must be >= 0 or 'inf', got {rate!r}")
    return "inf" if math.isinf(value) else value
