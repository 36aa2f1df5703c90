"""Loads an exported checkpoint with transformers and compressed-tensors, where arc_ao is not there.

Run by check_exports.py inside a peer's environment. Writes logits [B, T, V] of four ways to run it:
weights alone dequantized (w4a16), or activations quantized, too (w4a4), in bfloat16 and float32.
compressed-tensors unpacks to bfloat16 and, with activations quantized, refuses a model in float32:
there its own functions unpack the weights in float32.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter, convert_checkpoint
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def load(checkpoint: Path, dtype: torch.dtype, weights_only: bool) -> nn.Module:
    """The model as transformers loads it, for inference."""
    config = CompressedTensorsConfig(dequantize=True) if weights_only else None
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **given).eval()


def widen(model: nn.Module, checkpoint: Path) -> None:
    """Everything to float32, and weights unpacked anew in it."""
    nn.Module.float(model)
    stored = load_file(checkpoint / "model.safetensors")
    for name, module in model.named_modules():
        if f"{name}.weight_packed" not in stored:
            continue
        packed = stored[f"{name}.weight_packed"]
        codes = unpack_fp4_from_uint8(
            packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32
        )
        module.weight.data = dequantize(
            x_q=codes,
            scale=stored[f"{name}.weight_scale"].float(),
            args=module.quantization_scheme.weights,
            global_scale=stored[f"{name}.weight_global_scale"],
            dtype=torch.float32,
        )


@torch.no_grad()
def all_logits(checkpoint: Path, ids: Tensor) -> dict[str, Tensor]:
    """Logits by way."""
    found = {}
    for name in ("bfloat16", "float32"):
        model = load(checkpoint, getattr(torch, name), weights_only=True)
        found[f"w4a16.{name}"] = model(ids).logits
    model = load(checkpoint, torch.bfloat16, weights_only=False)
    found["w4a4.bfloat16"] = model(ids).logits  # this forward unpacks
    widen(model, checkpoint)
    found["w4a4.float32"] = model(ids).logits
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "modelopt", "ids", "outputs", "converted", "info"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    ids = load_file(args.ids)["ids"]
    save_file(all_logits(args.checkpoint, ids), args.outputs)
    ignore = json.loads((args.modelopt / "hf_quant_config.json").read_text())
    converter = ModelOptNvfp4Converter(
        ignore=ignore["quantization"]["exclude_modules"], targets=["re:.*proj$"]
    )
    convert_checkpoint(args.modelopt, args.converted, converter)
    names = ("torch", "transformers", "compressed-tensors")
    versions = {name: importlib.metadata.version(name) for name in names}
    args.info.write_text(json.dumps(versions), encoding="utf-8")


if __name__ == "__main__":
    main()
