"""Ahead of time: a quantized model as one .pt2 file that runs without Python code of arc_ao.

arc_ao.export_package(model, (input_ids,), "model.pt2", dynamic=({1: Dim("length")},))

torch.ops.load_library(arc_ao.library_path())       # in another process, or in C++
runner = torch._inductor.aoti_load_package("model.pt2")
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package, config
from torch.export import ExportedProgram

from arc_ao.ops import native
from arc_ao.passes.backend import with_ours


def library_path() -> Path:
    """The native operator library, which a process loads before a package.

    Raises:
        RuntimeError: this installation has none, saying why.
    """
    reason = native.reason_absent()
    if reason is not None:
        raise RuntimeError(f"no native operator library: {reason}")
    return native.LIBRARY


def export_package(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] = (),
    path: str | Path = "model.pt2",
    *,
    dynamic: Any = None,
    options: dict[str, Any] | None = None,
) -> Path:
    """Compile a quantized model with AOTInductor and our passes into one package.

    Args:
        model: a quantized model that takes and returns tensors, or a program exported from one.
        example_inputs: positional inputs to export with; not used for a program.
        path: the .pt2 file to write.
        dynamic: `dynamic_shapes` of torch.export.export.
        options: further options of Inductor.

    Returns:
        The path.

    Raises:
        ValueError: a path that does not end in .pt2.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"export_package: expected a path that ends in .pt2, got {path}")
    program = model
    if not isinstance(model, ExportedProgram):
        with torch.no_grad():
            program = torch.export.export(model.eval(), example_inputs, dynamic_shapes=dynamic)
    with config.patch(post_grad_custom_pre_pass=with_ours(config.post_grad_custom_pre_pass)):
        return Path(
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        )
