"""Static outer scales of inputs, which other engines need and ours choose for every token.

One pass over calibration data through the quantized model. An outer scale too small saturates what
it meets, one too large costs next to nothing: block scales have 17 octaves, of which few are used.
Hence the headroom.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arc_ao.calibration.data import Batch, observe
from arc_ao.formats.nvfp4 import outer_scale
from arc_ao.progress import Progress
from arc_ao.tensor import ARCTensor

HEADROOM = 2.0  # a power of two: block scales keep their mantissas


def measure_input_scales(
    model: nn.Module,
    tensors: Mapping[str, ARCTensor],
    batches: list[Batch | Tensor],
    headroom: float = HEADROOM,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Outer scale (fp32 [1]) of what each linear reads: its largest magnitude times `headroom`.

    Args:
        tensors: weights by the name of their linear.
        batches: calibration data.

    Raises:
        ValueError: NaN, Inf, or nothing but zeros reached a linear, naming it.
    """
    amax = {name: torch.zeros(1) for name in tensors}
    with _observed(model, amax):
        observe(model, batches, progress or Progress({"calibrate": 1.0}, show=False))
    for name, value in amax.items():
        if not (torch.isfinite(value).all() and (value > 0).all()):
            raise ValueError(
                f"{name}: expected finite calibration inputs other than zeros for its static "
                f"scale, found a largest magnitude of {value.item()}; give data that reaches it"
            )
    return {name: outer_scale(value * headroom) for name, value in amax.items()}


@contextmanager
def _observed(model: nn.Module, amax: dict[str, Tensor]) -> Iterator[None]:
    """Inside, every forward raises `amax` to the largest magnitude that each linear reads."""

    def hook(name: str):
        def raise_amax(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                largest = x.detach().abs().amax().float().reshape(1).cpu()
                amax[name] = torch.maximum(amax[name], largest)

        return raise_amax

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in amax
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
