"""Texts of the accuracy record, which parts of them are read, and proof that they are kept apart.

    WikiText-2   wikitext2/wiki.test.raw                     decoders, evaluation
    books        books/classic_books_val.txt.xz              decoders, evaluation
    calibration  texts that the package ships                decoders, calibration: the book for
                                                             small ones, the mixed for real ones
    lm_eval/*.jsonl                                          decoders, tasks
    wiki lines   wikitext2/wiki.test.tokens                  encoder, both; see embeddings.py
    STS-B        stsb/stsb-en-dev.csv                        encoder, evaluation

The calibration book is the opening of the third of the four books in the validation file; only the
two books before it are evaluated. Evaluation windows are spread evenly over a text. For real models
WikiText-2 is the literature's: its rows joined by blank lines.
"""

import csv
import json
import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arc_ao.shipped import CALIBRATION_TEXT, HELDOUT_TEXT
from benchmarks.accuracy.embeddings import (
    CALIBRATION_LINES,
    EVALUATION_LINES,
    EVALUATION_START,
    MIN_CHARACTERS,
    select_lines,
)

Batch = dict[str, Tensor]
BATCH_WINDOWS = 4
MIN_LINE = 60  # characters of a line that two texts do not share by chance
WIKITEXT = Path("wikitext2/wiki.test.raw")
WIKI_LINES = Path("wikitext2/wiki.test.tokens")
BOOKS = Path("books/classic_books_val.txt.xz")
TRAINING_BOOKS = Path("books/classic_books_train96M.txt.xz")
STSB = Path("stsb/stsb-en-dev.csv")
TASKS = Path("lm_eval")


@dataclass(frozen=True)
class SentencePairs:
    """STS-B: sentences, the two of each pair by index, and the score that people gave it."""

    sentences: list[str]
    first: list[int]
    second: list[int]
    scores: list[float]


def read_books(path: Path, calibration: str) -> str:
    """The validation books that come before the calibration text.

    Raises:
        ValueError: the file starts with the calibration text.
    """
    text = lzma.open(path, "rt", encoding="utf-8").read()
    end = text.find(calibration.strip())
    if end == 0:
        raise ValueError(f"{path}: expected other books before the calibration text, found none")
    return text if end < 0 else text[:end]


def joined_rows(text: str) -> str:
    """A WikiText file as its perplexity is scored: rows (lines, with their ends) joined by blank
    lines, rows of white space alone being empty."""
    rows = [line + "\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]
    return "\n\n".join(rows)


def spread_windows(
    tokenizer: Any, text: str, *, window: int, tokens: int, batch: int = BATCH_WINDOWS
) -> list[Batch]:
    """Batches of windows [<= batch, window] of token ids, spread evenly over a text.

    Args:
        tokens: of all windows together; a remainder below one window is left out. 0: all of it.

    Raises:
        ValueError: the text has fewer tokens.
    """
    windows = _windows(tokenizer, text, window)
    count = max(1, tokens // window) if tokens else max(1, len(windows))
    if len(windows) < count:
        raise ValueError(f"expected {tokens} tokens of text, found {len(windows) * window}")
    chosen = windows[[i * len(windows) // count for i in range(count)]]
    return [_batch(ids) for ids in chosen.split(batch)]


def calibration_windows(
    tokenizer: Any, text: str, *, window: int, tokens: int, seed: int
) -> list[Batch]:
    """Single windows [1, window] of a text: for seed 0 the first ones, else drawn at random."""
    windows = _windows(tokenizer, text, window)
    count = min(len(windows), max(1, tokens // window))
    return [_batch(windows[i : i + 1]) for i in _draw(range(len(windows)), count, seed)]


def calibration_lines(text: str, seed: int) -> list[str]:
    """64 lines: for seed 0 the protocol's, else drawn from those that keep their distance."""
    calibration, _ = select_lines(text, CALIBRATION_LINES, EVALUATION_LINES)
    if seed == 0:
        return calibration
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) > MIN_CHARACTERS]
    gap = EVALUATION_START - CALIBRATION_LINES
    after = EVALUATION_START + EVALUATION_LINES + gap
    allowed = [*range(CALIBRATION_LINES), *range(after, len(lines))]
    return [lines[i] for i in _draw(allowed, CALIBRATION_LINES, seed)]


def _draw(allowed: Iterable[int], count: int, seed: int) -> list[int]:
    allowed = list(allowed)
    if seed == 0:
        return allowed[:count]
    order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))
    return sorted(allowed[i] for i in order[:count].tolist())


def _windows(tokenizer: Any, text: str, window: int) -> Tensor:
    """Token ids [windows, window]."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    full = len(ids) // window * window
    return torch.tensor(ids[:full], dtype=torch.long).view(-1, window)


def _batch(ids: Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_pairs(path: Path) -> SentencePairs:
    """STS-B in stsb-multi-mt's form: sentence, sentence, score 0 to 5."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    found = dict.fromkeys(sentence for a, b, _ in rows for sentence in (a, b))
    sentences = sorted(found, key=len)  # batches of alike lengths pad little
    index = {sentence: i for i, sentence in enumerate(sentences)}
    return SentencePairs(
        sentences,
        [index[a] for a, _, _ in rows],
        [index[b] for _, b, _ in rows],
        [float(score) for _, _, score in rows],
    )


def long_lines(text: str | Iterable[str]) -> set[str]:
    """Lines of a text, or of an iterable of lines, that are long enough to tell texts apart."""
    lines = text.splitlines() if isinstance(text, str) else text
    return {stripped for line in lines if len(stripped := line.strip()) > MIN_LINE}


def require_apart(what: str, calibration: Iterable[str], evaluation: Iterable[str]) -> None:
    """Raises ValueError if a long line of the calibration text is evaluated."""
    shared = long_lines(calibration) & long_lines(evaluation)
    if shared:
        raise ValueError(
            f"{what}: expected calibration and evaluation text to share no line of more than "
            f"{MIN_LINE} characters, found {len(shared)}, such as {min(shared)[:80]!r}"
        )


def shared_with_training(path: Path, evaluation: set[str]) -> int:
    """How many of these lines are in the (compressed) training text, read line by line."""
    found = set()
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            if (stripped := line.strip()) in evaluation:
                found.add(stripped)
    return len(found)


def data_checks(data: Path, work: Path) -> dict[str, int]:
    """Long lines of the evaluated books that the training text shares; kept in `work`."""
    path = work / "data_checks.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    training = data / TRAINING_BOOKS
    if not training.is_file():
        return {}
    books = read_books(data / BOOKS, CALIBRATION_TEXT.read_text(encoding="utf-8"))
    texts = {
        "evaluated books": books,
        "shipped held-out text": HELDOUT_TEXT.read_text(encoding="utf-8"),
        "calibration text": CALIBRATION_TEXT.read_text(encoding="utf-8"),
    }
    found = {
        f"lines of the {name} in the training text": shared_with_training(training, long_lines(t))
        for name, t in texts.items()
    }
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found
