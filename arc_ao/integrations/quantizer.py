"""transformers' quantization method "arc_ao": our quantizer, on torchao's safetensors form.

`import arc_ao` registers it (registration.py). Without that transformers only warns "Unknown
quantization type, got arc_ao" and leaves the linears randomly initialised: there is no plug-in
entry point that could do better. Hence the name of the method, and the hint in config.json.
"""

from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import FqnToConfig
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from arc_ao.checks_on_load import REMEDY
from arc_ao.integrations.checkpoint import (
    OWN_NAMES,
    PREFIX,
    ArcWeightConverter,
    Checkpoint,
    check_complete,
)
from arc_ao.integrations.stored_config import config_from, described
from arc_ao.loading import loading_config, pack_weights_
from arc_ao.requantize import RequantizeConfig
from arc_ao.summary import arc_tensors
from arc_ao.tensor import TRANSFORM_TENSORS, ARCTensor

METHOD = "arc_ao"
HINT = "run `import arc_ao` before from_pretrained; otherwise these weights are skipped"


class ArcHfConfig(TorchAoConfig):
    """transformers' quantization config of an arc_ao checkpoint.

    Args:
        quant_type: FqnToConfig of `prepare_for_loading` configs (a checkpoint), or an ARCConfig
            that needs no calibration (quantization on the fly in from_pretrained).
    """

    def __init__(self, quant_type: AOBaseConfig, **kwargs: Any) -> None:
        kwargs.pop("hint", None)
        super().__init__(quant_type, **kwargs)
        self.quant_method = METHOD

    def get_apply_tensor_subclass(self) -> AOBaseConfig:
        """What torchao's `quantize_` is to do to a linear: of a model that is quantized already,
        one whose weight was dequantized and changed, as PEFT does to merge an adapter."""
        layers = getattr(self.quant_type, "fqn_to_config", {})
        if any(getattr(c, "step", None) == "prepare_for_loading" for c in layers.values()):
            return RequantizeConfig()
        return super().get_apply_tensor_subclass()

    def to_dict(self) -> dict[str, Any]:
        """Dictionary for config.json, with a hint for readers that lack arc_ao. What a layer's
        config has by default is left out."""
        return vars(self) | {"quant_type": {"default": described(self.quant_type)}, "hint": HINT}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ArcHfConfig":
        """Config from config.json.

        Raises:
            ValueError: it names something else than classes of configs and their fields.
        """
        fields = {name: value for name, value in config_dict.items() if name != "quant_type"}
        return cls(config_from(config_dict.get("quant_type", {}).get("default")), **fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ArcHfConfig":
        """Itself: transformers copies the model's config for every use, with one config a layer,
        and nobody changes them."""
        return self


class ArcHfQuantizer(TorchAoHfQuantizer):
    """transformers' quantizer of an arc_ao checkpoint; integrations/checkpoint.py reads the files.

    Attributes:
        checkpoint: what is being loaded, None for a model that was quantized here.
    """

    checkpoint: Checkpoint | None = None

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Suffixes under which a quantized weight lies in the checkpoint."""
        if self.checkpoint is None:
            return {}
        return {"weight": [PREFIX + suffix for suffix in self.checkpoint.suffixes]}

    @property
    def is_trainable(self) -> bool:
        """Adapters train on a quantized model; its weights are frozen."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, for transformers' device planning: 4.5 bits."""
        return 0.5625

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter is quantized, or will be; one of the model itself never is."""
        layer, _, parameter = param_name.rpartition(".")
        if self.pre_quantized and self.checkpoint is not None:
            return parameter == "weight" and layer in self.checkpoint.configs
        return bool(layer) and super().param_needs_quantization(model, param_name, **kwargs)

    def set_metadata(self, checkpoint_files: list[str]) -> None:
        """Read what the files hold, before any weight is loaded."""
        if not checkpoint_files[0].endswith(".safetensors"):
            return  # pickled: whole weights
        self.checkpoint = Checkpoint(checkpoint_files, self.quantization_config.quant_type)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Read the files' metadata; refuse files that lack a tensor which was saved."""
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        if self.pre_quantized and self.checkpoint is not None and self.checkpoint.own_names:
            for name in self.checkpoint.lost(model):
                raise ValueError(f"{name}: expected in the checkpoint, found none; {REMEDY}")

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """Ours comes first. A file in the model's own names needs no renaming, unless a model of
        another class opens it."""
        if not self.pre_quantized or self.checkpoint is None:
            return super().update_weight_conversions(weight_conversions, model)
        same_class = type(model).__name__ in (model.config.architectures or [])
        if self.checkpoint.own_names and same_class:
            weight_conversions = []
        return [ArcWeightConverter(self), *weight_conversions]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Refuse a model that lacks a weight. Forget how the inner tensors were joined: saving
        takes them apart by itself, and transformers would fail to invert the step."""
        if self.pre_quantized and self.checkpoint is not None:
            check_complete(model, self.checkpoint)
        self.checkpoint = None
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not _is_ours(c)]
        pack_weights_(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict, dict]:
        """What a checkpoint holds: weights in the plain layout, taken apart for safetensors.

        All under the model's own names: spellings of older checkpoints, which transformers would
        save, may join several weights into one, and quantized weights cannot be joined.
        """
        model._weight_conversions = []
        state = model.state_dict()
        plain = {k: unshared(v) for k, v in state.items() if isinstance(v, ARCTensor)}
        tensors, metadata = flatten_tensor_state_dict(state | plain)
        return tensors, metadata | {OWN_NAMES: "of the model"}


def unshared(tensor: ARCTensor) -> ARCTensor:
    """The same weight in the plain layout, with tensors that no other weight shares: safetensors
    keeps one name of a storage, and q, k and v share the first half of their low-rank branch."""
    plain = tensor.to_layout("plain")
    names, attributes = plain.__tensor_flatten__()
    tensors = {name: getattr(plain, name) for name in names}
    tensors |= {name: tensors[name].clone() for name in TRANSFORM_TENSORS if name in tensors}
    return ARCTensor.__tensor_unflatten__(tensors, attributes, None, None)


def _is_ours(conversion: Any) -> bool:
    return isinstance(conversion, ArcWeightConverter)


def register_method() -> None:
    """Make the method known to transformers; repeated calls do nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ArcHfConfig)
        register_quantizer(METHOD)(ArcHfQuantizer)


def attach_quantizer(model: nn.Module) -> None:
    """Let a quantized transformers model save itself; other modules are left alone."""
    if not isinstance(model, PreTrainedModel):
        return
    layers = {name: loading_config(tensor) for name, tensor in arc_tensors(model).items()}
    config = ArcHfConfig(FqnToConfig(layers))
    model.hf_quantizer = ArcHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._is_quantized = True  # as loading does: FalconMamba then rounds otherwise
