"""Refusals of the operators. Like those of PyTorch's own operators they are RuntimeErrors, the same
from the eager meaning, from tracing and from native kernels."""


def check(condition: bool, message: str) -> None:
    """Raise RuntimeError(message) unless `condition`."""
    if not condition:
        raise RuntimeError(message)
