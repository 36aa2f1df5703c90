"""Import torchao without its notices where they are no news.

torchao logs that its CUDA libraries do not load, and torch that an enum of torchao's is registered
the old way, on every import. Without a GPU the first is no news and the second is not the user's to
mend, so both loggers are raised to ERROR while torchao is imported, and put back afterwards.
"""

import logging

import torch

_LOGGERS = [logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")]


def import_torchao() -> None:
    """Import the parts of torchao that arc_ao uses."""
    levels = [logger.level for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.setLevel(logging.ERROR)
    try:
        import torchao.prototype.safetensors.safetensors_utils  # noqa: F401
        import torchao.quantization  # noqa: F401
    finally:
        for logger, level in zip(_LOGGERS, levels, strict=True):
            logger.setLevel(level)


if not torch.cuda.is_available():
    import_torchao()
