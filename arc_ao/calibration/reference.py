"""What the unquantized model says about every batch, in little memory, and how far another is off.

The logits of a language model are its head times hidden states, and the head stays as it is: kept
are the hidden states (tokens * hidden_size * 2 bytes in bf16), not the logits, which a vocabulary
of 49,152 makes 85 times larger. Where the head is quantized too, or the logits are more than its
product (soft caps), whole outputs are kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_ao.calibration.data import Batch
from arc_ao.calibration.padding import kept_tokens_of_output, watched
from arc_ao.formats.nvfp4 import row_chunks
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.outputs.divergence import is_logits, model_output
from arc_ao.progress import SILENT, Progress

HEAD_ELEMENTS = 1 << 22  # logits of a reference made at a time: enough rows for a matrix product
CHUNK_ELEMENTS = 1 << 18  # logits compared at a time by a CPU: 1 MiB per temporary, in its cache


@dataclass(frozen=True)
class Reference:
    """Output of the unquantized model for one batch, of the tokens that count.

    Attributes:
        kept: [T, D], what `head` makes logits of, or the outputs themselves.
        tokens: int64 [T], of the flattened output, or None where all count.
        logits: whether outputs are logits (compared by KL) or hidden states (by cosine).
    """

    kept: Tensor
    head: nn.Linear | None
    tokens: Tensor | None
    logits: bool

    def rows(self, rows: slice) -> Tensor:
        """Outputs of some tokens, [t, V]."""
        kept = self.kept[rows]
        return kept if self.head is None else self.head(kept)

    @torch.no_grad()
    def measure(self, output: Any) -> float:
        """The divergence as a number; inf where it is not finite."""
        found = self.divergence(output).item()
        return max(0.0, found) if math.isfinite(found) else math.inf

    def divergence(self, output: Any) -> Tensor:
        """Mean over tokens of the KL divergence, or of 1 - cosine, with a gradient: fp32 []."""
        value = model_output(output)
        value = value.reshape(-1, value.shape[-1])
        if self.tokens is not None:
            value = value.index_select(0, self.tokens)
        if self.logits:
            return _KLDivergence.apply(_of_classes(value), self)
        reference = self.rows(slice(None)).float()
        return 1 - F.cosine_similarity(value.float(), reference, dim=-1).mean()


@torch.no_grad()
def record_references(
    model: nn.Module,
    batches: list[Batch | Tensor],
    changing: set[nn.Module],
    *,
    progress: Progress = SILENT,
) -> list[Reference]:
    """Run the unquantized model over the batches.

    Args:
        changing: modules that will be quantized.
    """
    head = _fixed_head(model, changing)
    seen: list[Tensor] = []
    handle = head and head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    references = []
    try:
        with evaluation_mode(model), watched(model):
            for batch in progress.steps("reference", batches):
                seen.clear()
                references.append(_reference(run_model(model, batch), head, seen))
    finally:
        if handle is not None:
            handle.remove()
    return references


def _fixed_head(model: nn.Module, changing: set[nn.Module]) -> nn.Linear | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Linear) and head not in changing else None


def _reference(output: Any, head: nn.Linear | None, seen: list[Tensor]) -> Reference:
    value, kept = model_output(output), None
    if head is not None and len(seen) == 1 and torch.equal(head(kept := seen[0]), value):
        seen.clear()
    else:
        head, kept = None, value
    kept = kept.reshape(-1, kept.shape[-1])
    tokens = kept_tokens_of_output(value)
    if tokens is None:
        return Reference(kept.clone(), head, None, is_logits(output))
    tokens = tokens.flatten().nonzero()[:, 0]
    return Reference(kept.index_select(0, tokens), head, tokens, is_logits(output))


def _of_classes(logits: Tensor) -> Tensor:
    """A single logit [T, 1] (a reranker) as those of a binary classifier, [T, 2]."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def _chunks(reference: Reference, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens to compare at a time, and the reference's logits of them."""
    elements = CHUNK_ELEMENTS if logits.device.type == "cpu" else HEAD_ELEMENTS
    for outer in row_chunks(logits, HEAD_ELEMENTS):
        said = _of_classes(reference.rows(outer))
        for inner in row_chunks(said, elements):
            yield slice(outer.start + inner.start, outer.start + inner.stop), said[inner]


class _KLDivergence(torch.autograd.Function):
    """Mean KL(reference || softmax(logits)); the gradient, (q - p) / T, is made along with it, so
    that fp32 values exist of a chunk of tokens only."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Reference) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        wanted, count = ctx.needs_input_grad[0], logits.shape[0]
        grad = torch.empty_like(logits) if wanted else None
        for rows, said in _chunks(reference, logits):
            log_p = said.float().log_softmax(-1)
            log_q = logits[rows].float().log_softmax(-1)
            p = log_p.exp()
            terms = p * (log_p - log_q)
            total += terms.masked_fill_(p == 0, 0).sum(dtype=torch.float64)
            if wanted:
                grad[rows] = log_q.exp_().sub_(p).div_(count)
        ctx.save_for_backward(grad)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None
