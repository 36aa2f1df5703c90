"""What the record measures: from a model's outputs, and from the model itself.

Outputs are one tensor for each evaluation batch: logits [B, T, V] of a decoder, embeddings [B, D]
of an encoder. Rows of this project and of peers go through the same functions.

    perplexity      exp(mean -log p(token | the tokens before it in its window))
    mean_kl         mean over the same tokens of KL(reference || quantized), nats
    one_minus_cosine    mean over lines of 1 - cos(reference, quantized)
    sts_spearman    rank correlation of cosine similarities with the scores of STS-B, times 100
    SQNR            10 log10(sum y^2 / sum (y - y_q)^2), y = x W^T, x from the unquantized model
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from arc_ao.eval import kl_divergence
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.integrations.lm_eval import evaluate
from arc_ao.tensor import ARCTensor
from benchmarks.accuracy.embeddings import mean_cosine_distance, mean_pool
from benchmarks.accuracy.texts import Batch, SentencePairs

KINDS = {  # column -> names of linears; an encoder's MLP has no gate
    "q/k/v": r"\.([qkv]_proj|query|key|value)$",
    "o": r"\.(o_proj|attention\.output\.dense)$",
    "gate/up": r"\.(gate_proj|up_proj|intermediate\.dense)$",
    "down": r"\.(down_proj|layer\.\d+\.output\.dense)$",
}
TASK_BATCH = 16
TASK_TOKENS = 512  # longer documents lose their beginning
LOSS_ELEMENTS = 2**22  # logits that a loss converts to fp32 at a time, at most 512 tokens


def layer_kind(name: str) -> str | None:
    """Column of a linear, None for one that the record does not report."""
    return next((kind for kind, names in KINDS.items() if re.search(names, name)), None)


def decoder_outputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Logits [B, T, V] of each batch, one at a time."""
    with evaluation_mode(model):
        for batch in batches:
            yield run_model(model, batch).logits


def encoder_outputs(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Embeddings [B, D] of each batch."""
    with evaluation_mode(model):
        for batch in batches:
            yield mean_pool(run_model(model, batch).last_hidden_state, batch["attention_mask"])


@torch.no_grad()
def text_metrics(
    batches: list[Batch], outputs: Iterable[Tensor], reference: Iterable[Tensor] | None
) -> dict[str, float]:
    """Perplexity, and mean KL from the reference's logits if there are any.

    The first token of a window is not scored, nor is what follows its last.

    Raises:
        ValueError: a figure that is not finite.
    """
    nll = kl = 0.0
    tokens = 0
    for batch, logits, expected in _triples(batches, outputs, reference):
        targets = batch["input_ids"][:, 1:].flatten()
        nll = _loss(logits[:, :-1].flatten(0, 1), targets, nll)
        if expected is not None:
            kl += kl_divergence(expected[:, :-1], logits[:, :-1]).item() * len(targets)
        tokens += len(targets)
    found = {"perplexity": math.exp(min(nll / tokens, 700.0))}
    if reference is not None:
        found["mean_kl"] = kl / tokens
    return _finite(found)


@torch.no_grad()
def window_metrics(
    batches: list[Batch], outputs: Iterable[Tensor], reference: Iterable[Tensor] | None
) -> dict[str, Any]:
    """What `text_metrics` has, "top1" (share of tokens whose likeliest follower is the
    reference's), and means of each window in nats: "window_nll", "window_kl".

    Both iterables are read one batch at a time, so that no more than one of each is held.

    Raises:
        ValueError: a figure that is not finite.
    """
    losses: list[float] = []
    divergences: list[float] = []
    same = tokens = 0
    for batch, logits, expected in _triples(batches, outputs, reference):
        for i, targets in enumerate(batch["input_ids"][:, 1:]):
            scored = logits[i, :-1]  # [T - 1, V]
            losses.append(_loss(scored, targets) / len(targets))
            tokens += len(targets)
            if expected is not None:
                divergences.append(kl_divergence(expected[i, :-1], scored).item())
                same += (scored.argmax(-1) == expected[i, :-1].argmax(-1)).sum().item()
        del logits, expected, scored  # before the next ones are computed
    found: dict[str, Any] = {"perplexity": math.exp(min(statistics.fmean(losses), 700.0))}
    if reference is not None:
        found |= {"mean_kl": statistics.fmean(divergences), "top1": same / tokens}
    found = _finite(found) | {"window_nll": losses}
    return found if reference is None else found | {"window_kl": divergences}


def _loss(scored: Tensor, targets: Tensor, start: float = 0.0) -> float:
    """`start` plus the summed cross entropy of logits [tokens, V]."""
    chunk = min(512, max(1, LOSS_ELEMENTS // scored.shape[-1]))
    total = start
    for rows, some in zip(scored.split(chunk), targets.split(chunk), strict=True):
        total += F.cross_entropy(rows.float(), some, reduction="sum").item()
    return total


def embedding_metrics(outputs: Tensor, reference: Tensor | None) -> dict[str, float]:
    """1 - cosine to the reference's embeddings [lines, D]; nothing without a reference."""
    if reference is None:
        return {}
    return _finite({"one_minus_cosine": mean_cosine_distance(reference, outputs)})


def pair_metrics(pairs: SentencePairs, outputs: Tensor) -> dict[str, float]:
    """Spearman correlation of embeddings' similarities with people's scores, in percent."""
    embeddings = outputs.double()
    similarity = torch.cosine_similarity(embeddings[pairs.first], embeddings[pairs.second])
    found = spearmanr(similarity.numpy(), pairs.scores).statistic
    return _finite({"sts_spearman": 100 * float(found)})


def _triples(
    batches: list[Batch], outputs: Iterable[Tensor], reference: Iterable[Tensor] | None
) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
    """Batches with their logits and the reference's, None without; both may go on afterwards.

    Keeps none of the logits: those of a batch can be freed before the next ones are computed.
    """
    outputs, reference = iter(outputs), None if reference is None else iter(reference)
    for i, batch in enumerate(batches):
        yield (
            batch,
            _checked(i, batch, next(outputs, None)),
            None if reference is None else _checked(i, batch, next(reference, None)),
        )


def _checked(i: int, batch: Batch, output: Tensor | None) -> Tensor:
    if output is None or output.shape[:2] != batch["input_ids"].shape:
        found = None if output is None else tuple(output.shape)
        raise ValueError(
            f"evaluation batch {i}: expected logits for {tuple(batch['input_ids'].shape)} "
            f"tokens, found {found}"
        )
    return output


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite figure, found {value}")
    return metrics


@torch.no_grad()
def layer_sqnr(
    original: nn.Module, quantized: nn.Module, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean over the linears of a kind of their output SQNR in dB.

    Each quantized linear reads what the unquantized model gives its original, in the model's dtype.
    Linears that are still the original's contribute nothing.
    """
    energies: dict[str, list[float]] = {}
    handles = []
    for name, module in original.named_modules():
        counterpart = quantized.get_submodule(name)
        if isinstance(module, nn.Linear) and layer_kind(name) and _differs(module, counterpart):
            energies[name] = [0.0, 0.0]
            hook = _meter(counterpart, energies[name])
            handles.append(module.register_forward_hook(hook))
    try:
        with evaluation_mode(original), evaluation_mode(quantized):
            for batch in batches:
                run_model(original, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {kind: value for kind in KINDS if (value := _mean_db(kind, energies)) is not None}


def _differs(module: nn.Linear, counterpart: nn.Linear) -> bool:
    changed = counterpart.weight
    return isinstance(changed, ARCTensor) or not torch.equal(module.weight, changed)


def _meter(counterpart: nn.Linear, energy: list[float]) -> Any:
    """Forward hook that adds a linear's signal and noise energy to `energy`."""

    def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        bias = 0.0 if module.bias is None else module.bias.double()
        energy[0] += (output.double() - bias).square().sum().item()
        energy[1] += (output.double() - counterpart(*args).double()).square().sum().item()

    return hook


def _mean_db(kind: str, energies: dict[str, list[float]]) -> float | None:
    found = [e for name, e in energies.items() if layer_kind(name) == kind and e[1] > 0]
    return statistics.fmean(10 * math.log10(e[0] / e[1]) for e in found) if found else None


def task_metrics(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[Path],
    limit: int | None,
    *,
    batch_size: int = TASK_BATCH,
    max_length: int = TASK_TOKENS,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """lm-eval accuracy of the first `limit` rows of each task, and its standard error.

    Args:
        limit: None for all rows.
        max_length: tokens of a document and its answer; longer ones lose their beginning.
    """
    found = evaluate(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch_size=batch_size,
        max_length=min(max_length, model.config.max_position_embeddings),
        progress=progress,
    )
    result = {}
    for task, metrics in found["tasks"].items():
        accuracy, n = metrics["acc"], found["n"][task]
        error = math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1))  # as lm-eval's mean_stderr
        result[task] = {"accuracy": accuracy, "standard_error": error, "n": n}
    return result
