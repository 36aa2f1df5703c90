"""What a report says of a model as a whole: its divergence from the unquantized one, and samples.

Causal language models are scored on a text (eval/perplexity.py) and continue short prompts by the
likeliest token each; of all others the outputs are compared (outputs/divergence.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from arc_ao.calibration.data import text_batches
from arc_ao.demo_table import RememberedLogits
from arc_ao.eval.perplexity import evaluate_text
from arc_ao.inference import evaluation_mode, run_model
from arc_ao.outputs.divergence import is_logits, output_divergence
from arc_ao.text_models import calibration_window, is_causal_language_model

PROMPTS = ("Once upon a time", "The capital of France is", "Why is the sky blue?")
NEW_TOKENS = 40
GIVE_ORIGINAL = "give the unquantized model by --original"
NAMES = {
    "perplexity": "perplexity",
    "mean_kl": "KL to the unquantized model (nats per token)",
    "top1_agreement": "tokens whose likeliest follower is the same",
}
COSINE, KL = "1 - cosine similarity to the unquantized output", NAMES["mean_kl"]


class Quality:
    """Scores of several quantized models of one original, on one text.

    Args:
        original: unquantized, or None: then there is only what a model has by itself.
        max_tokens: of the text, that are scored.
    """

    def __init__(
        self,
        original: nn.Module | None,
        tokenizer: Any,
        text: str,
        *,
        max_tokens: int,
        progress: bool = True,
    ) -> None:
        self.original, self.tokenizer, self.text = original, tokenizer, text
        self.max_tokens, self.progress = max_tokens, progress
        self.reference = None if original is None else RememberedLogits(original)
        self.tokens = self.window = 0
        self.names: dict[str, str] = {}
        self.of_original: dict[str, float] = {}
        self.of_models: list[dict[str, float]] = []

    def add(self, model: nn.Module) -> None:
        """Score a quantized model; the original too, before the first one."""
        self.window = calibration_window(model)
        if is_causal_language_model(model):
            if self.original is not None and not self.of_original:
                self.of_original = self._scores(self.reference)
            self.of_models.append(self._scores(model, self.reference))
        else:
            self.of_models.append(self._distance(model))

    def to_dict(self) -> dict[str, Any]:
        """Metrics with a value of the original (None where it has none) and of every model."""
        metrics = [
            {
                "key": key,
                "name": name,
                "original": self.of_original.get(key),
                "models": [scores.get(key) for scores in self.of_models],
            }
            for key, name in self.names.items()
        ]
        missing = "" if self.original is not None else self._missing()
        counts = {"tokens": self.tokens, "window": self.window}
        return {"metrics": metrics, "missing": missing, **counts}

    def _missing(self) -> str:
        what = f"{KL} and {NAMES['top1_agreement']}" if self.names else f"{COSINE}, or {KL}"
        return f"Not measured: {what}; {GIVE_ORIGINAL}."

    def _scores(self, model: nn.Module, reference: nn.Module | None = None) -> dict[str, float]:
        metrics = evaluate_text(
            model,
            self.tokenizer,
            self.text,
            reference=reference,
            window=self.window,
            max_tokens=self.max_tokens,
            progress=self.progress,
        )
        self.tokens = metrics.tokens
        found = {key: getattr(metrics, key) for key in NAMES}
        found = {key: value for key, value in found.items() if value is not None}
        self.names |= {key: NAMES[key] for key in found}
        return found

    def _distance(self, model: nn.Module) -> dict[str, float]:
        """Mean over the text's tokens of a model that does not predict the next one."""
        if self.original is None:
            return {}
        options = {"window": self.window, "max_tokens": self.max_tokens}
        batches = text_batches(self.tokenizer, self.text, **options)
        total = 0.0
        with evaluation_mode(self.original), evaluation_mode(model):
            for batch in batches:
                reference = run_model(self.original, batch)
                total += output_divergence(reference, run_model(model, batch)) * batch.numel()
        self.tokens = sum(batch.numel() for batch in batches)
        self.names = {"divergence": KL if is_logits(reference) else COSINE}
        return {"divergence": total / self.tokens}


class Samples:
    """What an original and several quantized models of it make of PROMPTS."""

    def __init__(self, original: nn.Module | None, tokenizer: Any) -> None:
        self.original, self.tokenizer = original, tokenizer
        self.of_original: list[list[int]] = []
        self.of_models: list[list[list[int]]] = []

    def add(self, model: nn.Module) -> None:
        """Let a model continue the prompts, if it can; the original too, before the first one."""
        if not is_causal_language_model(model):
            return
        if self.original is not None and not self.of_original:
            self.of_original = self._continuations(self.original)
        self.of_models.append(self._continuations(model))

    def to_list(self) -> list[dict[str, Any]]:
        """One for each prompt; none of models that do not generate."""
        return [self._sample(i, prompt) for i, prompt in enumerate(PROMPTS) if self.of_models]

    def _sample(self, i: int, prompt: str) -> dict[str, Any]:
        reference = self.of_original[i] if self.of_original else None
        return {
            "prompt": prompt,
            "original": None if reference is None else self._text(reference),
            "models": [self._compared(found[i], reference) for found in self.of_models],
        }

    def _compared(self, ids: list[int], reference: list[int] | None) -> dict[str, Any]:
        """The text, and how many of its first tokens are the original's."""
        same = None if reference is None else common_length(ids, reference)
        return {"text": self._text(ids), "tokens": len(ids), "same_tokens": same}

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _continuations(self, model: nn.Module) -> list[list[int]]:
        return [continuation(model, self.tokenizer, prompt) for prompt in PROMPTS]


def continuation(model: nn.Module, tokenizer: Any, prompt: str) -> list[int]:
    """The likeliest NEW_TOKENS tokens one after the other, up to the end of text; through the chat
    template where the tokenizer has one."""
    device = next(model.parameters()).device
    ids = _prompt_ids(tokenizer, prompt).to(device)  # [1, T]
    with evaluation_mode(model), torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return found[0, ids.shape[1] :].tolist()


def _prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": True}
        return tokenizer.apply_chat_template(messages, return_tensors="pt", **options)["input_ids"]
    return tokenizer(prompt, return_tensors="pt")["input_ids"]


def common_length(one: Any, other: Any) -> int:
    """How many first elements of two sequences are equal."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
