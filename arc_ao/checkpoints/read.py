"""Read NVFP4 checkpoints of other libraries, and our own exports, into ARCTensors.

Layers are told by their tensors, not by the configuration: `weight_packed` (compressed-tensors,
AutoRound), or a `weight` in uint8 (ModelOpt). The configuration says whether activations are
quantized. Weights in FP8, which checkpoints of several precisions have beside, are dequantized.
The rest goes through transformers as in any other checkpoint: names, tied weights, dtypes.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from arc_ao.checkpoints import compressed_tensors, modelopt, side_file
from arc_ao.checkpoints.files import CheckpointFiles, quantization_of, read_config
from arc_ao.checkpoints.fp8 import dequantize_fp8
from arc_ao.checkpoints.layer import Extras, NVFP4Layer, join
from arc_ao.checkpoints.model_files import auto_class, load_config
from arc_ao.quantized_linear import set_weight
from arc_ao.summary import SOURCE, arc_tensors, model_bytes, summarize
from arc_ao.tensor import ARCTensor

METHODS = ("compressed-tensors", "modelopt", "modelopt_fp4", "auto-round")
FP8_SUFFIXES = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
EXPERTS = ".experts."
# Of key-value caches, attention and outputs, and a shape that the weight has anyway.
PASSED_OVER = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale", "weight_shape")


@dataclass
class Contents:
    """What a directory holds.

    Attributes:
        layers: NVFP4 layers by the name of their linear.
        dense: every other tensor of the model, by its name.
        dequantized: names of linears in FP8, and of experts that the model keeps in one tensor.
        passed_over: tensors that nothing here computes with.
        extras: of the side file, by linear.
    """

    layers: dict[str, NVFP4Layer] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    dequantized: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    extras: dict[str, Extras] = field(default_factory=dict)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory's configuration speaks of NVFP4 as `import_checkpoint` reads it."""
    if not (directory / "config.json").is_file():
        return False
    quantization = quantization_of(directory, read_config(directory))
    said = json.dumps(quantization).lower()
    return quantization.get("quant_method") in METHODS and ("nvfp4" in said or "nv_fp" in said)


def import_checkpoint(
    directory: str | Path,
    *,
    dtype: Any = "auto",
    residuals: bool = True,
    activation_scale: str | None = None,
) -> PreTrainedModel:
    """Load an NVFP4 checkpoint of compressed-tensors, ModelOpt or AutoRound for our kernels.

    `save_pretrained` then saves it in our form. A checkpoint of `export_checkpoint` gives the
    exported model again, bit for bit.

    Args:
        dtype: of the other parameters; "auto" is that of the checkpoint.
        residuals: whether to read the side file of our own exports; without it the base alone is
            loaded, as other engines do.
        activation_scale: "token" for outer scales of activations by row, which is more accurate, or
            "static" for the checkpoint's constants; None: as the side file says, or "static" where
            there are constants.

    Returns:
        The model in evaluation mode, in the class that config.json names.

    Raises:
        FileNotFoundError: no config.json, or no file of weights. ValueError: nothing in NVFP4,
            tensors that arc_ao does not compute with, damaged ones, or weights that the model lacks
            or the checkpoint does, naming them.
    """
    path = Path(directory)
    if activation_scale not in (None, "token", "static"):
        raise ValueError(
            f"activation_scale: expected 'token', 'static' or None, got {activation_scale!r}"
        )
    config = load_config(path)
    dtype = (config.dtype or torch.bfloat16) if dtype == "auto" else dtype
    contents = read_contents(path, dtype, residuals=residuals)
    model_class = getattr(transformers, (config.architectures or [""])[0], auto_class(config))
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    _dequantize_merged(contents, _linears(model_class, config), dtype)
    tensors = {
        name: join(name, layer, contents.extras.get(name), dtype, activation_scale)
        for name, layer in contents.layers.items()
    }
    model = _build(model_class, config, dtype, contents, tensors)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    _record(model, path, contents)
    return model


def read_contents(path: Path, dtype: torch.dtype, *, residuals: bool = True) -> Contents:
    """Read all tensors of a directory.

    Args:
        dtype: that FP8 weights are dequantized to.

    Raises:
        as `import_checkpoint`.
    """
    contents = Contents()
    with CheckpointFiles(path) as files:
        taken: set[str] = set()
        for name in files:
            form = form_of(files, name)
            if form is not None:
                layer = name.rpartition(".")[0]
                contents.layers[layer] = read_layer(files, layer, form)
                taken |= {f"{layer}.{suffix}" for suffix in form.SUFFIXES}
            elif name.endswith(".weight") and files.dtype(name) == "F8_E4M3":
                layer = name.rpartition(".")[0]
                contents.dense[name] = _read_fp8(files, layer, dtype)
                contents.dequantized.append(layer)
                taken |= {f"{layer}.{suffix}" for suffix in FP8_SUFFIXES}
        for name in files:
            if name.rpartition(".")[2] in PASSED_OVER:
                contents.passed_over.append(name)
            elif name not in taken:
                contents.dense[name] = files.read(name)
    if not contents.layers:
        raise ValueError(f"{path}: expected linears in NVFP4, found none")
    if residuals:
        contents.extras = _read_extras(path, contents)
    return contents


def form_of(files: CheckpointFiles, name: str) -> Any:
    """The format module whose layer a tensor is the codes of, or None.

    Raises:
        ValueError: codes of a format other than NVFP4, naming the layer.
    """
    layer, _, last = name.rpartition(".")
    if last == compressed_tensors.WEIGHT:
        form, expected = compressed_tensors, "weight_global_scale"
    elif last == modelopt.WEIGHT and files.dtype(name) in ("U8", "I8", "I32"):
        form, expected = modelopt, "weight_scale_2"
    else:
        return None
    scale = f"{layer}.weight_scale"
    is_nvfp4 = files.dtype(name) == "U8" and scale in files and files.dtype(scale) == "F8_E4M3"
    if not is_nvfp4 or f"{layer}.{expected}" not in files:
        raise ValueError(
            f"{layer}: expected NVFP4, which has {last} in uint8, weight_scale in e4m3 and "
            f"{expected}; found {last} in {files.dtype(name)} and "
            f"{_described(files, layer)}. Other formats are not supported"
        )
    return form


def _described(files: CheckpointFiles, layer: str) -> str:
    found = sorted(files.suffixes(layer))
    return ", ".join(f"{suffix} ({files.dtype(f'{layer}.{suffix}')})" for suffix in found)


def read_layer(files: CheckpointFiles, layer: str, form: Any) -> NVFP4Layer:
    """One layer of a format module.

    Raises:
        ValueError: tensors that nothing here computes with, naming the layer and them.
    """
    known = (*form.SUFFIXES, *PASSED_OVER, "bias")
    strange = [suffix for suffix in files.suffixes(layer) if suffix not in known]
    if strange:
        raise ValueError(
            f"{layer}: expected {', '.join(form.SUFFIXES)}, found {', '.join(strange)}, too, which "
            "arc_ao does not compute with; export the model anew as plain NVFP4"
        )
    names = {suffix: f"{layer}.{suffix}" for suffix in form.SUFFIXES}
    tensors = {suffix: files.read(name) for suffix, name in names.items() if name in files}
    said = form.quantizes_input(files.quantization, layer)
    has_scale = form.SUFFIXES[-1] in tensors
    return form.read_layer(tensors, has_scale if said is None else said)


def _read_fp8(files: CheckpointFiles, layer: str, dtype: torch.dtype) -> Tensor:
    for suffix in ("weight_scale", "weight_scale_inv"):
        if f"{layer}.{suffix}" in files:
            scale = files.read(f"{layer}.{suffix}")
            return dequantize_fp8(layer, files.read(f"{layer}.weight"), scale, dtype)
    raise ValueError(f"{layer}: expected a scale of its FP8 weight, found none")


def _read_extras(path: Path, contents: Contents) -> dict[str, Extras]:
    """The side file's, which speak of layers that are there.

    Raises:
        FileNotFoundError: the configuration names a side file that is gone. ValueError: it has
            other layers than the checkpoint, naming one.
    """
    extras = side_file.read(path)
    quantization = quantization_of(path, read_config(path))
    if side_file.KEY in quantization and not extras:
        raise FileNotFoundError(
            f"{path}: expected {side_file.PATH}, which config.json names, found no such file; copy "
            "it, or import the base alone with residuals=False"
        )
    differing = extras.keys() ^ contents.layers.keys() if extras else set()
    if differing:
        raise ValueError(
            f"{min(differing)}: expected the same layers in the checkpoint and in "
            f"{side_file.PATH}, found it in one of them; the checkpoint was changed after its "
            "export. Export it again, or import it with residuals=False"
        )
    return extras


def _linears(model_class: Any, config: Any) -> set[str]:
    """Names of the linears of a model, which is built without memory."""
    is_model = issubclass(model_class, PreTrainedModel)
    make = model_class._from_config if is_model else model_class.from_config
    with torch.device("meta"):
        skeleton = make(config)
    return {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}


def _dequantize_merged(contents: Contents, linears: set[str], dtype: torch.dtype) -> None:
    """Dequantize experts that the model keeps in one tensor: that has no NVFP4 form here."""
    merged = [name for name in contents.layers if EXPERTS in name and name not in linears]
    for name in merged:
        layer = contents.layers.pop(name)
        plain = join(name, layer, contents.extras.get(name), dtype)
        contents.dense[f"{name}.weight"] = plain.dequantize(dtype)
        contents.dequantized.append(name)


def _build(
    model_class: Any,
    config: Any,
    dtype: torch.dtype,
    contents: Contents,
    tensors: Mapping[str, ARCTensor],
) -> PreTrainedModel:
    """The model with all its weights, packed for their device."""
    state = contents.dense | {f"{name}.weight": tensor for name, tensor in tensors.items()}
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    for kind, names in (("checkpoint", "missing_keys"), ("model", "unexpected_keys")):
        if report[names]:
            raise ValueError(
                f"{min(report[names])} and {len(report[names]) - 1} more: expected in the {kind}, "
                "found none; the checkpoint is damaged, or of another model than config.json says"
            )
    found = arc_tensors(model)
    if len(found) != len(tensors):
        lost = min(tensors.keys() - found.keys())
        raise ValueError(
            f"{lost}: expected a linear of the model, found something else; arc_ao computes with "
            "linears in NVFP4 alone"
        )
    for name, tensor in found.items():
        set_weight(model.get_submodule(name), tensor.detach().packed())
    return model.eval()


def _record(model: PreTrainedModel, path: Path, contents: Contents) -> None:
    """Keep on the model what was imported, and what became of the rest."""
    method = quantization_of(path, read_config(path)).get("quant_method")
    skipped = dict.fromkeys(
        contents.dequantized, "in FP8, or an expert of a merged tensor: dequantized"
    )
    if skipped:
        warnings.warn(
            f"{len(skipped)} linears are dequantized, which are in FP8 or experts that the model "
            f"keeps in one tensor: {', '.join(skipped)}",
            stacklevel=3,
        )
    skipped |= dict.fromkeys(contents.passed_over, "scales of what is not quantized here")
    setattr(model, SOURCE, f"imported from {method}")
    summarize(model, [], skipped, model_bytes(model))
