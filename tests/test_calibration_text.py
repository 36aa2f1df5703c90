"""The shipped mixed calibration text: what it holds, in what order, and how it is made."""

import hashlib
import json
from collections import Counter

import pytest

from arc_ao.shipped import HELDOUT_TEXT, MIXED_TEXT
from benchmarks.calibration_text import make, sources
from benchmarks.calibration_text.sources import Section
from benchmarks.calibration_text.written import mathematics, phrases, questions

SHARES = {
    "prose": 0.30,
    "encyclopaedic": 0.15,
    "code": 0.15,
    "dialogue": 0.15,
    "mathematics": 0.10,
    "languages": 0.15,
}
TEXT = MIXED_TEXT.read_bytes()
INDEX = json.loads(MIXED_TEXT.with_suffix(".json").read_text("utf-8"))


def shares(start: int, stop: int) -> dict[str, float]:
    """Share of every kind in the bytes start .. stop."""
    sizes, position = Counter(), 0
    for kind, _, size in INDEX["sections"]:
        sizes[kind] += max(0, min(position + size, stop) - max(position, start))
        position += size
    return {kind: sizes[kind] / (stop - start) for kind in SHARES}


def test_the_index_describes_the_text():
    """Sections fill the file, each ends with a blank line, and the hash is that of the text."""
    assert sum(size for _, _, size in INDEX["sections"]) == len(TEXT)
    assert hashlib.sha256(TEXT).hexdigest() == INDEX["sha256"]
    position = 0
    for kind, source, size in INDEX["sections"]:
        section = TEXT[position : position + size].decode("utf-8")  # no character is cut
        assert section.endswith("\n\n") and section.strip() and kind in SHARES, source
        position += size


def test_the_text_is_long_enough_and_clean():
    """64 thousand tokens at four bytes each, and none of the books' damaged characters."""
    assert len(TEXT) >= 4 * 65_536
    text = TEXT.decode("utf-8")
    assert not [c for c in ("\ufeff", "\ufffd", "\x00", "Ã", "\r", "**ANTONIO**") if c in text]


def test_shares_are_those_of_the_card():
    """Within two points of what was aimed at, and as arc_ao/assets/text/README.md says."""
    found = shares(0, len(TEXT))
    assert found == pytest.approx(SHARES, abs=0.025)
    card = (MIXED_TEXT.parent / "README.md").read_text("utf-8")
    assert INDEX["sha256"] in card
    assert [kind for kind in SHARES if f"| {kind} | {found[kind]:.1%} |" not in card] == []
    books = {source for _, source, _ in INDEX["sections"] if " (d. " in source}
    assert [source for source in books if source not in card] == []


def test_every_beginning_and_every_window_is_mixed():
    """8k tokens from the start hold the kinds in about their proportions, 32 KB anywhere all."""
    for kind, share in shares(0, 27_000).items():
        assert 0.6 * SHARES[kind] <= share <= 1.5 * SHARES[kind], kind
    for start in range(0, len(TEXT) - 32_768, 1024):
        low = [kind for kind, s in shares(start, start + 32_768).items() if s < SHARES[kind] / 3]
        assert not low, f"bytes {start} to {start + 32_768} hold too little of {low}"


def test_nothing_of_the_heldout_text():
    heldout = HELDOUT_TEXT.read_text("utf-8")
    assert make.overlap(TEXT.decode(), heldout, 8) == []
    words = " ".join(heldout.split()[5000:5030])
    assert len(make.overlap(f"so {words}", heldout, 8)) > 10  # it would be seen


def test_what_the_program_writes_is_in_the_text():
    """The generators still write what was shipped: the same draws on every Python."""
    text = TEXT.decode()
    for written in (mathematics(136), questions(84), phrases()):
        assert [item for item in written if item not in text] == []
    own = sources.own_sections("languages", "languages.txt")
    assert len(own) > 40 and [s.source for s in own if s.text not in text] == []


def test_sources_and_kinds_alternate():
    """Two kinds, one with two sources: each is spread over the whole by the middle of its parts."""
    part = lambda kind, source, n: [Section(kind, source, f"{source}{i}" * 9) for i in range(n)]
    mixed = make.mix([part("a", "x", 2), part("a", "y", 2), part("b", "z", 2)])
    assert [s.text[:2] for s in mixed] == ["x0", "z0", "y0", "x1", "z1", "y1"]


def test_paragraphs_become_sections_of_the_size_wanted():
    found = sources.sections("prose", "book", ["x" * 700] * 5, limit=2_000)
    assert [s.size for s in found] == [700 + 2 + 700 + 2] * 2
    assert sources.paragraphs("\ufeff**LEAR**\n\nBlow!\n\n\n**bold**") == [
        "LEAR: Blow!",
        "bold",
    ]


def test_a_phrase_that_is_not_in_the_books_is_named():
    book = sources.Book("prose", "Somebody, Something", "no such phrase", 1_000)
    with pytest.raises(ValueError, match="expected 'no such phrase' once in the books, found 0"):
        sources.book_sections("\n\nother words\n\n", book)


def test_code_is_named_as_it_was_when_the_text_was_made():
    """Files that moved since are found at their commit by the names that the index has."""
    named = {source for kind, source, _ in INDEX["sections"] if kind == "code"}
    assert {f"this repository: {path}" for path in sources.CODE} <= named
