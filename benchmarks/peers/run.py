"""Rows of other libraries: each quantizes in its own environment and process, and hands back the
model's outputs, which are measured here like our own.

    python -m benchmarks.peers.environments                 # once: one environment per peer
    python -m benchmarks.peers.run --peer llmcompressor --recipe gptq --text wiki.test.tokens

prints the encoder's mean 1 - cosine to fp32 on the lines of accuracy/encoder.py, or the peer's
error. `--recipe none` leaves the model as it is, `--recipe all` runs every recipe of the peer, and
`--plain` adds our plain NVFP4 with the scales of llmcompressor's `rtn`. The last line of stdout is
one JSON document.
"""

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.accuracy import embeddings
from benchmarks.common.headers import run_header
from benchmarks.peers import environments, peer_io

# Recipes that make a row of the record; what they mean is in with_<peer>.py.
PEERS: dict[str, list[str]] = {
    "llmcompressor": ["rtn", "rtn-mse", "rtn-expanded-mse", "gptq", "gptq-expanded-mse", "awq"],
    "modelopt": ["max", "max-builtin", "mse", "awq_lite", "svdquant"],
}
Kind = Literal["encoder", "decoder"]
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Warning|Exit|Interrupt)\b(:|$)")


@dataclass
class PeerResult:
    """What a peer made of a model: outputs, or the error that kept it from them."""

    outputs: Iterator[Tensor] | None  # per evaluation batch, read once; see peer_io.model_outputs
    error: str | None
    info: dict[str, Any] = field(default_factory=dict)  # seconds, versions, bits per weight, note


def runner(peer: str) -> Path:
    """The script that runs inside a peer's environment."""
    return Path(__file__).resolve().parent / f"with_{peer}.py"


def peer_outputs(
    peer: str,
    recipe: str,
    model_directory: Path,
    kind: Kind,
    calibration: list[dict[str, Tensor]],
    evaluation: list[dict[str, Tensor]],
    work: Path,
    *,
    environments_root: Path = environments.ENVIRONMENTS,
    threads: int | None = None,
    seed: int = 0,
    timeout: float = 7200.0,
) -> PeerResult:
    """Quantize a model with another library and evaluate it there.

    Args:
        peer, recipe: of PEERS, or recipe "none" for the model as it is.
        model_directory: a Hugging Face model; encoders run in fp32, decoders in their own dtype.
        calibration, evaluation: tokenizer dicts with input_ids, attention_mask [B, T].
        work: folder for the files that go to and fro; the peer's own output stays there as a log.
        threads: of the peer's process, default as many as here.
        timeout: seconds.

    Returns:
        Outputs and facts, or the peer's error. Never both, never neither.

    Raises:
        ValueError: no such peer.
    """
    if peer not in PEERS:
        raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {peer!r}")
    try:
        python = environments.interpreter(peer, environments_root)
    except FileNotFoundError as error:
        return PeerResult(None, str(error))
    work.mkdir(parents=True, exist_ok=True)
    files = {
        name: work / f"{peer}-{recipe}-{name}"
        for name in ("calibration", "evaluation", "outputs", "info", "log")
    }
    for name in ("outputs", "info"):
        _remove(files[name])  # of an earlier run
    peer_io.write_batches(files["calibration"], calibration)
    peer_io.write_batches(files["evaluation"], evaluation)
    command = [python, runner(peer), "--model", model_directory, "--kind", kind]
    command += ["--recipe", recipe, "--seed", seed, "--threads", threads or torch.get_num_threads()]
    for name in ("calibration", "evaluation", "outputs", "info"):
        command += [f"--{name}", files[name]]
    error = run_process([str(part) for part in command], files["log"], timeout)
    for name in ("calibration", "evaluation"):
        files[name].unlink()
    if error:
        _remove(files["outputs"])
        return PeerResult(None, error)
    return result(files, len(evaluation))


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def run_process(command: list[str], log: Path, timeout: float) -> str | None:
    """Run a process of a peer, its output into `log`; None, or what went wrong in one line."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=variables, timeout=timeout
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no result after {timeout:.0f} s"
    if code == 0:
        return None
    return last_error(log.read_text(encoding="utf-8", errors="replace")) or f"exit status {code}"


def last_error(log: str) -> str:
    """Last line of a log that names an exception, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    named = [line for line in lines if EXCEPTION.match(line)]
    return (named or lines or [""])[-1]


def result(files: dict[str, Path], batches: int) -> PeerResult:
    """What a process left that ended well, if it is what was asked for."""
    if not (files["outputs"].is_dir() and files["info"].is_file()):
        return PeerResult(None, "ended without outputs")
    info = json.loads(files["info"].read_text(encoding="utf-8"))
    found = peer_io.output_files(files["outputs"])
    error = None
    if len(found) != batches:
        error = f"expected {batches} outputs, found {len(found)}"
    elif not all(torch.isfinite(load_file(path)["output"]).all() for path in found):
        error = "outputs that are not finite"
    if error:
        _remove(files["outputs"])
        return PeerResult(None, error, info)
    return PeerResult(peer_io.read_outputs(files["outputs"]), None, info)


def plain_config(fqns: list[str]) -> Any:
    """Our plain NVFP4 with llmcompressor's scales in an encoder.

    Activations have a calibrated outer scale, and each linear has a weight outer scale of its own,
    where linears that share an input would share one: those of one config do, so each name gets
    its own. (llmcompressor shares it by names that BERT does not have, such as q_proj.)
    """
    from torchao.quantization import FqnToConfig

    from arc_ao import NVFP4Config

    names = sorted({fqn.rpartition(".")[2] for fqn in fqns})
    return FqnToConfig(
        {rf"re:.*\.{name}": NVFP4Config(activation_scale="static") for name in names}
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=list(PEERS), required=True)
    parser.add_argument("--recipe", default="all", help="'all', 'none', or one of the peer's")
    parser.add_argument("--model", default="minilm", help="'minilm' or an encoder's directory")
    parser.add_argument("--text", type=Path, required=True, help="such as wiki.test.tokens")
    parser.add_argument("--calibration-lines", type=int, default=64)
    parser.add_argument("--evaluation-lines", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plain", action="store_true", help="our plain NVFP4 as a row, too")
    parser.add_argument("--work", type=Path, default=environments.ENVIRONMENTS / "work")
    args = parser.parse_args(argv)
    known = [*PEERS[args.peer], "all", peer_io.UNQUANTIZED]
    if args.recipe not in known:
        parser.error(f"--recipe: expected one of {', '.join(known)}, got {args.recipe!r}")
    return args


def main(argv: list[str] | None = None) -> None:
    from transformers import AutoModel, AutoTokenizer

    args = parse(argv)
    torch.set_num_threads(args.threads)
    directory = embeddings.model_directory(args.model)
    text = args.text.read_text(encoding="utf-8")
    lines = embeddings.select_lines(text, args.calibration_lines, args.evaluation_lines)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    calibration, evaluation = (embeddings.tokenize(tokenizer, part) for part in lines)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    reference = embeddings.embed(model, evaluation)
    rows: dict[str, dict[str, Any]] = {}
    if args.plain:
        linears = [n for n, m in model.named_modules() if embeddings.is_encoder_linear(m, n)]
        row = _plain_row(model, plain_config(linears), calibration, evaluation, reference)
        _report(rows, "arc_ao: plain, static, a scale each", row)
    for recipe in PEERS[args.peer] if args.recipe == "all" else [args.recipe]:
        batches = (calibration, evaluation, args.work)
        found = peer_outputs(
            args.peer, recipe, directory, "encoder", *batches, threads=args.threads
        )
        row = {"error": found.error, **found.info}
        if found.outputs is not None:
            value = torch.cat(list(found.outputs))
            row["one_minus_cosine"] = embeddings.mean_cosine_distance(reference, value)
        _report(rows, f"{args.peer}: {recipe}", row)
    print(json.dumps({"benchmark": "peers", **run_header(args), "rows": rows}))


def _plain_row(
    model: nn.Module, config: Any, calibration: list, evaluation: list, reference: Tensor
) -> dict[str, Any]:
    from arc_ao import quantize_

    model = copy.deepcopy(model)
    settings = {"filter_fn": embeddings.is_encoder_linear, "progress": False}
    summary = quantize_(model, config, calibration_data=calibration, **settings)
    value = embeddings.embed(model, evaluation)
    distance = embeddings.mean_cosine_distance(reference, value)
    return {"bits_per_weight": summary.bits_per_weight, "one_minus_cosine": distance}


def _report(rows: dict[str, dict[str, Any]], name: str, row: dict[str, Any]) -> None:
    rows[name] = row
    figure = row.get("one_minus_cosine")
    print(f"{name}:", row["error"] if figure is None else f"{figure:.4f}", flush=True)


if __name__ == "__main__":
    main()
