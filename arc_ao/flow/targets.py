"""Which linears are quantized, which are left alone and why, and what is refused."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torchao.core.config import AOBaseConfig
from torchao.quantization import FqnToConfig
from torchao.utils import TorchAOBaseTensor

from arc_ao.config import ARCConfig
from arc_ao.flow.adapters import adapter_modules
from arc_ao.formats.nvfp4 import BLOCK_SIZE
from arc_ao.pretrained import is_pretrained_model

SKIPPED_NAMES = {"lm_head", "embed_out", "classifier", "score", "qa_outputs"}
SKIPPED_NAMES |= {"gate", "router", "shared_expert_gate"}
PADDING = "ARCConfig(pad_in_features=True) pads it"
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

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Drop linears by name -> why they stay as they are, and warn once of all of them."""
        for name in reasons:
            self.modules.pop(name, None)
            self.configs.pop(name, None)
        self.skipped |= reasons
        warn_of_left(reasons)


def collect_targets(
    model: nn.Module, config: AOBaseConfig, filter_fn: FilterFn | None = None
) -> Targets:
    """Targets of `config` (one config, or FqnToConfig per layer) in `model`.

    Warns once of all linears that are not F.linear of a weight of their own, and once of all whose
    in_features is not a multiple of 16.

    Raises:
        ValueError: a chosen layer that cannot be quantized, naming it; or no layer chosen at all.
    """
    _refuse_rescaling(model)
    targets, heads = Targets(), output_heads(model)
    embeddings = {
        id(module.weight): name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    adapters, unusual = adapter_modules(model), dict[str, str]()
    for name, module in linears_of(model).items():
        if module in adapters:
            targets.skipped[name] = "part of an adapter, kept in its own precision"
            continue
        layer_config = config_for(name, config)
        reason = _skip_reason(name, module, heads, config, filter_fn)
        if reason:
            targets.skipped[name] = reason
        elif reason := not_plain(module):
            unusual[name] = reason
        else:
            check_linear(name, module, embeddings)
            targets.configs[name], targets.modules[name] = layer_config, module
    _refuse_unmatched(model, config)
    _skip_ragged(targets)
    targets.skipped |= unusual
    refuse_no_targets(model, targets)
    others = _other_linears(model)
    targets.skipped |= others
    warn_of_left(unusual | others)
    _skip_fused_experts(model, targets)
    return targets


def _refuse_rescaling(model: nn.Module) -> None:
    """RWKV divides weights by powers of two when it is first evaluated, and again when loaded."""
    if getattr(getattr(model, "config", None), "rescale_every", 0):
        raise ValueError(
            f"{type(model).__name__}: expected weights that a forward does not change, found "
            f"config.rescale_every={model.config.rescale_every}, by which it rescales some when it "
            "is first evaluated, and once more after saving and loading; load it by "
            "from_pretrained(..., rescale_every=0), which computes the same without rescaling"
        )


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear by its fully qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def refuse_no_targets(model: nn.Module, targets: Targets) -> None:
    """Refuse a model with nothing to quantize.

    Raises:
        ValueError: no target, saying why each linear was skipped.
    """
    if targets.modules:
        return
    others = sorted({type(m).__name__ for m in model.modules() if _is_other_linear(m)})
    raise ValueError(
        "found no linear layer to quantize; expected at least one nn.Linear outside of "
        f"{sorted(SKIPPED_NAMES)}. Skipped: {_by_reason(targets.skipped, 3) or 'none'}. "
        f"Unsupported: {others or 'none'}"
    )


def choose_by_name(
    model: nn.Module, config: AOBaseConfig, include: Iterable[str], exclude: Iterable[str]
) -> AOBaseConfig:
    """`config` for some linears alone, chosen by shell patterns of their fully qualified names.

    Args:
        include: quantize no others than these; none stands for all. Output heads and routers stay
            as they are unless one is named in full.
        exclude: leave these as they are, included or not.

    Raises:
        ValueError: a pattern that matches no linear.
    """
    include, exclude, linears = list(include), list(exclude), linears_of(model)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f"{pattern!r} matches no linear of the model; expected a pattern such as '*.mlp.*' "
                f"of whole names such as {next(iter(linears), None)!r}"
            )
    if not include and not exclude:
        return config
    heads, chosen = output_heads(model), {}
    for name, module in linears.items():
        included = any(fnmatchcase(name, pattern) for pattern in include or ["*"])
        excluded = any(fnmatchcase(name, pattern) for pattern in exclude)
        kept = is_head_or_router(name, module, heads) and name not in include
        if included and not excluded and not kept:
            chosen[name] = config
    return FqnToConfig(OrderedDict(chosen))


def _refuse_unmatched(model: nn.Module, config: AOBaseConfig) -> None:
    """A key of FqnToConfig that names no linear is a mistake that would go unnoticed."""
    if not isinstance(config, FqnToConfig):
        return
    names = {fqn for name in linears_of(model) for fqn in (name, f"{name}.weight")}
    for key in config.fqn_to_config:
        found = key in names or key == "_default"
        if key.startswith("re:"):
            found = any(re.fullmatch(key[3:], name) for name in names)
        if not found:
            raise ValueError(
                f"FqnToConfig: {key!r} matches no nn.Linear of the model; regular expressions "
                "start with 're:' and match the whole name"
            )


def _is_other_linear(module: nn.Module) -> bool:
    """Linear layers of other classes, such as GPT-2's Conv1D."""
    name = type(module).__name__
    return not isinstance(module, nn.Linear) and ("Linear" in name or name == "Conv1D")


def _other_linears(model: nn.Module) -> dict[str, str]:
    """Linears of other classes by name -> why they stay as they are."""
    return {
        name: f"{type(module).__name__} is no nn.Linear"
        for name, module in model.named_modules()
        if _is_other_linear(module) and "weight" in module._parameters
    }


def _skip_fused_experts(model: nn.Module, targets: Targets) -> None:
    """List weights of fused experts and other 3-D ones, which stay as they are, and warn once."""
    convolution = (nn.modules.conv._ConvNd, ParametrizationList)  # weight norm splits its weight
    names = []
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            several = parameter.dim() == 3 and min(parameter.shape) > 1  # no [1, T, K], [N, 1, 1]
            if parameter.dim() == 2 and not key.endswith("bias"):
                several = "experts" in name.split(".")  # [experts * N, K]
            if several and not isinstance(module, (nn.Linear, *convolution)):
                names.append(f"{name}.{key}" if name else key)
    targets.skipped |= dict.fromkeys(names, "fused experts and 3-D weights are not supported")
    if names:
        warnings.warn(
            f"{len(names)} weights of fused experts, or of 3 dimensions, stay unquantized: "
            f"{', '.join(names)}",
            stacklevel=3,
        )


def not_plain(module: nn.Linear) -> str | None:
    """Why a linear is more than F.linear(x, weight, bias) of a weight of its own, or None."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "weight" not in module._parameters:
        return (
            "its weight is computed when it runs (weight_norm, spectral_norm, pruning); make that "
            "permanent to quantize it"
        )
    return None


def unsuited(module: nn.Linear, config: AOBaseConfig) -> str | None:
    """Why a linear that is looked at alone stays as it is, or None."""
    if is_ragged(module, config):
        return f"in_features is not a multiple of {BLOCK_SIZE} ({PADDING})"
    return not_plain(module)


def warn_of_left(reasons: Mapping[str, str]) -> None:
    """One warning of all linears that stay as they are, by name -> why."""
    if not reasons:
        return
    warnings.warn(f"{len(reasons)} linears stay unquantized: {_by_reason(reasons)}", stacklevel=3)


def _by_reason(reasons: Mapping[str, str], most: int | None = None) -> str:
    """Names, `most` of every reason, and why."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    listed = []
    for reason, group in names.items():
        left = [] if most is None or len(group) <= most else [f"{len(group) - most} more"]
        listed.append(f"{', '.join(group[:most] + left)} ({reason})")
    return "; ".join(listed)


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
    if is_lazy(weight):
        raise ValueError(
            f"{name}: expected a weight with data, found one without a shape (LazyLinear); run the "
            "model once first"
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
    name: str,
    module: nn.Linear,
    heads: set[nn.Module | None],
    config: AOBaseConfig,
    filter_fn: FilterFn | None,
) -> str | None:
    if config_for(name, config) is None:
        return "excluded by its config"
    if not is_lazy(module.weight) and not module.weight.numel():
        return "it has no weights"
    if filter_fn is not None:
        return None if filter_fn(module, name) else "excluded by filter_fn"
    if isinstance(config, FqnToConfig) and _matching_key(name, config) is not None:
        return None  # asked for by name
    if is_head_or_router(name, module, heads):
        return "output head or router, kept in its own precision"
    return None


def is_head_or_router(name: str, module: nn.Linear, heads: set[nn.Module | None]) -> bool:
    """Whether a linear stays as it is unless it is asked for by name."""
    return name.rsplit(".", 1)[-1] in SKIPPED_NAMES or module in heads


def output_heads(model: nn.Module) -> set[nn.Module | None]:
    """Modules that turn hidden states into a prediction.

    What a transformers model, `model` or one inside it, has beside its body (`base_model`), but for
    further models and chains of transformer blocks; and its output embeddings, wherever they are.
    """
    models = [m for m in model.modules() if is_pretrained_model(m)]
    heads: set[nn.Module | None] = {part.get_output_embeddings() for part in models}
    for part in models:
        beside = [m for m in part.children() if m is not part.base_model and not _is_body(m)]
        if part.base_model is not part:
            heads.update(m for child in beside for m in child.modules())
    return heads


def _is_body(module: nn.Module) -> bool:
    """Whether it holds a transformers model, or blocks of four linears, as attention has, or more.

    Such as the decoder of a masked autoencoder.
    """
    parts = list(module.modules())
    blocks = [block for m in parts if isinstance(m, nn.ModuleList) for block in m]
    return any(is_pretrained_model(m) for m in parts) or any(
        len(linears_of(block)) >= 4 for block in blocks
    )


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
            f"{BLOCK_SIZE} ({PADDING}): {listed}",
            stacklevel=4,
        )


def is_ragged(module: nn.Linear, config: AOBaseConfig) -> bool:
    """in_features does not fill blocks of 16 and the config does not pad."""
    arc = isinstance(config, ARCConfig)
    return arc and module.in_features % BLOCK_SIZE > 0 and not config.pad_in_features
