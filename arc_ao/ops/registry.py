"""Define an operator `arc::*` once: its schema, its eager meaning and its shapes."""

from collections.abc import Callable

import torch
from torch._ops import OpOverload

from arc_ao.ops import native
from arc_ao.ops.cuda import dispatch

NAMESPACE = "arc"


def define(schema: str, eager: Callable, fake: Callable) -> OpOverload:
    """Register `schema` with its eager meaning on every device that has no kernel of its own.

    The native library, where there is one, has defined the operator already and brings its kernels
    for CPUs; cuda/dispatch.py has those for GPUs.

    Args:
        schema: as in the dispatcher, without the namespace: "name(Tensor x, ...) -> Tensor".
        eager: the meaning, in PyTorch operators.
        fake: output shapes and dtypes, for tracing.

    Raises:
        RuntimeError: the native library was built from another schema.
    """
    native.load()
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        torch.library.define(qualified, schema.removeprefix(name))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    expected = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    if str(operator._schema) != str(expected):
        raise RuntimeError(
            f"{native.LIBRARY.name} was built from another version: it has {operator._schema}, "
            f"expected {expected}; install arc_ao again"
        )
    torch.library.impl(qualified, "CompositeExplicitAutograd")(eager)
    dispatch.register(name, eager)
    torch.library.register_fake(qualified)(fake)
    return operator
