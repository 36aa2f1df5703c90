"""Exported GGUF files in the hands of llama.cpp.

    python -m benchmarks.peers.environments llama_cpp        # once; compiles llama.cpp
    python -m benchmarks.peers.check_gguf [--model DIR ...]

quantizes a model with residual blocks, exports its base as GGUF, and lets llama.cpp score held-out
tokens. Its perplexity is compared with ours of the same base in fp32, with activations as they are:
llama.cpp rounds them to 8 bits on a CPU. Its tokenizer must give the tokens that the model's does.
Exit status 1 where something differs; the last line of stdout is one JSON document.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arc_ao import export_checkpoint
from arc_ao.checkpoints.gguf import FILE
from arc_ao.checkpoints.layer import split
from arc_ao.formats import nvfp4
from arc_ao.shipped import HELDOUT_TEXT
from arc_ao.summary import arc_tensors
from benchmarks.peers import environments, run
from benchmarks.peers.check_exports import (
    MODELS,
    exportable,
    heldout_ids,
    negative_log_likelihood,
)

PEER = "llama_cpp"
RUNNER = Path(__file__).resolve().parent / "with_exported_gguf.py"
LIMIT = 0.01  # of the perplexity
TEXT_CHARACTERS = 2000  # for the tokenizers


def check(model_directory: Path, work: Path, python: Path, tokens: int = 2048) -> dict[str, Any]:
    """Export a model, let llama.cpp score it, compare.

    Args:
        work: empty folder. python: interpreter of the peer's environment.

    Returns:
        Figures, and under "failed" what differs.

    Raises:
        RuntimeError: the peer's process failed.
    """
    model, tokenizer, _ = exportable(model_directory)
    path = export_checkpoint(model, work / "gguf", "gguf", tokenizer=tokenizer) / FILE
    ids = heldout_ids(tokenizer, tokens)
    text = HELDOUT_TEXT.read_text()[:TEXT_CHARACTERS]
    theirs = score(path, ids, text, work, python)
    figures = {"model": model_directory.name, "failed": [], "versions": theirs["versions"]}
    figures["tensors"] = theirs["tensors"]
    compare_perplexity(model, ids, theirs["nll"], figures)
    same = theirs["tokens"] == tokenizer(text, add_special_tokens=False).input_ids
    figures["tokens"] = {"count": len(theirs["tokens"]), "equal": same}
    figures["failed"] += [] if same else ["tokens"]
    return figures


def score(path: Path, ids: Tensor, text: str, work: Path, python: Path) -> dict[str, Any]:
    """What llama.cpp's process says of a file."""
    files = {name: work / name for name in ("ids", "text", "result")}
    with files["ids"].open("wb") as file:
        np.save(file, ids.numpy().astype(np.int32))
    files["text"].write_text(text, encoding="utf-8")
    command = [str(python), str(RUNNER), str(path), "--threads", str(torch.get_num_threads())]
    command += [part for name, file in files.items() for part in (f"--{name}", str(file))]
    if error := run.run_process(command, work / "log", 3600.0):
        raise RuntimeError(f"{PEER}: {error}")
    return json.loads(files["result"].read_text(encoding="utf-8"))


def compare_perplexity(
    model: nn.Module, ids: Tensor, theirs: float, figures: dict[str, Any]
) -> None:
    """Perplexities of both sides into `figures`; ours as it runs here for comparison."""
    w4a4 = loss(model, ids)
    use_base_weights(model)
    ours = loss(model.float(), ids)
    named = {"ours": ours, "llama.cpp": theirs, "ours, W4A4 with residuals": w4a4}
    figures["perplexity"] = {name: math.exp(value) for name, value in named.items()}
    figures["failed"] += ["perplexity"] if abs(math.expm1(theirs - ours)) > LIMIT else []


def use_base_weights(model: nn.Module) -> None:
    """Put the base of every quantized linear, fp32, in its place."""
    for name, tensor in arc_tensors(model).items():
        layer, _ = split(tensor, None)
        weight = nvfp4.dequantize(layer.qdata, layer.scale, layer.outer_scale)
        model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    """Nats a token of windows [B, T], one at a time."""
    found = [negative_log_likelihood(model(row[None]).logits, row[None]) for row in ids]
    return sum(found) / len(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, default=2048, help="held-out tokens (2048)")
    args = parser.parse_args(argv)
    python = environments.interpreter(PEER)
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
