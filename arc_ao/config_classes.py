"""The config classes alone: all that a checkpoint's config.json may name of arc_ao.

torchao looks a config up by its bare name in whole modules and calls what it finds with arguments
from the file; a module that holds functions, too, would have them called.
"""

from arc_ao.config_family import (
    ARCConfig,
    ARHQConfig,
    BudgetConfig,
    NVFP4Config,
    SERQConfig,
    SVDQuantConfig,
)

__all__ = [
    "ARCConfig",
    "ARHQConfig",
    "BudgetConfig",
    "NVFP4Config",
    "SERQConfig",
    "SVDQuantConfig",
]
