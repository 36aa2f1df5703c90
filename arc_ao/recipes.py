"""What every recipe stands for, the choices of every field, and their types."""

from typing import Any, Literal

from arc_ao.formats.nvfp4 import BLOCK_SCALES

ChannelOrder = Literal["none", "amax", "rms"]
Granularity = Literal["block", "channel"]
Selection = Literal["energy", "threshold"]
Smooth = Literal["none", "flatten", "search", "awq"]
Branch = Literal["svd", "arhq"]
Recipe = Literal["auto", "best", "tuned", "balanced", "paper", "plain"]
WeightScale = Literal["amax", "mse", "four_over_six", "local_hessian"]
Rounding = Literal["nearest", "gptq"]
LayerWeights = Literal["equal", "fisher"]
Hessian = Literal["inputs", "kronecker"]
Tuning = Literal["none", "norms", "codes"]
Step = Literal["prepare", "convert", "prepare_for_loading"]
Activation = Literal["nvfp4", "bf16"]

# What a recipe fills in where the user left a field None. "auto" and "best" measure SEARCHED_FIELDS
# and the layers' weights on the calibration data; where that is impossible (the three steps, the
# graph flow) they take those of "balanced".
RECIPES: dict[str, dict[str, Any]] = {
    "balanced": {
        "selection": "energy",
        "channel_order": "none",
        "granularity": "block",
        "exchange_rate": 1.0,
        "activation_block_scale": "amax",
        "weight_scale": "mse",
        "activation_scale": "token",
        "rounding": "nearest",
        "hessian": "inputs",
        "layer_weights": "equal",
        "tuning": "none",
    },
    "paper": {
        "selection": "threshold",
        "channel_order": "amax",
        "granularity": "block",
        "exchange_rate": 0.0,
        "activation_block_scale": "amax",
        "weight_scale": "amax",
        "activation_scale": "tensor",
        "rounding": "nearest",
        "hessian": "inputs",
        "layer_weights": "equal",
        "tuning": "none",
    },
    "plain": {
        "selection": "energy",
        "channel_order": "none",
        "granularity": "block",
        "exchange_rate": 1.0,
        "activation_block_scale": "amax",
        "weight_scale": "amax",
        "activation_scale": "token",
        "rounding": "nearest",
        "hessian": "inputs",
        "layer_weights": "equal",
        "tuning": "none",
    },
}
SAMPLE_TOKENS = 2048  # input rows kept a layer where means over single channels do not suffice
RECIPES["auto"] = RECIPES["balanced"] | {"layer_weights": "fisher"}
RECIPES["best"] = RECIPES["auto"] | {"rounding": "gptq", "hessian": "kronecker", "tuning": "norms"}
RECIPES["tuned"] = RECIPES["best"] | {"tuning": "codes"}
SEARCHING = ("auto", "best", "tuned")
SEARCHED_FIELDS = ("channel_order", "granularity", "exchange_rate", "activation_block_scale")
# What activation="bf16" leaves of the choices: only weights have residuals, in their own order.
WEIGHT_ONLY: dict[str, Any] = {
    "channel_order": "none",
    "granularity": "block",
    "exchange_rate": "inf",
    "activation_scale": "none",
    "activation_block_scale": "amax",
    "rotation": 0,
    "rank": 0,
}
# What exportable=True leaves: layers that engines without arc_ao can hold (checkpoints/).
EXPORTABLE: dict[str, Any] = {
    "channel_order": "none",
    "granularity": "block",
    "smooth": "none",
    "rotation": 0,
    "rank": 0,
    "pad_in_features": False,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": ("nvfp4", "bf16"),
    "recipe": tuple(RECIPES),
    "selection": ("energy", "threshold", None),
    "channel_order": ("none", "amax", "rms", None),
    "granularity": ("block", "channel", None),
    "weight_scale": ("amax", "mse", "four_over_six", "local_hessian", None),
    "rounding": ("nearest", "gptq", None),
    "hessian": ("inputs", "kronecker", None),
    "layer_weights": ("equal", "fisher", None),
    "tuning": ("none", "norms", "codes", None),
    "activation_scale": ("token", "tensor", "static", "none", None),
    "activation_block_scale": (*BLOCK_SCALES, None),
    "smooth": ("none", "flatten", "search", "awq"),
    "rotation": (0, 16, 32, 64, 128),
    "branch": ("svd", "arhq"),
    "pad_in_features": (True, False),
    "exportable": (True, False),
    "step": ("prepare", "convert", "prepare_for_loading", None),
}
