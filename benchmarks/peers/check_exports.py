"""Exported checkpoints in the hands of transformers and compressed-tensors.

    python -m benchmarks.peers.environments compressed_tensors        # once
    python -m benchmarks.peers.check_exports [--model DIR ...]

quantizes a model with residual blocks, exports it as compressed-tensors and as ModelOpt, and runs
the first in the peer's process. Its logits are compared with those of the same base imported here,
without residual blocks: weights dequantized must give the same bits, with activations quantized the
negative log-likelihood may differ by rounding that falls the other way. The second goes through
compressed-tensors' converter, which must find the codes and scales of the first. Exit status 1
where something differs; the last line of stdout is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arc_ao import ARCConfig, export_checkpoint, import_checkpoint, quantize_
from arc_ao.calibration.data import text_batches
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import HELDOUT_TEXT, MIXED_TEXT, MODEL
from arc_ao.summary import arc_tensors
from benchmarks.common.checkout import ROOT
from benchmarks.peers import environments, run

MODELS = [MODEL, ROOT / "benchmarks" / "models" / "tiny_qwen3"]
PEER = "compressed_tensors"
ENVIRONMENTS = (PEER, "llmcompressor")  # the second has older releases of the same packages
# Of NLL in nats a token. In bfloat16 compressed-tensors scales and rounds activations in it, too,
# so that some get another code; only a gross error would show.
LIMITS = {"w4a4.bfloat16": 5e-2, "w4a4.float32": 1e-3}
ONE_ULP = 2.0**-23
WINDOW = 256


def check(model_directory: Path, work: Path, python: Path, tokens: int = 1024) -> dict[str, Any]:
    """Export a model twice, hand it to a peer's process, compare.

    Args:
        work: empty folder. python: interpreter of the peer's environment.

    Returns:
        Figures, and under "failed" what differs.

    Raises:
        RuntimeError: the peer's process failed.
    """
    model, tokenizer, calibration = exportable(model_directory)
    folders = {form: work / form for form in ("compressed-tensors", "modelopt")}
    for form, folder in folders.items():
        export_checkpoint(model, folder, form, calibration_data=calibration, progress=False)
    ids = heldout_ids(tokenizer, tokens)
    files = {name: work / name for name in ("ids", "outputs", "converted", "info")}
    save_file({"ids": ids}, files["ids"])
    command = [str(python), str(run.runner(PEER))]
    command += ["--checkpoint", str(folders["compressed-tensors"])]
    command += ["--modelopt", str(folders["modelopt"])]
    command += [part for name, path in files.items() for part in (f"--{name}", str(path))]
    if error := run.run_process(command, work / "log", 3600.0):
        raise RuntimeError(f"{PEER}: {error}")
    figures: dict[str, Any] = {"model": model_directory.name, "failed": []}
    figures["versions"] = json.loads(files["info"].read_text(encoding="utf-8"))
    compare_logits(folders["compressed-tensors"], ids, load_file(files["outputs"]), figures)
    compare_tensors(folders["compressed-tensors"], files["converted"], figures)
    return figures


def exportable(model_directory: Path) -> tuple[nn.Module, Any, list[Tensor]]:
    """A model quantized with residual blocks, its tokenizer, and its calibration batches."""
    model, tokenizer = load_model(model_directory)
    calibration = text_batches(tokenizer, MIXED_TEXT.read_text(), max_tokens=4096)
    config = ARCConfig(recipe="balanced", exportable=True)
    quantize_(model, config, calibration_data=calibration, progress=False)
    return model, tokenizer, calibration


def heldout_ids(tokenizer: Any, tokens: int) -> Tensor:
    """Windows [B, WINDOW] of the shipped held-out text."""
    text = HELDOUT_TEXT.read_text()
    return torch.cat(text_batches(tokenizer, text, window=WINDOW, max_tokens=tokens))


def compare_logits(
    checkpoint: Path, ids: Tensor, theirs: dict[str, Tensor], figures: dict[str, Any]
) -> None:
    """Negative log-likelihoods of both sides into `figures`, and what differs."""
    for way, logits in theirs.items():
        ours = our_logits(checkpoint, ids, way)
        pair = [negative_log_likelihood(y, ids) for y in (ours, logits)]
        equal = torch.equal(ours, logits)
        figures[way] = {"ours": pair[0], "theirs": pair[1], "equal": equal}
        if not equal and abs(pair[0] - pair[1]) > LIMITS.get(way, 0.0):
            figures["failed"].append(way)


@torch.no_grad()
def our_logits(checkpoint: Path, ids: Tensor, way: str) -> Tensor:
    """Logits of the base alone, computed here as `way` says."""
    bits, _, name = way.partition(".")
    model = import_checkpoint(checkpoint, dtype=getattr(torch, name), residuals=False)
    if bits == "w4a16":
        for layer, tensor in arc_tensors(model).items():
            weight = tensor.dequantize(torch.bfloat16).to(model.dtype)
            model.get_submodule(layer).weight = nn.Parameter(weight, requires_grad=False)
    return model(ids).logits


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """Mean over the tokens of ids [B, T] that have one before them."""
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()
    ).item()


def compare_tensors(ours: Path, converted: Path, figures: dict[str, Any]) -> None:
    """Our compressed-tensors export against what its converter makes of the ModelOpt one."""
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, converted))
    differing = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        if name.endswith("_global_scale"):  # the reciprocal of a reciprocal
            same = torch.allclose(a[name], b[name].reshape(1), rtol=ONE_ULP, atol=0.0)
        else:
            same = torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        differing += [] if same else [name]
    figures["converter"] = {"tensors": len(a), "differing": differing}
    figures["failed"] += ["converter"] if differing else []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens (1024)")
    parser.add_argument("--environment", choices=ENVIRONMENTS, default=PEER)
    args = parser.parse_args(argv)
    python = environments.interpreter(args.environment)
    rows = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as work:
            rows.append(check(model, Path(work), python, args.tokens))
        for name, value in rows[-1].items():
            print(f"{name:16s} {value}")
    print(json.dumps(rows))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
