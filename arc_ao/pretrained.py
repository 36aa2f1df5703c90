"""transformers' classes where transformers is loaded: nothing here loads it.

A model of transformers exists only where its module was imported before, so that asking for the
module among those loaded answers what isinstance would.
"""

import sys
from typing import Any


def is_pretrained_model(value: Any) -> bool:
    """Whether this is a transformers PreTrainedModel."""
    return _is("transformers.modeling_utils", "PreTrainedModel", value)


def is_pretrained_config(value: Any) -> bool:
    """Whether this is a transformers PretrainedConfig."""
    return _is("transformers.configuration_utils", "PretrainedConfig", value)


def _is(module: str, name: str, value: Any) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)
