"""Recognise the tensor that several linears read (q/k/v, gate/up), to measure it once."""

import weakref

from torch import Tensor

from arc_ao.calibration.observer import Increment


class SharedInputs:
    """The inputs that are alive, and what was measured on them.

    An address alone would be wrong: memory of a dead activation is reused. A tensor counts as seen
    only while the very object that was seen is alive, at the same address, version and layout.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref, tuple, Increment]] = []

    def find(self, x: Tensor) -> Increment | None:
        """What was last measured on this tensor, or None."""
        self._seen = [entry for entry in self._seen if _unchanged(entry)]
        key = _key(x)
        return next((found for _, seen, found in reversed(self._seen) if seen == key), None)

    def add(self, x: Tensor, increment: Increment) -> None:
        """Remember what was measured on x."""
        self._seen.append((weakref.ref(x), _key(x), increment))

    def __getstate__(self) -> dict:
        return {"_seen": []}  # live tensors are of no use in a copy or a pickle


def _key(x: Tensor) -> tuple:
    if x.is_inference():  # such tensors do not count their versions; two sums stand in
        version = (x.double().sum().item(), x.double().norm().item())
    else:
        version = x._version
    return x.data_ptr(), x.shape, x.stride(), x.dtype, version


def _unchanged(entry: tuple[weakref.ref, tuple, Increment]) -> bool:
    tensor = entry[0]()
    return tensor is not None and _key(tensor) == entry[1]
