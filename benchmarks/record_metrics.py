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
from encoder import mean_cosine_distance, mean_pool
from record_data import Batch, SentencePairs
from scipy.stats import spearmanr
from torch import Tensor, nn

from arc_ao.eval import kl_divergence
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.integrations.lm_eval import evaluate
from arc_ao.tensor import ARCTensor

KINDS = {  # column -> names of linears; an encoder's MLP has no gate
    "q/k/v": r"\.([qkv]_proj|query|key|value)$",
    "o": r"\.(o_proj|attention\.output\.dense)$",
    "gate/up": r"\.(gate_proj|up_proj|intermediate\.dense)$",
    "down": r"\.(down_proj|layer\.\d+\.output\.dense)$",
}
TASK_BATCH = 16
TASK_TOKENS = 512  # longer documents lose their beginning


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
    batches: list[Batch], outputs: Iterable[Tensor], reference: list[Tensor] | None
) -> dict[str, float]:
    """Perplexity, and mean KL from the reference's logits if there is one.

    The first token of a window is not scored, nor is what follows its last.

    Raises:
        ValueError: a figure that is not finite.
    """
    nll = kl = 0.0
    tokens = 0
    for i, (batch, logits) in enumerate(_paired(batches, outputs)):
        targets = batch["input_ids"][:, 1:].flatten()
        scored = logits[:, :-1].flatten(0, 1)  # [tokens, V]
        for rows, some in zip(scored.split(512), targets.split(512), strict=True):
            nll += F.cross_entropy(rows.float(), some, reduction="sum").item()
        if reference is not None:
            kl += kl_divergence(reference[i][:, :-1], logits[:, :-1]).item() * len(targets)
        tokens += len(targets)
    found = {"perplexity": math.exp(min(nll / tokens, 700.0))}
    if reference is not None:
        found["mean_kl"] = kl / tokens
    return _finite(found)


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


def _paired(batches: list[Batch], outputs: Iterable[Tensor]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their outputs, which may go on after the last batch."""
    outputs = iter(outputs)
    for i, batch in enumerate(batches):
        output = next(outputs, None)
        if output is None or output.shape[:2] != batch["input_ids"].shape:
            found = None if output is None else tuple(output.shape)
            raise ValueError(
                f"evaluation batch {i}: expected logits for {tuple(batch['input_ids'].shape)} "
                f"tokens, found {found}"
            )
        yield batch, output


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
    model: nn.Module, tokenizer: Any, tasks: list[Path], limit: int
) -> dict[str, dict[str, float]]:
    """lm-eval accuracy of the first `limit` rows of each task, and its standard error."""
    found = evaluate(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch_size=TASK_BATCH,
        max_length=min(TASK_TOKENS, model.config.max_position_embeddings),
        progress=False,
    )
    result = {}
    for task, metrics in found["tasks"].items():
        accuracy, n = metrics["acc"], found["n"][task]
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        result[task] = {"accuracy": accuracy, "standard_error": error, "n": n}
    return result
