"""A torchao config as config.json holds it: short, and read without calling functions."""

import dataclasses
import enum
import importlib
from functools import cache
from typing import Any

from torchao.core.config import (
    ALLOWED_AO_MODULES,
    AOBaseConfig,
    config_from_dict,
    config_to_dict,
)
from torchao.quantization import FqnToConfig

from arc_ao.config import ARCConfig


def config_from(stored: Any) -> AOBaseConfig:
    """The config that `described`, or torchao's `config_to_dict`, describes.

    Layers that are alike share one.

    Raises:
        ValueError: no such description, or a name of anything but a class of configs or of their
            fields; of a layer's config, naming the layer.
    """
    if not isinstance(stored, dict) or not isinstance(stored.get("_data"), dict):
        raise ValueError(
            f"quantization_config of config.json: expected a described config, found {stored!r}"
        )
    if stored.get("_type") != FqnToConfig.__name__:
        _check_types(stored)
        return config_from_dict(stored)
    fields = stored["_data"]
    layers = fields.get("fqn_to_config") or fields.get("module_fqn_to_config") or {}
    known: dict[str, AOBaseConfig | None] = {"None": None}
    for layer, inner in layers.items():
        if repr(inner) not in known:
            known[repr(inner)] = _layer_config(layer, inner)
    return FqnToConfig({layer: known[repr(inner)] for layer, inner in layers.items()})


def _layer_config(layer: str, stored: Any) -> AOBaseConfig:
    try:
        return config_from(stored)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from error


def described(config: AOBaseConfig | None) -> dict[str, Any] | None:
    """What `config_from` reads; of a config of arc_ao without the fields that are as usual."""
    if config is None:
        return None
    name = type(config).__name__
    if isinstance(config, FqnToConfig):
        layers = {layer: described(inner) for layer, inner in config.fqn_to_config.items()}
        return {"_type": name, "_data": {"fqn_to_config": layers}}
    if not isinstance(config, ARCConfig):
        return config_to_dict(config)
    usual = _usual_fields(type(config))
    fields = {field: value for field, value in vars(config).items() if not field.startswith("_")}
    return {"_type": name, "_data": {k: v for k, v in fields.items() if v != usual[k]}}


@cache
def _usual_fields(config_class: type[ARCConfig]) -> dict[str, Any]:
    return vars(config_class())


def _check_types(described: Any) -> None:
    """Refuse a config that has torchao look up, and call, anything but classes of data."""
    for name in _type_names(described) - {"torch.dtype"}:
        if not _names_data(name):
            raise ValueError(
                f"quantization_config of config.json: expected names of config classes, found "
                f"{name!r}; the file was edited, do not trust it"
            )


def _type_names(described: Any) -> set[str]:
    """All values of "_type" in nested dictionaries and lists."""
    if isinstance(described, list):
        return set().union(*map(_type_names, described))
    if not isinstance(described, dict):
        return set()
    own = {str(described["_type"])} if "_type" in described else set()
    return own.union(*map(_type_names, described.values()))


@cache
def _names_data(name: str) -> bool:
    """Whether all that torchao may find under a name is a config, a choice or a plain record."""
    modules = [importlib.import_module(module) for module in ALLOWED_AO_MODULES]
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    return bool(found) and all(_is_data(item) for item in found)


def _is_data(item: Any) -> bool:
    if not isinstance(item, type):
        return False
    return issubclass(item, (AOBaseConfig, enum.Enum, tuple)) or dataclasses.is_dataclass(item)
