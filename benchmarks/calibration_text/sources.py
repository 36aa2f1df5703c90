"""What the calibration text is taken from: public-domain books, this repository, texts of our own.

A book is found in the file of books by a phrase of it (parts/books.tsv); consecutive
paragraphs from there on are taken. Every author, and every translator of a translation, died more
than 70 years ago and published before 1929. Code comes from one commit of this repository, so that
a later change of the code does not change the text.
"""

import re
import subprocess
from dataclasses import dataclass

from benchmarks.calibration_text.written import PARTS, mathematics, phrases, questions, table
from benchmarks.common.checkout import ROOT

CODE_COMMIT = "f460445"
SECTION_BYTES = 1200  # a section ends with the paragraph that reaches this


@dataclass(frozen=True)
class Section:
    """Some paragraphs of one source."""

    kind: str
    source: str
    text: str

    @property
    def size(self) -> int:
        """UTF-8 bytes, with the blank line after it."""
        return len(self.text.encode()) + 2


@dataclass(frozen=True)
class Book:
    kind: str
    source: str
    start: str  # the paragraph that holds this phrase is the first
    size: int  # bytes


def book_table() -> list[Book]:
    """books.tsv below its header line."""
    return [Book(*row[:3], int(row[3])) for row in table("books.tsv")[1:]]


CODE = (  # where the files were at CODE_COMMIT
    "arc_ao/formats/nvfp4.py", "arc_ao/eval/perplexity.py", "csrc/cpu/dot_gemm.cpp",
    "arc_ao/methods/gptq.py", "arc_ao/cli.py", "csrc/cpu/simd.h", "tests/test_divergence.py",
    "arc_ao/tensor.py", "csrc/cuda/quant_augment.cu", "arc_ao/ops/cuda/triton_gemm.py",
    "arc_ao/passes/rewrite_linear.py", "csrc/gemm_operator.cpp", "pyproject.toml", "Makefile",
    "arc_ao/methods/knapsack.py", "build_native.py", "arc_ao/eval/divergence.py",
)  # fmt: skip
CODE_BYTES = 1_700  # of each file


def paragraphs(text: str) -> list[str]:
    """Paragraphs without byte order marks and bold marks; a play's name before its speech."""
    text = text.replace("\ufeff", "").replace("\xa0", " ")
    text = re.sub(r"\*\*([A-Z .'’]+)\*\*\n+", r"\1: ", text)
    return [
        part.strip("\n") for part in re.split(r"\n{2,}", text.replace("**", "")) if part.strip()
    ]


def sections(kind: str, source: str, parts: list[str], limit: int | None = None) -> list[Section]:
    """Join paragraphs to sections of SECTION_BYTES or a little more, up to `limit` bytes in all."""
    found: list[Section] = []
    held: list[str] = []
    total = 0
    for part in parts:
        held.append(part)
        if len("\n\n".join(held).encode()) >= SECTION_BYTES:
            found.append(Section(kind, source, "\n\n".join(held)))
            total += found[-1].size
            held = []
        if limit is not None and total >= limit:
            return found
    return [*found, Section(kind, source, "\n\n".join(held))] if held else found


def book_sections(books: str, book: Book) -> list[Section]:
    """The paragraphs of a book from its phrase on.

    Raises:
        ValueError: the phrase is not there exactly once.
    """
    if books.count(book.start) != 1:
        raise ValueError(
            f"{book.source}: expected {book.start!r} once in the books, found "
            f"{books.count(book.start)}; pass the books that the shipped model was trained on"
        )
    position = books.index(book.start)
    start = books.rindex("\n\n", 0, position) + 2
    name = re.search(r"\*\*[A-Z .']+\*\*\n+$", books[start - 100 : start] + books[start:position])
    if name:  # the speaker stands before the paragraph
        start = position - len(name.group())
    return sections(book.kind, book.source, paragraphs(books[start : start + 60_000]), book.size)


def code_sections(path: str) -> list[Section]:
    """The beginning of a file of this repository at CODE_COMMIT."""
    command = ["git", "show", f"{CODE_COMMIT}:{path}"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    parts = [part.rstrip() for part in re.split(r"\n{2,}", text) if part.strip()]
    return sections("code", f"this repository: {path}", parts, CODE_BYTES)


def own_sections(kind: str, name: str) -> list[Section]:
    """Sections of one of our files: `%% source | own`, or `%% language | author, work`."""
    found = []
    for block in re.split(r"^%% ", (PARTS / name).read_text("utf-8"), flags=re.M)[1:]:
        title, text = block.split("\n", 1)
        found.append(Section(kind, title.replace(" | ", ": "), text.strip("\n")))
    return found


def all_sections(books: str) -> list[list[Section]]:
    """One list for every source."""
    written = (
        ("mathematics", "worked problems and records, written by a program", mathematics(136)),
        ("dialogue", "short questions, written by a program", questions(84)),
        ("languages", "phrases and words in many languages, arranged by a program", [*phrases()]),
    )
    own = (
        ("languages", "languages.txt"),
        ("encyclopaedic", "encyclopaedia.txt"),
        ("dialogue", "chat.txt"),
        ("mathematics", "mathematics.txt"),
        ("code", "snippets.txt"),
    )
    return (
        [book_sections(books, book) for book in book_table()]
        + [code_sections(path) for path in CODE]
        + [sections(kind, source, items) for kind, source, items in written]
        + [own_sections(kind, name) for kind, name in own]
    )
