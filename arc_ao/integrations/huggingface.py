"""Save and load through transformers; integrations/quantizer.py is the method behind it."""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from arc_ao.checkpoints.model_files import (
    auto_class,
    check_weight_files,
    has_own_code,
    load_config,
    load_tokenizer,
    refuse_unfit,
)
from arc_ao.checkpoints.read import import_checkpoint, is_checkpoint
from arc_ao.integrations.gguf import find_gguf, load_gguf
from arc_ao.integrations.quantizer import (
    ArcHfConfig,  # noqa: F401  (a model that torch.save pickled names both here)
    ArcHfQuantizer,  # noqa: F401
    attach_quantizer,
)
from arc_ao.output_folder import new_folder, refuse_taken
from arc_ao.summary import SUMMARY, arc_tensors
from arc_ao.tensor import ARCTensor

SUMMARY_FILE = "arc_ao.json"


def save_pretrained(model: PreTrainedModel, directory: str | Path, tokenizer: Any = None) -> Path:
    """Save a quantized model, its summary and its tokenizer to a new directory.

    `directory` is complete or absent (output_folder.py).

    Raises:
        FileExistsError: `directory` exists and is not empty. OSError: it cannot be written.
        ValueError: nothing in the model is quantized, or a tied output head is. TypeError: not a
            transformers model.
    """
    refuse_taken(directory)
    with new_folder(directory) as folder:
        write_files(model, folder, tokenizer)
    return Path(directory)


def write_files(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """What `save_pretrained` saves, into a folder that is there already; raises as it does."""
    if not arc_tensors(model):
        raise ValueError(
            "save_pretrained: expected a model quantized by arc_ao.quantize_, found no ARCTensor"
        )
    _check_saveable(model)
    attach_quantizer(model)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{folder}: {error}") from error
    summary = getattr(model, SUMMARY, None)
    if summary is not None:
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_saveable(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"save_pretrained: expected a transformers model, got {type(model).__name__}; use "
            "torch.save(model.state_dict(), path) for other modules"
        )
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and isinstance(getattr(head, "weight", None), ARCTensor):
        raise ValueError(
            "save_pretrained: the output head is quantized, but config.tie_word_embeddings ties it "
            "to the embedding. Leave it out with filter_fn (torchao's default filter includes it)"
        )


def load_model(
    directory: str | Path,
    dtype: Any = "auto",
    *,
    trust_remote_code: bool = False,
    with_tokenizer: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Model of the architecture that config.json names, in evaluation mode, and its tokenizer.

    Args:
        directory: Hugging Face folder, also one in NVFP4 of another library (checkpoints/read.py),
            GGUF file, or a folder with one (integrations/gguf.py).
        dtype: of the parameters; "auto" is that of the checkpoint, and bfloat16 for GGUF files.
        trust_remote_code: run Python files of the folder that its config.json names.
        with_tokenizer: whether a tokenizer is needed; without, None may take its place.

    Raises:
        FileNotFoundError: neither config.json nor a GGUF file in `directory`. ValueError: files
            that are damaged, missing or of no kind that transformers knows (model_files.py).
            ValueError, ImportError: see `load_gguf`.
    """
    gguf = find_gguf(Path(directory))
    if gguf is not None:
        return load_gguf(gguf, dtype)
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory}: expected a Hugging Face model directory, found no config.json "
            "and no GGUF file"
        )
    config = load_config(directory, trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code) if with_tokenizer else None
    if is_checkpoint(Path(directory)):
        return import_checkpoint(directory, dtype=dtype), tokenizer
    check_weight_files(Path(directory))
    auto = auto_class(config)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None or (trust_remote_code and has_own_code(config)):
        model_class = auto
    options = {"trust_remote_code": trust_remote_code} if model_class is auto else {}
    model, info = model_class.from_pretrained(
        directory, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    refuse_unfit(directory, info)
    return model.eval(), tokenizer
