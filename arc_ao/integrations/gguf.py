"""GGUF files as input: transformers' own loader makes a dense model of one, to be quantized anew.

The file's tensors are dequantized one after the other, each in fp32, and kept in `dtype`: the peak
is the model in `dtype`, twice its largest tensor in fp32 (the embedding, as a rule), and pages of
the file, which is mapped. Releases of transformers 5 before GgufConfig dequantize by default.

Blocks of llama.cpp's types have rounded the weights already, and NVFP4 rounds them once more; the
model remembers the types (`summary.SOURCE`), so that the summary of `quantize_` can say so.
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from arc_ao.checkpoints.gguf_rope import restore_rope_scaling
from arc_ao.summary import SOURCE

MAGIC = b"GGUF"
UNQUANTIZED = ("F32", "F16", "BF16", "F64")
PACKAGES = ("gguf", "accelerate")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` names: itself, or the only one in a folder without config.json.

    Returns None for a Hugging Face folder, one without GGUF files, or nothing at all.

    Raises:
        ValueError: a file that is no GGUF, or a folder with several of them.
    """
    if path.is_file():
        _check_magic(path)
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path}: expected one GGUF file, found {len(files)}; name one of {names}")
    for file in files:
        _check_magic(file)
    return files[0] if files else None


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        found = file.read(len(MAGIC))
    if found != MAGIC:
        raise ValueError(
            f"{path}: expected a GGUF file or a Hugging Face model directory; the file starts with "
            f"{found!r} instead of {MAGIC!r}"
        )


def load_gguf(path: Path, dtype: Any = "auto") -> tuple[PreTrainedModel, Any]:
    """Dense model of a GGUF file, in evaluation mode, and its tokenizer with its chat template.

    Args:
        dtype: of the parameters; "auto" is bfloat16, whatever types the file holds.

    Raises:
        ImportError: the packages that read GGUF are missing.
        ValueError: a damaged or split file, one in NVFP4, an architecture that transformers does
            not convert, or one that leaves parameters without a tensor of the file.
    """
    _require_packages(path)
    dtype = torch.bfloat16 if dtype == "auto" else dtype
    reader = _read(path)
    _refuse_nvfp4(reader, path)
    architecture, origin = _text(reader, "general.architecture"), describe_source(reader)
    with tempfile.TemporaryDirectory() as folder:
        # Alone in a folder, so that no other model's files beside it are taken for its own.
        (Path(folder) / path.name).symlink_to(path.absolute())
        source = {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
        with _naming(path, architecture):
            config = AutoConfig.from_pretrained(**source)
        restore_rope_scaling(config, reader, path)
        del reader  # objects for every token of the vocabulary
        model_class = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        options = source | _dequantize() | {"config": config, "dtype": dtype}
        with _naming(path, architecture):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model, info = model_class.from_pretrained(**options, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{path}: expected a tensor for every parameter, found none for "
            f"{', '.join(sorted(info['missing_keys'])[:5])}"
        )
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = path.stem
    tokenizer.init_kwargs["name_or_path"] = path.stem
    setattr(model, SOURCE, origin)
    return model.eval(), tokenizer


def describe_source(reader: Any) -> str:
    """What NVFP4's errors add to: the block types in a file, "" if it holds plain floats alone."""
    types = {tensor.tensor_type.name for tensor in reader.tensors}
    quantized = ", ".join(sorted(types.difference(UNQUANTIZED)))
    return f"weights came from a GGUF file: {quantized}; errors add up" if quantized else ""


def _require_packages(path: Path) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{path}: reading GGUF files needs {' and '.join(missing)}; run: "
            "pip install 'arc-ao[gguf]'"
        )


def _read(path: Path) -> Any:
    """gguf's reader of a whole, unsplit file; tensors stay on disk."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        reason = f"expected a whole GGUF file, this one ends early or is damaged ({error})"
        raise ValueError(f"{path}: {reason}") from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise ValueError(
            f"{path}: expected a whole model, found one of {parts.contents()} parts; join them "
            "with llama.cpp's gguf-split first"
        )
    return reader


def _refuse_nvfp4(reader: Any, path: Path) -> None:
    """Transformers' loader leaves out the scales of tensors, or does not know the type."""
    if any(tensor.tensor_type.name == "NVFP4" for tensor in reader.tensors):
        raise ValueError(
            f"{path}: expected types that transformers converts, found NVFP4; take the model's "
            "Hugging Face directory instead"
        )


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "unknown" if field is None else str(field.contents())


def _dequantize() -> dict[str, Any]:
    """The option that makes transformers' loader dequantize, where it would not by default."""
    gguf_config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_config is None else {"quantization_config": gguf_config(dequantize=True)}


@contextmanager
def _naming(path: Path, architecture: str) -> Iterator[None]:
    """Errors of transformers' loader name the file and its architecture."""
    try:
        yield
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} does not convert this GGUF file of "
            f"architecture {architecture!r} ({error}); take the model's Hugging Face directory "
            "instead"
        ) from error
