"""Tensors of a GGUF file: NVFP4 blocks, llama.cpp's names, its order of rows.

    NAME.weight  NVFP4 (type 40)  64 values of a row in 36 bytes: four e4m3 scales, then four times
                                  16 codes in 8 bytes, code j in the low nibble of byte j, code
                                  j + 8 in the high one
    NAME.scale   fp32 [1]         the outer scale, multiplies on dequantize

Codes and scales are moved, never rounded again. Where a model's rotary embedding pairs the halves
of a head, llama.cpp's "llama" pairs neighbours: rows of q and k go with their scales.
"""

from collections.abc import Callable, Container, Iterator
from functools import partial
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from arc_ao.checkpoints.gguf import BLOCK
from arc_ao.checkpoints.gguf_families import ROPE_FREQS, Family, rope_divisors
from arc_ao.checkpoints.layer import check_layer, split
from arc_ao.formats.nvfp4 import bytes_of_blocks, dequantize
from arc_ao.tensor import ARCTensor

NVFP4 = "NVFP4"
SCALES = 4  # of a block
BLOCK_BYTES = SCALES + BLOCK // 2
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ARRAYS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, NVFP4: np.uint8}


class FileTensor(NamedTuple):
    """A tensor of the file, read when its turn comes."""

    name: str
    kind: str  # of gguf.GGMLQuantizationType, and of ARRAYS
    shape: tuple[int, ...]  # [N, bytes of a row] for NVFP4
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return int(np.prod(self.shape)) * np.dtype(ARRAYS[self.kind]).itemsize

    def array(self) -> np.ndarray:
        """The data as the file has it."""
        tensor = self.read().cpu().contiguous()
        if self.kind == "BF16":
            return tensor.view(torch.int16).numpy().view(np.uint16)
        return tensor.numpy()


def nvfp4_blocks(qdata: Tensor, scale: Tensor) -> Tensor:
    """Codes [N, K/2] and scales [N, K/16] of NVFP4 as blocks [N, 36 * K/64], all uint8."""
    pairs = bytes_of_blocks(qdata)  # [N, K/16, 8]
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)  # [N, K/16, 16]
    halves = codes[..., :8] | codes[..., 8:] << 4  # [N, K/16, 8]
    values = halves.unflatten(1, (-1, SCALES)).flatten(-2)  # [N, K/64, 32]
    return torch.cat((scale.unflatten(1, (-1, SCALES)), values), dim=-1).flatten(1)


def neighbouring_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] with the halves of each head interleaved."""
    halves = rows.unflatten(0, (heads, 2, -1))  # [heads, 2, D/2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


def file_tensors(
    model: PreTrainedModel, family: Family, dense: Container[str]
) -> Iterator[FileTensor]:
    """Every tensor of a model as the file has it.

    Args:
        dense: names of quantized linears whose base is written unquantized.

    Raises:
        ValueError: a parameter that llama.cpp has no name for.
    """
    tied, rename = model.config.tie_word_embeddings, _namer(model, family)
    for key, tensor in model.state_dict().items():
        if not (tied and key == "lm_head.weight"):
            linear = key.rpartition(".")[0]
            order = _row_order(model, family, linear)
            yield from _of_parameter(rename(key), tensor, linear, order, linear in dense)
    divisors = rope_divisors(model.config)
    if divisors is not None:
        yield FileTensor(ROPE_FREQS, "F32", tuple(divisors.shape), divisors.clone)


def _of_parameter(
    name: str, tensor: Tensor, linear: str, order: Callable[[Tensor], Tensor], dense: bool
) -> Iterator[FileTensor]:
    """A parameter's own tensor, and the scale of a quantized one."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, ARCTensor):
        kind = "F32" if tensor.dim() == 1 else KINDS[tensor.dtype]
        yield FileTensor(name, kind, shape, partial(_read_dense, tensor, kind, order))
    elif dense:
        yield FileTensor(name, KINDS[tensor.orig_dtype], shape, partial(_read_base, tensor, order))
    else:
        stored = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
        yield FileTensor(name, NVFP4, stored, partial(_read_blocks, linear, tensor, order))
        scale = tensor.outer_scale.reshape(1)
        yield FileTensor(f"{name.removesuffix('.weight')}.scale", "F32", (1,), scale.clone)


def _namer(model: PreTrainedModel, family: Family) -> Callable[[str], str]:
    """Names of llama.cpp by those of parameters."""
    layers = model.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture.upper()], layers)

    def rename(key: str) -> str:
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"{key}: expected a parameter that llama.cpp's {family.architecture!r} has, found "
                "another; merge or remove what was added to the model"
            )
        return found

    return rename


def _row_order(model: PreTrainedModel, family: Family, layer: str) -> Callable[[Tensor], Tensor]:
    """What becomes of the rows of a linear's weight, scales or bias."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }.get(layer.rpartition(".")[2])
    if heads is None or not family.pairs_neighbours:
        return _as_they_are
    return partial(neighbouring_pairs, heads=heads)


def _as_they_are(rows: Tensor) -> Tensor:
    return rows


def _read_dense(tensor: Tensor, kind: str, order: Callable[[Tensor], Tensor]) -> Tensor:
    rows = order(tensor.detach())
    return rows.float() if kind == "F32" else rows


def _read_base(tensor: ARCTensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    layer, _ = split(tensor, None)
    return order(dequantize(layer.qdata, layer.scale, layer.outer_scale, tensor.orig_dtype))


def _read_blocks(name: str, tensor: ARCTensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    layer, _ = split(tensor, None)
    check_layer(name, layer)
    return nvfp4_blocks(order(layer.qdata), order(layer.scale))
