"""BudgetConfig: every layer's method chosen by measured output error, under model-wide bounds."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from arc_ao.config import ARCConfig
from arc_ao.recipes import SAMPLE_TOKENS, LayerWeights, Recipe

Method = Literal["residual", "rank", "smooth", "exclude"]
METHODS: tuple[Method, ...] = ("residual", "rank", "smooth", "exclude")
RANKS = (16, 32, 64)
SETTLED = ("smooth", "rotation", "rank", "num_act_channels", "num_weight_channels")


@dataclass
class BudgetConfig(ARCConfig):
    """NVFP4 with what helps each layer most, under one budget of bits and one of multiply-adds.

    For the linears behind every input, the output error of each way to quantize them is measured on
    calibration rows: plain, residuals of some activation and weight blocks, a low-rank branch,
    channel scales, or not at all. The mix of least error within both bounds, errors weighed by what
    the model's output suffers from them, competes end to end with uniform choices, and the best
    measured wins. Needs one call with calibration data; of the model it keeps one quantized copy
    while mixes are compared.

    Fields that ARCConfig leaves to a recipe and that are None here (channel_order,
    activation_block_scale) are chosen for each layer, too. rounding="gptq" measures errors after
    GPTQ's rounding.

    Args:
        extra_bits: stored bits per weight over plain NVFP4's 4.5, over all linears of this config,
            those that stay unquantized included (in bf16 they cost 11.5).
        budget: multiply-adds over those of the plain products: residual channels, low-rank
            branches and channel scales.
        methods: which of "residual", "rank", "smooth" and "exclude" may be chosen beside plain.

    Raises:
        ValueError: a field outside its choices, or one that the search settles, naming it.
    """

    budget: float | None = 0.10
    recipe: Recipe = "balanced"
    layer_weights: LayerWeights | None = "fisher"
    extra_bits: float = 0.25
    methods: list[Method] = dataclasses.field(default_factory=lambda: list(METHODS))

    def __post_init__(self, four_over_six: bool | None) -> None:
        super().__post_init__(four_over_six)
        self.methods = list(self.methods)  # torchao stores lists
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(
                f"BudgetConfig.methods: expected some of {METHODS}, got {unknown[0]!r}"
            )
        if not (isinstance(self.extra_bits, (int, float)) and 0 <= self.extra_bits <= 28):
            raise ValueError(
                "BudgetConfig.extra_bits is bits per weight over NVFP4's 4.5, expected 0 to 28, "
                f"got {self.extra_bits!r}"
            )
        self._refuse_settled()

    def _refuse_settled(self) -> None:
        if self.exportable and self.methods != ["residual"]:
            raise ValueError(
                f"BudgetConfig.methods must be ['residual'] with exportable=True, got "
                f"{self.methods}; other engines hold none of the others"
            )
        for field in SETTLED:
            if getattr(self, field) not in (0, None, "none"):
                raise ValueError(
                    f"BudgetConfig.{field} is chosen for each layer, got {getattr(self, field)!r}; "
                    "leave it out, or take ARCConfig"
                )
        expected = {"activation": "nvfp4", "selection": "energy", "granularity": "block"}
        for field, value in expected.items():
            if getattr(self, field) not in (None, value):
                raise ValueError(
                    f"BudgetConfig.{field}: expected {value!r}, got {getattr(self, field)!r}; "
                    "take ARCConfig for the others"
                )
        if self.budget is None or self.recipe in ("paper", "plain"):
            raise ValueError(
                "BudgetConfig expects a budget of multiply-adds and recipe='balanced' or 'best', "
                f"got budget={self.budget!r}, recipe={self.recipe!r}"
            )

    @property
    def searched(self) -> list[str]:
        """Nothing that one recipe for all layers would measure."""
        return []

    @property
    def mixes(self) -> bool:
        """True: layers get methods of their own."""
        return True

    @property
    def weighs_layers(self) -> bool:
        """Whether errors are weighed by what the model's output suffers from them."""
        return self.resolve().layer_weights == "fisher"

    @property
    def needs_calibration(self) -> bool:
        """Choices are measured."""
        return True

    @property
    def sample_tokens(self) -> int:
        """Input rows of every layer that errors are measured on."""
        return SAMPLE_TOKENS

    def variants(self) -> list[ARCConfig]:
        """Resolved configs of one layer that differ by channel order and activation scales."""
        orders = ("none", "amax") if self.channel_order is None else (self.channel_order,)
        given = self.activation_block_scale
        methods = ("amax", "mse") if given is None else (given,)
        base = self._of_layer()
        return [
            dataclasses.replace(base, channel_order=order, activation_block_scale=method)
            for order in orders
            for method in methods
        ]

    def _of_layer(self) -> ARCConfig:
        """The resolved config of a single layer, without bounds."""
        resolved = self.resolve()
        own = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(ARCConfig)}
        return ARCConfig(**own | {"budget": 0.0, "step": None})
