"""A Llama with random weights in bf16 as a GGUF file, for llama.cpp to run and to quantize.

Names are llama.cpp's. Query and key rows are in its order (rotary pairs side by side), which for
random weights is no different from any other. Weights are written one by one: no more memory than
the largest of them takes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

STANDARD_DEVIATION = 0.02  # of weights, as transformers initializes a Llama
RMS_EPS, ROPE_BASE = 1e-6, 10000.0  # as LlamaConfig


def tensors(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape [out_features, in_features] of each weight of a Llama, [hidden] of a norm."""
    hidden, inner = args.hidden, args.intermediate
    keys = args.kv_heads * (hidden // args.heads)
    yield "token_embd.weight", (args.vocabulary, hidden)
    for i in range(args.layers):
        yield f"blk.{i}.attn_norm.weight", (hidden,)
        yield f"blk.{i}.attn_q.weight", (hidden, hidden)
        yield f"blk.{i}.attn_k.weight", (keys, hidden)
        yield f"blk.{i}.attn_v.weight", (keys, hidden)
        yield f"blk.{i}.attn_output.weight", (hidden, hidden)
        yield f"blk.{i}.ffn_norm.weight", (hidden,)
        yield f"blk.{i}.ffn_gate.weight", (inner, hidden)
        yield f"blk.{i}.ffn_up.weight", (inner, hidden)
        yield f"blk.{i}.ffn_down.weight", (hidden, inner)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (args.vocabulary, hidden)


def write_bf16(path: Path, args: argparse.Namespace) -> None:
    """A Llama without a tokenizer: random weights in bf16, norms of one in fp32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(2 * args.prompt + args.tokens)
    writer.add_embedding_length(args.hidden)
    writer.add_feed_forward_length(args.intermediate)
    writer.add_block_count(args.layers)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.hidden // args.heads)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(args.vocabulary)
    writer.add_tokenizer_model("none")
    bf16, fp32 = gguf.GGMLQuantizationType.BF16, np.dtype(np.float32)
    for name, shape in tensors(args):
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, fp32, 4 * shape[0])
        else:  # a dtype of two bytes: with one, the shape would count bytes
            size = 2 * shape[0] * shape[1]
            writer.add_tensor_info(name, shape, np.dtype(np.uint16), size, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(args.seed)
    for _, shape in tensors(args):
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        weight = generator.standard_normal(shape, np.float32)
        weight *= STANDARD_DEVIATION
        writer.write_tensor_data(gguf.quants.quantize(weight, bf16))
    writer.close()
