"""A GGUF file of a quantized model, written tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from arc_ao.checkpoints.gguf_families import family_of, write_hyperparameters
from arc_ao.checkpoints.gguf_tensors import ARRAYS, file_tensors
from arc_ao.checkpoints.gguf_tokenizer import write_tokenizer


def write_file(
    path: Path, model: PreTrainedModel, tokenizer: Any, dense: Mapping[str, str]
) -> None:
    """Write a new file; needs no more memory than its largest tensor takes.

    Args:
        tokenizer: None for a file that takes token ids alone.
        dense: names of quantized linears whose base is written unquantized.

    Raises:
        ValueError: a model, or a tokenizer, that llama.cpp would not do the same as.
    """
    family = family_of(model)
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type("model")
    writer.add_name(Path(model.name_or_path).name or path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_NVFP4)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_hyperparameters(writer, model.config)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        write_tokenizer(writer, tokenizer, model.config.vocab_size)
    tensors = list(file_tensors(model, family, dense))
    for tensor in tensors:
        kind, dtype = gguf.GGMLQuantizationType[tensor.kind], np.dtype(ARRAYS[tensor.kind])
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.array())
    writer.close()
