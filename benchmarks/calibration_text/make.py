"""Make the mixed calibration text that the package ships, and its index.

    python -m benchmarks.calibration_text.make --books classic_books_train96M.txt.xz \
        --against arc_ao/assets/text/heldout.txt wiki.test.raw

Six kinds (prose, encyclopaedic, code, dialogue, mathematics, languages) alternate in sections of
about 1.2 KB, so that every beginning and every window of some ten thousand tokens holds all of them
in about the proportions of the whole. The index has a line [kind, source, bytes] for each section
in order. Prints the shares, the sources, the hashes and the runs of words shared with `--against`.
"""

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.calibration_text.sources import Section, all_sections
from benchmarks.common.checkout import ROOT

OUTPUT = ROOT / "arc_ao" / "assets" / "text" / "calibration_mixed.txt"
RUN = 8  # words in a row that count as an overlap


def spread(groups: list[list[Section]]) -> list[Section]:
    """Merge lists so that each is spread evenly over the result, by the middle of its sections."""
    placed = []
    for order, group in enumerate(groups):
        total, before = sum(section.size for section in group), 0
        for section in group:
            placed.append(((before + section.size / 2) / total, order, section))
            before += section.size
    return [section for _, _, section in sorted(placed, key=lambda place: place[:2])]


def mix(sources: list[list[Section]]) -> list[Section]:
    """First the sources of each kind are merged, then the kinds."""
    kinds = dict.fromkeys(source[0].kind for source in sources)
    return spread([spread([s for s in sources if s[0].kind == kind]) for kind in kinds])


def word_runs(text: str, length: int = RUN) -> set[tuple[str, ...]]:
    """All runs of `length` words of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def overlap(text: str, other: str, length: int = RUN) -> list[str]:
    """The runs of words that both texts hold."""
    return sorted(" ".join(run) for run in word_runs(text, length) & word_runs(other, length))


def read(path: Path) -> str:
    opened = lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open("rt")
    with opened as file:
        return file.read()


def write(mixed: list[Section], output: Path) -> str:
    """Write the text and, beside it, the index; return the text."""
    text = "".join(section.text + "\n\n" for section in mixed)
    output.write_bytes(text.encode())
    digest = hashlib.sha256(text.encode()).hexdigest()
    lines = [json.dumps([s.kind, s.source, s.size], ensure_ascii=False) for s in mixed]
    rows = ",\n".join(lines)
    index = f'{{"sha256": "{digest}",\n"sections": [\n{rows}\n]}}\n'
    output.with_suffix(".json").write_bytes(index.encode())
    print(f"sha256 {digest}, {len(text.encode())} bytes, {len(mixed)} sections")
    return text


def print_shares(mixed: list[Section], label: Callable[[Section], str]) -> None:
    """Bytes and share by label, in alphabetical order, as rows of a Markdown table."""
    sizes: Counter[str] = Counter()
    for section in mixed:
        sizes[label(section)] += section.size
    total = sum(sizes.values())
    for name, size in sorted(sizes.items()):
        print(f"| {name} | {size} | {size / total:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="text of books, .xz or plain")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="held-out texts")
    args = parser.parse_args()
    mixed = mix(all_sections(read(args.books)))
    text = write(mixed, args.output)
    print_shares(mixed, lambda section: section.kind)
    print_shares(mixed, lambda section: f"{section.kind} | {section.source}")
    for path in args.against:
        shared = overlap(text, read(path))
        print(f"{path.name}: {len(shared)} runs of {RUN} words shared {shared[:3]}")


if __name__ == "__main__":
    main()
