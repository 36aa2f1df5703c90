"""Which linears are quantized, which are left alone and why, and what is refused."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.utils import TorchAOBaseTensor

from arc_ao.config import ARCConfig
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.integrations.peft import adapter_modules

SKIPPED_NAMES = {"lm_head", "embed_out", "gate", "router", "shared_expert_gate"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FilterFn = Callable[[nn.Module, str], bool]


@dataclass
class Targets:
    """Linears by fully qualified name: what to do with each, and why some are left alone."""

    configs: dict[str, AOBaseConfig] = field(default_factory=dict)
    modules: dict[str, nn.Linear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def by_config(self) -> list[tuple[AOBaseConfig, dict[str, nn.Linear]]]:
        """Targets of each distinct config object, in model order."""
        groups: dict[int, tuple[AOBaseConfig, dict[str, nn.Linear]]] = {}
        for name, config in self.configs.items():
            groups.setdefault(id(config), (config, {}))[1][name] = self.modules[name]
        return list(groups.values())


def collect_targets(
    model: nn.Module, config: AOBaseConfig, filter_fn: FilterFn | None = None
) -> Targets:
    """Targets of `config` (one config, or FqnToConfig per layer) in `model`.

    Warns once, listing every layer whose in_features is not a multiple of 16.

    Raises:
        ValueError: a chosen layer that cannot be quantized, naming it; or no layer chosen at all.
    """
    targets = Targets()
    embeddings = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    adapters = adapter_modules(model)
    for name, module in model.named_modules():
        if not is_plain_linear(module):
            continue
        if module in adapters:
            targets.skipped[name] = "part of an adapter, kept in its own precision"
            continue
        layer_config = config_for(name, config)
        reason = _skip_reason(model, name, module, layer_config, config, filter_fn)
        if reason:
            targets.skipped[name] = reason
            continue
        check_linear(name, module, embeddings)
        targets.configs[name], targets.modules[name] = layer_config, module
    _refuse_unmatched(model, config)
    _skip_ragged(targets)
    if not targets.modules:
        others = sorted({type(m).__name__ for m in model.modules() if _is_other_linear(m)})
        raise ValueError(
            "found no linear layer to quantize; expected at least one nn.Linear outside of "
            f"{sorted(SKIPPED_NAMES)}. Skipped: {targets.skipped or 'none'}. "
            f"Unsupported: {others or 'none'}"
        )
    _skip_fused_experts(model, targets)
    return targets


def _refuse_unmatched(model: nn.Module, config: AOBaseConfig) -> None:
    """A key of FqnToConfig that names no linear is a mistake that would go unnoticed."""
    if not isinstance(config, FqnToConfig):
        return
    names = [name for name, module in model.named_modules() if is_plain_linear(module)]
    for key in config.fqn_to_config:
        single = FqnToConfig({key: None})
        if key != "_default" and not any(_matching_key(name, single) for name in names):
            raise ValueError(
                f"FqnToConfig: {key!r} matches no nn.Linear of the model; regular expressions "
                "start with 're:' and match the whole name"
            )


def _is_other_linear(module: nn.Module) -> bool:
    """Linear layers of other classes, such as GPT-2's Conv1D."""
    name = type(module).__name__
    return not isinstance(module, nn.Linear) and ("Linear" in name or name == "Conv1D")


def _skip_fused_experts(model: nn.Module, targets: Targets) -> None:
    """List 3-D weights of fused experts, which stay as they are, and warn once."""
    convolution = nn.modules.conv._ConvNd
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            several = parameter.dim() == 3 and parameter.shape[0] > 1  # [1, T, K] is an embedding
            if several and not isinstance(module, convolution):
                targets.skipped[f"{name}.{key}"] = "fused experts (a 3-D weight) are not supported"
    fused = [name for name, reason in targets.skipped.items() if "fused experts" in reason]
    if fused:
        warnings.warn(
            f"{len(fused)} fused expert weights stay unquantized: {', '.join(fused)}", stacklevel=3
        )


def is_plain_linear(module: nn.Module) -> bool:
    """An nn.Linear whose weight is used through F.linear."""
    special = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(module, nn.Linear) and not isinstance(module, special)


def config_for(name: str, config: AOBaseConfig) -> AOBaseConfig | None:
    """Config of one layer: FqnToConfig by torchao's precedence, any other config for all layers."""
    if not isinstance(config, FqnToConfig):
        return config
    return config.fqn_to_config.get(_matching_key(name, config) or "_default")


def _matching_key(name: str, config: FqnToConfig) -> str | None:
    """Key that names a layer: exact before pattern, parameter before module."""
    table = config.fqn_to_config
    for key in (f"{name}.weight", name):
        if key in table:
            return key
    for target in (f"{name}.weight", name):
        for pattern in table:
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], target):
                return pattern
    return None


def check_linear(name: str, module: nn.Linear, embeddings: Mapping[int, str] | None = None) -> None:
    """Refuse what cannot be quantized.

    Args:
        embeddings: id of each embedding's weight -> name of the embedding.

    Raises:
        ValueError: already quantized, meta device, wrong dtype, or tied to an embedding, naming
            the layer, what was expected and found, and what to do.
    """
    weight = module.weight
    if isinstance(weight, TorchAOBaseTensor):
        raise ValueError(
            f"{name}: expected a floating-point weight, found {type(weight).__name__}; the layer "
            "is already quantized. Start from the original model or exclude the layer"
        )
    if weight.is_meta:
        raise ValueError(
            f"{name}: expected a weight with data, found one on the meta device; load the "
            "checkpoint first"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected a weight in bfloat16, float16 or float32, found {weight.dtype}; "
            "convert the model first"
        )
    owner = (embeddings or {}).get(id(weight))
    if owner is not None:
        raise ValueError(
            f"{name}: expected a weight of its own, found it tied to embedding {owner!r}; "
            "quantizing would untie them. Exclude the layer with filter_fn"
        )


def _skip_reason(
    model: nn.Module,
    name: str,
    module: nn.Linear,
    layer_config: AOBaseConfig | None,
    config: AOBaseConfig,
    filter_fn: FilterFn | None,
) -> str | None:
    if layer_config is None:
        return "excluded by its config"
    if not module.weight.numel():
        return "it has no weights"
    if filter_fn is not None:
        return None if filter_fn(module, name) else "excluded by filter_fn"
    if isinstance(config, FqnToConfig) and _matching_key(name, config) is not None:
        return None  # asked for by name
    if name.rsplit(".", 1)[-1] in SKIPPED_NAMES or module is _output_embeddings(model):
        return "output head or router, kept in its own precision"
    return None


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _skip_ragged(targets: Targets) -> None:
    """Drop layers whose in_features does not fill blocks, unless their config pads."""
    ragged = {
        name: module.in_features
        for name, module in targets.modules.items()
        if is_ragged(module, targets.configs[name])
    }
    for name, in_features in ragged.items():
        targets.skipped[name] = f"in_features {in_features} is not a multiple of {BLOCK_SIZE}"
        del targets.modules[name], targets.configs[name]
    if ragged:
        listed = ", ".join(f"{name} ({k})" for name, k in ragged.items())
        warnings.warn(
            f"{len(ragged)} layers stay unquantized because in_features is not a multiple of "
            f"{BLOCK_SIZE} (ARCConfig(pad_in_features=True) pads them): {listed}",
            stacklevel=4,
        )


def is_ragged(module: nn.Linear, config: AOBaseConfig) -> bool:
    """in_features does not fill blocks of 16 and the config does not pad."""
    arc = isinstance(config, ARCConfig)
    return arc and module.in_features % BLOCK_SIZE > 0 and not config.pad_in_features
