"""What both sides of a peer's process share: files of batches and outputs, and a runner's main.

Runs inside a peer's environment, too, where arc_ao is not installed: torch, transformers and
safetensors alone. A batches file holds `00000.input_ids`, `00000.attention_mask`, `00001...`; a
folder of outputs one file a batch, `00000`, `00001`, ... in their order: logits are large, and both
sides hold those of one batch.
"""

import argparse
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

UNQUANTIZED = "none"  # recipe that changes nothing: the outputs must be the caller's own
NOT_QUANTIZED = ("lm_head", "pooler")  # the output head, and what no embedding depends on

Batches = list[dict[str, Tensor]]
Quantize = Callable[[nn.Module, str, str, Batches], tuple[nn.Module, dict[str, Any]]]


def write_batches(path: Path, batches: Batches) -> None:
    """Write tokenizer dicts of tensors."""
    tensors = {
        f"{i:05d}.{name}": tensor.clone(memory_format=torch.contiguous_format)
        for i, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    save_file(tensors, path)


def read_batches(path: Path) -> Batches:
    """Inverse of `write_batches`."""
    batches: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(load_file(path).items()):
        index, _, name = key.partition(".")
        batches.setdefault(index, {})[name] = tensor
    return list(batches.values())


def write_outputs(folder: Path, outputs: Iterable[Tensor]) -> None:
    """Write one file a batch into a folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, tensor in enumerate(outputs):
        save_file({"output": tensor.contiguous()}, folder / f"{i:05d}")


def output_files(folder: Path) -> list[Path]:
    """Files of `write_outputs` in their order."""
    return sorted(folder.iterdir())


def read_outputs(folder: Path) -> Iterator[Tensor]:
    """Inverse of `write_outputs`, once: one tensor at a time, whose file is then removed."""
    for path in output_files(folder):
        yield load_file(path)["output"]
        path.unlink()
    folder.rmdir()


def load_model(directory: Path, kind: str) -> nn.Module:
    """Encoder in fp32, or causal decoder in its checkpoint's dtype, for inference on the CPU."""
    from transformers import AutoModel, AutoModelForCausalLM

    if kind == "encoder":
        return AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


@torch.no_grad()
def model_outputs(model: nn.Module, kind: str, batches: Batches) -> Iterator[Tensor]:
    """Per batch: logits [B, T, V] in the model's dtype, or the mean hidden state over kept tokens
    [B, D] in fp32."""
    for batch in batches:
        if kind == "decoder":
            yield model(**batch, use_cache=False).logits
        else:
            yield _embeddings(model, batch)


def _embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden = model(**batch).last_hidden_state.float()  # [B, T, D]
    keep = batch["attention_mask"].unsqueeze(-1).float()  # [B, T, 1]
    return (hidden * keep).sum(1) / keep.sum(1)


def nvfp4_cost(layers: list[nn.Linear], extra: int = 0, adds: int = 0) -> dict[str, float]:
    """Stored bits per weight and extra multiply-adds of plain NVFP4 linears.

    A 4-bit code, an 8-bit scale for 16 of them, and two fp32 scales a linear (weight and input).
    `extra` counts values stored beside in 16 bits, `adds` the multiply-adds per token beside.
    """
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    bits = 4.5 + (64 * len(layers) + 16 * extra) / weights
    return {
        "linears": len(layers),
        "bits_per_weight": bits,
        "extra_multiply_adds": adds / weights,
    }


def run(quantize: Quantize, *packages: str) -> None:
    """A runner's command line: quantize by the recipe, evaluate, write outputs and facts.

    quantize: (model, recipe, kind, calibration) -> quantized model, facts about it.
    packages: distributions whose versions belong to the facts.
    """
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = load_model(args.model, args.kind)
    facts: dict[str, Any] = {}
    start, cpu_start = time.perf_counter(), time.process_time()
    if args.recipe != UNQUANTIZED:
        model, facts = quantize(model, args.recipe, args.kind, read_batches(args.calibration))
    seconds = {
        "quantize_seconds": time.perf_counter() - start,
        "quantize_cpu_seconds": time.process_time() - cpu_start,
    }
    write_outputs(args.outputs, model_outputs(model, args.kind, read_batches(args.evaluation)))
    names = ("torch", "transformers", *packages)
    versions = {name: importlib.metadata.version(name) for name in names}
    info = {"recipe": args.recipe, **seconds, "versions": versions, **facts}
    args.info.write_text(json.dumps(info), encoding="utf-8")


def parse() -> argparse.Namespace:
    """What run.py hands to a runner."""
    parser = argparse.ArgumentParser()
    for name in ("model", "calibration", "evaluation", "outputs", "info"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", choices=("encoder", "decoder"), required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
