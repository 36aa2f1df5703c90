"""A saved checkpoint back to weights: each one from its own tensors and its own description.

safetensors knows plain tensors only, so a weight `layer.weight` lies in the file as
`layer._weight_qdata`, `layer._weight_scale` and so on, and the file's metadata says under
`layer.weight` what they make up (torchao's form). transformers' own way back reads the metadata of
the whole checkpoint, and copies every layer's config, for each tensor of each weight.
"""

import json
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_utils import object_from_dict
from torchao.quantization import FqnToConfig
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from arc_ao.checks_on_load import REMEDY, check_config, check_weight
from arc_ao.config import ARCConfig, block_scale_of
from arc_ao.tensor import ARCTensor, input_digest

PREFIX = "_weight_"  # of the name of an inner tensor, in place of ".weight"
OWN_NAMES = "arc_ao.names"  # metadata of files whose names are all the model's own
TENSOR = {"_type": "Tensor"}
# Of attributes that older files lack.
DEFAULTS = {"activation_scale": "token", "activation_block_scale": "amax", "input_plan": ""}


class Checkpoint:
    """What the files of a checkpoint hold and promise, read once.

    Attributes:
        names: of all tensors in the files.
        descriptions: name of a tensor of the saved model -> its metadata.
        own_names: whether names in the files are those of the saved model, and no older spelling.
        configs: layer -> its config for loading; empty where config.json does not go by layers.
        loaded: names of the quantized weights that were rebuilt.
    """

    def __init__(self, files: list[str], quant_type: AOBaseConfig) -> None:
        self.configs = _loading_configs(quant_type)
        self.names: set[str] = set()
        self.loaded: set[str] = set()
        metadata: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self.names.update(opened.keys())
                metadata.update(opened.metadata() or {})
        self.own_names = OWN_NAMES in metadata
        described = _parsed("tensor_names", metadata.get("tensor_names", "[]"), list)
        self.descriptions = {
            name: _parsed(name, metadata.get(name, "null"), dict) for name in map(str, described)
        }

    @property
    def quantized(self) -> list[str]:
        """Names of the weights that are more than one tensor."""
        return [name for name, d in self.descriptions.items() if d.get("_type") != "Tensor"]

    @property
    def suffixes(self) -> set[str]:
        """Names of all inner tensors that a weight of this checkpoint may have."""
        promised = [self.descriptions[name].get("_tensor_data_names") for name in self.quantized]
        known = {*ARCTensor.tensor_data_names, *ARCTensor.optional_tensor_data_names}
        return known.union(*(names for names in promised if isinstance(names, list)))

    def lost(self, model: PreTrainedModel) -> list[str]:
        """Plain tensors of the model that were saved, and are in no file.

        Of tied ones a file holds one; those that the model never saves are not missed either.
        """
        plain = (name for name, described in self.descriptions.items() if described == TENSOR)
        absent = [name for name in plain if name not in self.names]
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        exempt = {*tied, *tied.values(), *(model._keys_to_ignore_on_save or [])}
        state = model.state_dict().keys() - exempt if absent else set()
        return [name for name in absent if not state.isdisjoint(names_in(model, name))]


def names_in(model: PreTrainedModel, name: str) -> list[str]:
    """What `name` may be called in a model that was saved with, or without, its head."""
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


class WeightDeserializer(ConversionOps):
    """Rebuilds one quantized weight, checks it, and puts it into its linear."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    @property
    def checkpoint(self) -> Checkpoint:
        """Of the model that is being loaded."""
        return self.hf_quantizer.checkpoint

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        disk_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """`input_dict`: name of an inner tensor, with its prefix -> the tensor alone in a list.

        Returns nothing that is left to do. Raises ValueError, naming the layer.
        """
        name = self._described_name(disk_name, full_layer_name, model)
        layer = name.removesuffix(".weight")
        tensors = _single_tensors(layer, input_dict)
        weight = self._rebuilt(name, tensors)
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if weight.shape != module.weight.shape:
            raise ValueError(
                f"{layer}: the model expects a weight {list(module.weight.shape)}, found "
                f"{list(weight.shape)} in the checkpoint; {REMEDY}"
            )
        self.checkpoint.loaded.add(name)
        weight._is_param = True  # all that nn.Parameter adds to a tensor of no other owner
        module._is_hf_initialized = weight._is_hf_initialized = True
        module._hf_quantized_needs_local_tp = True
        module.weight = weight
        (missing_keys or set()).discard(full_layer_name)
        return {}

    def _described_name(self, disk_name: str, model_name: str, model: PreTrainedModel) -> str:
        """The name under which the metadata describes a weight.

        Raises:
            ValueError: none.
        """
        for name in (disk_name, *names_in(model, model_name)):
            if name in self.checkpoint.descriptions:
                return name
        raise ValueError(
            f"{model_name.removesuffix('.weight')}: expected a description in the metadata of the "
            f"safetensors file, found none; {REMEDY}"
        )

    def _rebuilt(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        description = self.checkpoint.descriptions[name]
        layer = name.removesuffix(".weight")
        promised = description.get("_tensor_data_names")
        if not isinstance(promised, list) or set(promised) != tensors.keys():
            raise ValueError(
                f"{layer}: the metadata promises the tensors {promised}, found "
                f"{sorted(tensors)}; {REMEDY}"
            )
        if description.get("_type") != ARCTensor.__name__:
            return _of_another_library(layer, description, tensors)
        settings = _settings(layer, description)
        check_weight(layer, tensors, settings)
        weight = ARCTensor(**tensors, **settings, input_plan=input_digest(tensors, settings))
        config = self._config(layer)
        if config is not None:
            check_config(layer, weight, config)
        return weight.packed()

    def _config(self, layer: str) -> ARCConfig | None:
        """The layer's config for loading, None where config.json describes none.

        Raises:
            ValueError: config.json describes other layers, and not this one.
        """
        configs = self.checkpoint.configs
        if configs and layer not in configs:
            raise ValueError(
                f"{layer}: quantized in the checkpoint, but not in config.json; {REMEDY}"
            )
        return configs.get(layer)


class ArcWeightConverter(WeightConverter):
    """Collects the tensors of all weights, and hands each weight's to the `WeightDeserializer`.

    transformers copies a converter for every tensor in the file and keeps one copy a weight; this
    one stays the same, keeps weights apart by name, and knows their names in the file. Errors pass
    through, which transformers would log only.
    """

    __slots__ = ("suffixes", "by_weight")

    def __init__(self, hf_quantizer: Any) -> None:
        self.suffixes = hf_quantizer.checkpoint.suffixes
        self.by_weight: dict[str, dict[str, list[Any]]] = {}
        sources = [PREFIX + suffix for suffix in sorted(self.suffixes)]
        super().__init__(sources, "weight", [WeightDeserializer(hf_quantizer)])

    def __deepcopy__(self, memo: dict[int, Any]) -> "ArcWeightConverter":
        return self

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Name of the weight that a tensor of the file belongs to, and what it is there."""
        layer, _, suffix = source_key.rpartition(f".{PREFIX}")
        if not layer or suffix not in self.suffixes:
            return source_key, None
        self._was_used = True
        return f"{layer}.weight", PREFIX + suffix

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Keep a tensor, or what will read it, for the weight `target_key`."""
        self.by_weight.setdefault(target_key, {}).setdefault(source_pattern, []).append(future)
        self.layer_targets[target_key].add(source_key)

    def convert(
        self, layer_name: str, model: Any = None, loading_info: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Have the weight rebuilt and put into `model`; nothing is left to do."""
        inner = next(name for name in self.layer_targets[layer_name] if f".{PREFIX}" in name)
        self.collected_tensors = self.by_weight.pop(layer_name)
        return self.operations[0].convert(
            self.materialize_tensors(),
            full_layer_name=layer_name,
            model=model,
            disk_name=inner.rpartition(f".{PREFIX}")[0] + ".weight",
            missing_keys=loading_info.missing_keys,
        )


def check_complete(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse a model of which a quantized weight was not found: it would stay random.

    Raises:
        ValueError: naming the first such layer.
    """
    described = {name.removesuffix(".weight") for name in checkpoint.quantized}
    loaded = {name.removesuffix(".weight") for name in checkpoint.loaded}
    modules = dict(model.named_modules())
    for layer in sorted(described | checkpoint.configs.keys()):
        if layer not in loaded and any(name in modules for name in names_in(model, layer)):
            raise ValueError(
                f"{layer}: expected the tensors of a quantized weight, found none; {REMEDY}"
            )


def _loading_configs(quant_type: AOBaseConfig) -> dict[str, ARCConfig]:
    """Layer -> config, where a checkpoint's config describes its layers one by one."""
    configs = quant_type.fqn_to_config if isinstance(quant_type, FqnToConfig) else {}
    return {
        layer: config
        for layer, config in configs.items()
        if isinstance(config, ARCConfig) and config.step == "prepare_for_loading"
    }


def _parsed(name: str, text: str, kind: type) -> Any:
    """JSON of the metadata.

    Raises:
        ValueError: none, or of another kind, naming the entry.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: metadata that is not JSON ({error}); {REMEDY}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected metadata in a {kind.__name__}, found {text}; {REMEDY}")
    return value


def _of_another_library(
    layer: str, description: dict[str, Any], tensors: dict[str, Tensor]
) -> Tensor:
    """A weight that torchao knows: one layer of a mixed FqnToConfig."""
    try:
        data = description["_data"] | tensors
        return object_from_dict(description | {"_data": data})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{layer}: {error}; {REMEDY}") from error


def _single_tensors(layer: str, collected: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Inner tensors by name, without the lists that transformers collects them in."""
    tensors = {}
    for source, found in collected.items():
        if not source.startswith(PREFIX) or len(found) != 1:
            raise ValueError(
                f"{layer}: expected the tensors of one quantized weight, found {source!r} "
                f"{len(found)} times, too; {REMEDY}"
            )
        tensors[source.removeprefix(PREFIX)] = found[0]
    return tensors


def _settings(layer: str, description: dict[str, Any]) -> dict[str, Any]:
    """Attributes of an ARCTensor from its metadata; also of files from before
    `activation_block_scale`. `input_plan` is left out: a digest that does not fit the tensors
    would have compiled linears share another linear's quantized input."""
    stored = description.get("_data")
    if not isinstance(stored, dict):
        raise ValueError(f"{layer}: expected attributes in the metadata, found {stored}; {REMEDY}")
    settings = DEFAULTS | stored
    del settings["input_plan"]
    if "four_over_six" in settings:
        settings["activation_block_scale"] = block_scale_of(settings.pop("four_over_six"))
    dtype = settings.get("orig_dtype")
    if isinstance(dtype, dict):
        settings["orig_dtype"] = getattr(torch, str(dtype.get("_data")), dtype)
    return settings
