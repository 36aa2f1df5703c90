"""A model's chain of blocks: where it is, and how to run it in the memory of one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(model: nn.Module, linears: list[nn.Linear]) -> list[nn.Module]:
    """Modules of the ModuleList of one class that holds most of `linears`, or none.

    Among equals the outermost counts: a list of experts inside a layer is not the chain.
    """
    wanted, best, most = {id(linear) for linear in linears}, [], 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len({type(m) for m in module}) != 1:
            continue
        held = [sum(id(m) in wanted for m in block.modules()) for block in module]
        if sum(held) > most and not isinstance(module[0], nn.Linear):
            best, most = list(module), sum(held)
    return best


@contextmanager
def checkpointed(
    block: nn.Module, wrap: Callable[[Callable], Callable] = lambda run: run
) -> Iterator[None]:
    """Inside, a block keeps nothing for its backward pass but its inputs: it runs a second time.

    Args:
        wrap: makes of the block's own forward what one call runs, both times.
    """
    original, own = block.forward, vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        run = wrap(original)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
