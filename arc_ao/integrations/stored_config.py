"""A torchao config as config.json holds it: short, and read without calling functions."""

import dataclasses
import enum
import importlib
from functools import cache
from typing import Any

from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig, config_from_dict
from torchao.quantization import FqnToConfig

from arc_ao import config_classes


def config_from(described: dict[str, Any]) -> AOBaseConfig:
    """The config that torchao's `config_to_dict` described. Layers described alike share one.

    Raises:
        ValueError: a name of anything but a class of configs or of their fields.
    """
    if described.get("_type") != FqnToConfig.__name__:
        _check_types(described)
        return config_from_dict(described)
    layers = _layers(described)
    alike = {repr(inner): inner for inner in layers.values()}
    known = {text: inner and config_from(inner) for text, inner in alike.items()}
    return FqnToConfig({layer: known[repr(inner)] for layer, inner in layers.items()})


def _layers(described: dict[str, Any]) -> dict[str, Any]:
    """Name -> described config, or None, of a described FqnToConfig."""
    fields = described["_data"]
    return fields.get("fqn_to_config") or fields.get("module_fqn_to_config") or {}


def without_defaults(described: dict[str, Any]) -> dict[str, Any]:
    """A described config without what its class, if it is one of arc_ao, fills in by itself."""
    fields = described["_data"]
    if described["_type"] == FqnToConfig.__name__:
        layers = _layers(described).items()
        short = {name: inner and without_defaults(inner) for name, inner in layers}
        return described | {"_data": {"fqn_to_config": short}}
    config_class = getattr(config_classes, described["_type"], None)
    if config_class is None:
        return described
    usual = vars(config_class())
    kept = {name: value for name, value in fields.items() if value != usual[name]}
    return {"_type": described["_type"], "_data": kept}


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
