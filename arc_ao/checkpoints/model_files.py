"""What a Hugging Face folder must hold, said in one sentence where it does not.

transformers tells of a damaged file by the error of its parser, which names none, and fills weights
that are missing with random numbers. Here the file is named, before anything large is read.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"  # what Git LFS leaves where a large file was not fetched
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
SAMPLE = "A text 1 \u6587"  # something of it is known to every vocabulary
FLAG = "trust_remote_code=True (--trust-remote-code)"


def load_config(directory: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Configuration of the model in a folder.

    Raises:
        ValueError: one that transformers cannot read or does not know, or code of the folder's own
            that is not trusted.
    """
    path = Path(directory) / "config.json"
    fields = _read_json(path)
    own_code = isinstance(fields, dict) and "auto_map" in fields
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        if own_code and not trust_remote_code:
            raise ValueError(_untrusted(directory)) from error
        raise ValueError(
            f"{path}: expected a model that transformers {transformers.__version__} knows, found "
            f"model_type {fields.get('model_type') if isinstance(fields, dict) else None!r} "
            f"({_first_sentence(error)}); a newer version may know it"
        ) from error
    architecture = (config.architectures or [""])[0]
    if own_code and not trust_remote_code and not hasattr(transformers, architecture):
        raise ValueError(_untrusted(directory))
    return config


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """Tokenizer of the model in a folder.

    Raises:
        ValueError: there is none, or one that cannot be read. Without the file of its vocabulary
            transformers makes many kinds of nothing, to which every word is unknown.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # parsers of five formats, each with errors of its own
        reason = f"transformers {transformers.__version__}: {_first_sentence(error)}"
        raise ValueError(_no_tokenizer(directory, reason)) from error
    if not _knows_text(tokenizer):
        reason = f"a {type(tokenizer).__name__} of {len(tokenizer)} tokens, none of them text"
        raise ValueError(_no_tokenizer(directory, reason))
    return tokenizer


def _knows_text(tokenizer: Any) -> bool:
    ids = tokenizer(SAMPLE, add_special_tokens=False, verbose=False).input_ids
    return any(c.isalnum() for c in tokenizer.decode(ids, skip_special_tokens=True))


def _no_tokenizer(directory: str | Path, reason: str) -> str:
    return (
        f"{directory}: expected the model's tokenizer in its folder, found none that can be used "
        f"({reason}); put its files there, such as tokenizer.json and tokenizer_config.json"
    )


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether the folder brings Python files for its model."""
    return any(name in getattr(config, "auto_map", {}) for name in AUTO_CLASSES)


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers by which a model is opened that the library has no class for."""
    own = getattr(config, "auto_map", {})
    usual = AUTO_CLASSES[type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    return getattr(transformers, next((name for name in AUTO_CLASSES if name in own), usual))


def check_weight_files(directory: Path) -> None:
    """Refuse safetensors files that are not whole, or that an index names and are not there.

    Raises:
        ValueError: naming the file.
    """
    files = sorted(directory.glob("*.safetensors"))
    if (directory / INDEX).is_file():
        index = _read_json(directory / INDEX)
        files += [directory / name for name in sorted(set(index.get("weight_map", {}).values()))]
    for file in dict.fromkeys(files):
        _check_whole(file)


def _check_whole(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: expected a part of the model, as {INDEX} says, found no file")
    with file.open("rb") as start:
        if start.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{file}: expected weights, found a pointer of Git LFS; run `git lfs pull` there"
            )
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a whole safetensors file, this one ends early or is damaged "
            f"({error}); copy it again"
        ) from error


def refuse_unfit(directory: str | Path, info: dict[str, Any]) -> None:
    """Refuse weights that do not fill the model.

    Args:
        info: what `from_pretrained` says of its loading.

    Raises:
        ValueError: naming the first of those that are missing or have another shape.
    """
    for kind, what in (("missing_keys", "found none"), ("mismatched_keys", "found other shapes")):
        found = info.get(kind) or ()
        names = sorted(key if isinstance(key, str) else key[0] for key in found)
        if names:
            raise ValueError(
                f"{directory}: expected weights as config.json describes them, {what} for "
                f"{len(names)}: {', '.join(names[:3])}"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, this file is damaged ({error})") from error


def _untrusted(directory: str | Path) -> str:
    return (
        f"{directory}: expected a model of transformers, found one with code of its own (auto_map "
        f"in config.json); read that code, then give {FLAG} to run it"
    )


def _first_sentence(error: Exception) -> str:
    """Of an error of transformers, whose texts run over many lines."""
    text = " ".join(str(error).split())
    return text.split(". ")[0] or type(error).__name__
