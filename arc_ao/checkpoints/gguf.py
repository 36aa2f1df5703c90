"""GGUF: one file with weights, hyperparameters and tokenizer, for llama.cpp and its relatives.

llama.cpp multiplies NVFP4 weights by activations that it quantizes in its own way, or not at all.
So the file has the base of every linear alone: residual channels, which read the codes of our
activations, have no place in it, nor would anything read a side file. The package gguf is an extra
of arc_ao; what needs it is imported when a file is to be written.
"""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from arc_ao.output_folder import new_folder
from arc_ao.summary import arc_tensors
from arc_ao.tensor import ARCTensor

METHOD = "gguf"
FILE = "model.gguf"
BLOCK = 64  # channels in a block of the file
SHOWN_LINEARS = 8


def export(model: PreTrainedModel, directory: str | Path, tokenizer: Any) -> Path:
    """Write `model.gguf` to a new directory, and warn of what it does not hold.

    Args:
        model: of quantized linears that are ordinary NVFP4 layers.
        tokenizer: None for a file that takes token ids alone.

    Raises:
        ImportError: the package gguf is missing, or older than NVFP4.
        ValueError: a model, or a tokenizer, that llama.cpp would not do the same as.
    """
    _require_package()
    from arc_ao.checkpoints.gguf_file import write_file

    tensors = arc_tensors(model)
    dense = _dense_linears(model, tensors)
    with new_folder(directory) as folder:
        write_file(folder / FILE, model, tokenizer, dense)
    for note in _notes(tensors, dense, tokenizer):
        warnings.warn(f"{FILE}: {note}", stacklevel=3)
    return Path(directory)


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("format 'gguf' needs gguf; run: pip install 'arc-ao[gguf]'")
    import gguf

    if not hasattr(gguf.GGMLQuantizationType, "NVFP4"):
        raise ImportError(
            "format 'gguf' needs a release of gguf that knows NVFP4; run: pip install 'gguf>=0.19'"
        )


def _dense_linears(model: PreTrainedModel, tensors: Mapping[str, ARCTensor]) -> dict[str, str]:
    """Quantized linears whose base is written in the weight's own dtype, and why."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.in_features % BLOCK:
            found[name] = f"in_features is no multiple of {BLOCK}"
        elif ".mlp." in name and model.get_submodule(name).bias is not None:
            found[name] = "llama.cpp has no NVFP4 with a bias in feed-forward layers"
    return found


def _notes(tensors: Mapping[str, ARCTensor], dense: Mapping[str, str], tokenizer: Any) -> list[str]:
    """What the file does not hold."""
    notes = []
    if residual := sum(tensor.extra_channels > 0 for tensor in tensors.values()):
        notes.append(
            f"the residual channels of {residual} linears are left out, which GGUF cannot hold; "
            f"{len(tensors)} linears have their base alone"
        )
    for reason, count in Counter(dense.values()).items():
        names = [name for name in dense if dense[name] == reason]
        more = f" and {count - SHOWN_LINEARS} more" if count > SHOWN_LINEARS else ""
        listed = ", ".join(names[:SHOWN_LINEARS]) + more
        notes.append(f"{count} linears are not in NVFP4, because {reason}: {listed}")
    if tokenizer is None:
        notes.append("there is no tokenizer, so that llama.cpp takes token ids alone")
    return notes
