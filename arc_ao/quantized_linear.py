"""A linear whose weight is an ARCTensor: the parameter, and how the module prints."""

import weakref

from torch import nn

from arc_ao.tensor import ARCTensor


def set_weight(module: nn.Linear, weight: ARCTensor) -> None:
    """Make `weight` the frozen parameter of `module`, which says so when it is printed."""
    if module.weight is not weight:
        module.weight = nn.Parameter(weight, requires_grad=False)
    module.extra_repr = _QuantizedRepr(module)


class _QuantizedRepr:
    """extra_repr of a quantized linear.

    It refers to its module weakly, so that the module is freed with the last reference to it, and
    is made again for a copied or unpickled one.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = weakref.ref(module)

    def __reduce__(self) -> tuple[type, tuple[nn.Linear]]:
        return _QuantizedRepr, (self.module(),)

    def __call__(self) -> str:
        module = self.module()
        return f"{nn.Linear.extra_repr(module)}, weight={module.weight}"
