"""Find the linears that read the same tensor (q/k/v, gate/up) by watching them read it."""

import weakref

from torch import Tensor

from arc_ao.calibration.observer import ARCObserver


class SharedInputs:
    """The inputs that are alive, and the observer that saw each of them first.

    An address alone would be wrong: memory of a dead activation is reused. A tensor counts as seen
    only while the very object that was seen is alive, at the same address, version and layout.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[weakref.ref, tuple, ARCObserver]] = []

    def first_observer(self, x: Tensor) -> ARCObserver | None:
        """The observer that saw this tensor first, or None."""
        self._seen = [entry for entry in self._seen if _unchanged(entry)]
        key = _key(x)
        return next((observer for _, seen, observer in self._seen if seen == key), None)

    def add(self, x: Tensor, observer: ARCObserver) -> None:
        """Remember that `observer` saw x."""
        self._seen.append((weakref.ref(x), _key(x), observer))

    def __getstate__(self) -> dict:
        return {"_seen": []}  # live tensors are of no use in a copy or a pickle


def _key(x: Tensor) -> tuple:
    version = -1 if x.is_inference() else x._version
    return x.data_ptr(), x.shape, x.stride(), x.dtype, version


def _unchanged(entry: tuple[weakref.ref, tuple, ARCObserver]) -> bool:
    tensor = entry[0]()
    return tensor is not None and _key(tensor) == entry[1]
