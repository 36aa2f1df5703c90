"""Write a quantized model as a checkpoint that engines without arc_ao load.

The base of every linear is an ordinary NVFP4 layer. Residual columns and exact scales go to the
side file, from which `import_checkpoint` makes the same model again, bit for bit. GGUF, one file of
another kind, has the base alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from arc_ao.calibration.data import to_batches
from arc_ao.checkpoints import compressed_tensors, gguf, modelopt, side_file
from arc_ao.checkpoints.input_scales import HEADROOM, measure_input_scales
from arc_ao.checkpoints.layer import (
    NVFP4Layer,
    refuse_unholdable,
    refuse_unshared,
    split,
)
from arc_ao.checkpoints.model_files import INDEX
from arc_ao.output_folder import new_folder, refuse_taken
from arc_ao.progress import Progress
from arc_ao.summary import arc_tensors
from arc_ao.tensor import ARCTensor

Format = Literal["compressed-tensors", "modelopt", "gguf"]
FORMATS: dict[str, Any] = {form.METHOD: form for form in (compressed_tensors, modelopt, gguf)}


def export_checkpoint(
    model: PreTrainedModel,
    directory: str | Path,
    format: Format = "compressed-tensors",
    *,
    tokenizer: Any = None,
    calibration_data: Iterable[Any] | None = None,
    max_length: int = 512,
    headroom: float = HEADROOM,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Write a model quantized with `exportable=True` to a new directory.

    Args:
        format: "compressed-tensors" (vLLM, SGLang, transformers) or "modelopt" (TensorRT-LLM,
            vLLM, SGLang), of safetensors; or "gguf" (llama.cpp), the base alone in `model.gguf`.
        tokenizer: saved beside the model; in GGUF, part of the file.
        calibration_data: as `quantize_` takes it, for the static scales of inputs; not needed with
            activation_scale="static", whose scales are written as they are, activation="bf16", or
            GGUF, which has no such scales.
        max_length: strings are cut after this many tokens.
        headroom: what inputs may exceed the calibration data's largest magnitude by.
        max_shard_size: of a file of weights, such as "5GB"; GGUF has one file.

    Returns:
        The directory, which is complete or absent.

    Raises:
        FileExistsError: `directory` exists and is not empty. TypeError: not a transformers model.
        ImportError: GGUF without the package gguf.
        ValueError: an unknown format, a model without quantized linears, layers that other engines
            cannot hold or run as one, or missing calibration data, naming the layers; in GGUF, an
            architecture or a tokenizer that llama.cpp does not have.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not headroom >= 1:
        raise ValueError(f"headroom: expected at least 1, got {headroom}")
    refuse_taken(directory)
    tensors = _checked_tensors(model)
    if format == gguf.METHOD:
        return gguf.export(model, directory, tokenizer)
    scales = _input_scales(
        model, tensors, calibration_data, tokenizer, max_length, headroom, progress
    )
    parts = {name: split(tensor, scales.get(name)) for name, tensor in tensors.items()}
    layers = {name: layer for name, (layer, _) in parts.items()}
    refuse_unshared(layers, _linears(model))
    with new_folder(directory) as folder:
        _write_weights(model, layers, FORMATS[format], folder, max_shard_size)
        _write_index(folder)
        _refuse_renamed(folder, layers)
        side_file.write(folder, {name: extras for name, (_, extras) in parts.items()})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(directory)


def _checked_tensors(model: nn.Module) -> dict[str, ARCTensor]:
    """Quantized weights of a model that can be exported."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export_checkpoint: expected a transformers model, got {type(model).__name__}"
        )
    tensors = arc_tensors(model)
    if not tensors:
        raise ValueError(
            "export_checkpoint: expected a model quantized by arc_ao.quantize_, found no ARCTensor"
        )
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and isinstance(getattr(head, "weight", None), ARCTensor):
        raise ValueError(
            "export_checkpoint: the output head is quantized, but config.tie_word_embeddings ties "
            "it to the embedding. Leave it out with filter_fn"
        )
    refuse_unholdable(tensors)
    return tensors


def _input_scales(
    model: nn.Module,
    tensors: Mapping[str, ARCTensor],
    data: Iterable[Any] | None,
    tokenizer: Any,
    max_length: int,
    headroom: float,
    progress: bool,
) -> dict[str, Tensor]:
    """Outer scales of the inputs of W4A4 linears: their own static ones, or measured."""
    own = {n: t.act_outer_scale for n, t in tensors.items() if t.act_outer_scale is not None}
    dynamic = {n: t for n, t in tensors.items() if t.quantizes_input and n not in own}
    if not dynamic:
        return own
    if data is None:
        raise ValueError(
            f"{next(iter(dynamic))} and {len(dynamic) - 1} more: expected calibration_data, found "
            "None; other engines scale activations by constants. Pass batches of input ids (a few "
            "thousand tokens of typical text)"
        )
    bar = Progress({"calibrate": 1.0}, show=progress)
    batches = to_batches(data, tokenizer, max_length)
    measured = measure_input_scales(model, dynamic, batches, headroom, bar)
    bar.close()
    return own | measured


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _unquantized(model: nn.Module, layers: Mapping[str, NVFP4Layer], form: Any) -> list[str]:
    """What a configuration has to exclude: linears, and modules with fused experts."""
    ignored = [name for name in _linears(model) if name not in layers]
    for name, module in model.named_modules():
        experts = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
        if experts and not isinstance(module, nn.modules.conv._ConvNd):
            ignored.append(form.ignore_pattern(name))
    return ignored


def _write_weights(
    model: PreTrainedModel,
    layers: Mapping[str, NVFP4Layer],
    form: Any,
    directory: Path,
    max_shard_size: int | str,
) -> None:
    """Weights, config.json and generation_config.json, through transformers' own saving."""
    state = {key: t for key, t in model.state_dict().items() if not isinstance(t, ARCTensor)}
    for name, layer in layers.items():
        found = form.layer_tensors(layer).items()
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in found}
    config = form.quantization_config(layers, _unquantized(model, layers, form))
    with _without_quantizer(model, config | {side_file.KEY: side_file.config_entry()}):
        model.save_pretrained(directory, state_dict=state, max_shard_size=max_shard_size)
    if form is modelopt:
        legacy = json.dumps(modelopt.legacy_config(config), indent=2) + "\n"
        (directory / modelopt.CONFIG_FILE).write_text(legacy)


@contextmanager
def _without_quantizer(model: PreTrainedModel, config: dict[str, Any]) -> Iterator[None]:
    """Inside, transformers saves what it is given, and `config` as the quantization's."""
    missing = object()
    quantizer = model.__dict__.pop("hf_quantizer", missing)
    before = getattr(model.config, "quantization_config", missing)
    model.config.quantization_config = config
    try:
        yield
    finally:
        if quantizer is not missing:
            model.hf_quantizer = quantizer
        if before is missing:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def _write_index(directory: Path) -> None:
    """An index of the weights, also of a single file: engines then read no other file."""
    if (directory / INDEX).is_file():
        return
    weight_map, size = {}, 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                weight_map[name] = path.name
                size += file.get_tensor(name).nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _refuse_renamed(directory: Path, layers: Mapping[str, NVFP4Layer]) -> None:
    """Refuse a model whose checkpoints have other names than its modules: the side file and the
    configuration would name nothing."""
    written = json.loads((directory / INDEX).read_text())["weight_map"]
    renamed = [name for name in layers if f"{name}.weight_scale" not in written]
    if renamed:
        raise ValueError(
            f"{renamed[0]}: expected checkpoints of this model to have its modules' names, found "
            "others; export does not support such models yet"
        )
