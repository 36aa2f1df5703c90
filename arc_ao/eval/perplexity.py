"""Perplexity of a text, and the KL divergence from a reference model at the same positions.

The text is tokenized once and cut into windows of `window` tokens that do not overlap; the last,
shorter window is scored too. The first token of each window has no context and is not scored:

    perplexity = exp(mean over scored tokens of -log p(token | the tokens before it in its window))

This is the convention of the WikiText-2 numbers in the quantization literature.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from arc_ao.inference import evaluation_mode
from arc_ao.outputs.divergence import CHUNK_ELEMENTS, is_logits, kl_divergence, model_output
from arc_ao.text_models import require_causal

MAX_WINDOW = 2048


@dataclass(frozen=True)
class TextMetrics:
    """Result of `evaluate_text`."""

    perplexity: float  # per token; inf if the loss is not finite
    mean_kl: float | None  # KL(reference || model), nats per token; None without a reference
    bits_per_byte: float  # bits per scored token * tokens of the text / UTF-8 bytes of the text
    tokens: int  # tokens scored
    windows: int
    window: int  # tokens per window
    top1_agreement: float | None = (
        None  # share of tokens whose likeliest follower is the reference's
    )

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain dictionary."""
        return asdict(self)


def evaluate_text(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    reference: nn.Module | None = None,
    window: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TextMetrics:
    """Score `text` with a causal language model, in evaluation mode and without gradients.

    tokenizer: a Hugging Face tokenizer; it adds the special tokens that it adds by default.
    reference: the floating point model to measure the KL divergence from; it needs the same
        vocabulary, not the same device.
    window: tokens per window, by default min(2048, model.config.max_position_embeddings).
    batch_size: windows per forward pass.
    max_tokens: use only the first `max_tokens` tokens of the text.
    progress: show a progress bar.

    Raises ValueError if `window`, `batch_size` or `max_tokens` is too small, the text has fewer
    than 2 tokens, or a model is no causal language model: it returns no logits of its vocabulary
    for every token, or sees the tokens after it.
    """
    require_causal(model)
    window = _default_window(model) if window is None else window
    for name, value, least in (
        ("window", window, 2),
        ("batch_size", batch_size, 1),
        ("max_tokens", max_tokens, 2),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    all_ids = tokenizer(text, verbose=False)["input_ids"]  # no "longer than the maximum" warning
    ids = torch.tensor(all_ids[:max_tokens], dtype=torch.long)  # [tokens]
    if not text or len(ids) < 2:  # special tokens alone are no text
        raise ValueError(f"text: expected at least 2 tokens, got {len(ids)}")

    batches = _window_batches(ids, window, batch_size)
    nll = kl = same = 0.0
    scored = sum(batch[:, 1:].numel() for batch in batches)
    with (
        evaluation_mode(model),
        evaluation_mode(reference) if reference is not None else nullcontext(),
        tqdm(total=scored, desc="perplexity", unit="tok", disable=not progress) as bar,
    ):
        for batch in batches:
            batch_nll, batch_kl, batch_same = _score(model, reference, batch)
            nll, kl, same = nll + batch_nll, kl + batch_kl, same + batch_same
            bar.update(batch[:, 1:].numel())
    return TextMetrics(
        perplexity=_exp(nll / scored),
        mean_kl=None if reference is None else kl / scored,
        bits_per_byte=_finite_or_inf(
            nll / scored / math.log(2) * len(all_ids) / len(text.encode("utf-8"))
        ),
        tokens=scored,
        windows=sum(len(batch) for batch in batches),
        window=window,
        top1_agreement=None if reference is None else same / scored,
    )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of a `.jsonl` file: its "text" fields joined by blank lines.

    Raises ValueError naming the file and line for bytes that are not UTF-8, a line that is not a
    JSON object, or a row without a "text" string.
    """
    if Path(path).suffix != ".jsonl":
        return _decode(Path(path))
    texts = []
    for line, row in read_jsonl(path):
        if not isinstance(row.get("text"), str):
            raise ValueError(f'{path}:{line}: expected a "text" string, got keys {sorted(row)}')
        texts.append(row["text"])
    return "\n\n".join(texts)


def read_jsonl(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a JSONL file as (line number from 1, object); empty lines are skipped.

    Raises ValueError naming the file and line for bytes that are not UTF-8 or a line that is not a
    JSON object, and naming the file if it has no row.
    """
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other line separators unescaped.
    for number, line in enumerate(_decode(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from None


def _default_window(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # a multimodal config nests that of its language model
        config = config.get_text_config()
    return min(MAX_WINDOW, getattr(config, "max_position_embeddings", None) or MAX_WINDOW)


def _window_batches(ids: Tensor, window: int, batch_size: int) -> list[Tensor]:
    """Batches [<= batch_size, window] of token ids [tokens]; the partial window alone, last."""
    full = len(ids) // window * window
    batches = list(ids[:full].view(-1, window).split(batch_size)) if full else []
    if len(ids) - full >= 2:
        batches.append(ids[full:].unsqueeze(0))  # [1, tokens % window]
    return batches


@torch.no_grad()
def _score(
    model: nn.Module, reference: nn.Module | None, ids: Tensor
) -> tuple[float, float, float]:
    """Over ids [B, S] from token 1: summed loss, summed KL (both in nats), tokens where the same
    one is likeliest; the latter two are 0 without a reference."""
    logits = _logits(model, ids)  # [B, S, V]
    reference_logits = None if reference is None else _logits(reference, ids)
    nll = kl = same = 0.0
    for row, targets in enumerate(ids[:, 1:].to(logits.device)):
        predicted = logits[row, :-1]  # [S - 1, V], a view
        chunk = max(1, CHUNK_ELEMENTS // predicted.shape[-1])
        for rows, row_targets in zip(predicted.split(chunk), targets.split(chunk), strict=True):
            losses = F.cross_entropy(rows.float(), row_targets, reduction="none")
            nll += losses.sum(dtype=torch.float64).item()
        if reference_logits is not None:
            expected = reference_logits[row, :-1]
            kl += kl_divergence(expected, predicted).item() * len(targets)
            likeliest = expected.argmax(-1).to(predicted.device)
            same += (predicted.argmax(-1) == likeliest).sum().item()
    return nll, kl, same


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    # Offloaded parameters are on the meta device; the hooks that load them move the inputs.
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    output = model(ids.to(next(devices, torch.device("cpu"))))
    name = type(model).__name__
    if not is_logits(output):
        raise ValueError(f"{name}: expected a causal language model with logits")
    logits = model_output(output)
    if logits.shape[:-1] != ids.shape or logits.shape[-1] <= ids.max():
        raise ValueError(
            f"{name}: expected logits of every token of a vocabulary, found shape "
            f"{list(logits.shape)} for ids of shape {list(ids.shape)} up to {int(ids.max())}"
        )
    return logits


def _exp(value: float) -> float:
    return _finite_or_inf(torch.tensor(value, dtype=torch.float64).exp().item())


def _finite_or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf
