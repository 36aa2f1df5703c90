"""What the papers claim of their methods on single linears, and whether rows of methods.py
bear it out."""

import statistics
from typing import Any

TIE_DB = 0.05  # "not worse" allows for this
Row = dict[str, Any]
# claim -> the row that is better, the one that is worse, the least mean gain in dB
CLAIMS: dict[str, tuple[str, str, float]] = {
    "SERQ beats plain": ("SERQ 10 %", "plain", 0.0),
    "SERQ, published, beats plain": ("SERQ 10 %, published", "plain", 0.0),
    "SERQ without flattening beats plain": ("SERQ 10 %, not flattened", "plain", 0.0),
    "SERQ beats plain, MXFP4": ("SERQ 10 %, MXFP4", "MXFP4", 0.0),
    "SERQ beats plain, int4": ("SERQ 10 %, int4", "int4", 0.0),
    "flattening helps SERQ, MXFP4": ("SERQ 10 %, MXFP4", "SERQ 10 %, MXFP4, not flattened", 0.0),
    "flattening helps SERQ, int4": ("SERQ 10 %, int4", "SERQ 10 %, int4, not flattened", 0.0),
    "AWQ beats plain, W4A16": ("AWQ, W4A16", "plain, W4A16", 0.0),
    "AWQ is not worse than plain, W4A4": ("AWQ", "plain", -TIE_DB),
    "smoothing + ARC is not worse than ARC": ("smoothing + ARC 10 %", "ARC 10 %", -TIE_DB),
    "ARHQ beats one SVD at rank 32": ("ARHQ r32", "one SVD r32", 0.0),
    "ARHQ beats one SVD at rank 128": ("ARHQ r128", "one SVD r128", 0.0),
    "ARHQ beats one SVD at rank 128, raw": ("ARHQ r128, raw", "one SVD r128, raw", 0.0),
    "ARHQ, iterated, beats SVDQuant at rank 32": ("ARHQ r32, iterated", "SVDQuant r32", 0.0),
    "ARHQ, iterated, beats SVDQuant at rank 128": ("ARHQ r128, iterated", "SVDQuant r128", 0.0),
    "Hadamard hurts NVFP4": ("plain", "Hadamard 16", 0.0),
    "Hadamard 128 hurts NVFP4": ("plain", "Hadamard 128", 0.0),
    "Hadamard 32 helps MXFP4": ("MXFP4, Hadamard 32", "MXFP4", 0.0),
    "Hadamard 128 helps MXFP4": ("MXFP4, Hadamard 128", "MXFP4", 0.0),
}


def relations(rows: list[dict[str, Row]]) -> dict[str, dict[str, Any]]:
    """Mean gain of one row over another, in how many problems it gains, and whether that is what
    the papers say."""
    found = {}
    for claim, (better, worse, least) in CLAIMS.items():
        gains = [r[better]["sqnr_db"] - r[worse]["sqnr_db"] for r in rows]
        mean = statistics.fmean(gains)
        wins = sum(gain > least for gain in gains)
        found[claim] = {"gain_db": mean, "wins": wins, "of": len(gains), "holds": mean > least}
    return found


def mean_rows(measured: list[dict[str, Row]]) -> dict[str, Row]:
    """Mean of every figure by row."""
    return {
        name: {k: statistics.fmean(m[name][k] for m in measured) for k in measured[0][name]}
        for name in measured[0]
    }


def table_rows(by_kind: dict[str, list[dict[str, Row]]]) -> list[list[str]]:
    """Name, mean dB by kind of layer, and what it costs on the mean; one list a row."""
    means = {kind: mean_rows(measured) for kind, measured in by_kind.items()}
    overall = mean_rows([rows for measured in by_kind.values() for rows in measured])
    return [
        [
            name,
            *(f"{rows[name]['sqnr_db']:.2f}" for rows in means.values()),
            f"{cost['extra_bits']:+.2f}",
            f"{cost['extra_multiply_adds']:+.1%}",
        ]
        for name, cost in overall.items()
    ]


def headings(by_kind: dict[str, list[Any]]) -> list[str]:
    """Of the columns of `table_rows`."""
    return ["", *by_kind, "bits/weight", "multiply-adds"]


def sentence(claim: str, found: dict[str, Any]) -> str:
    """One relation in words."""
    word = "PASS" if found["holds"] else "FAIL"
    gain = f"{found['gain_db']:+.2f} dB mean, {found['wins']} of {found['of']} linears"
    return f"{word}: {claim} ({gain})"


def markdown(document: dict[str, Any]) -> str:
    """The JSON document of methods.py for readers: problems, tables, relations."""
    lines = [
        "# Layer methods: output SQNR of single linears in dB",
        "",
        f"`{document['command']}`",
        "",
        f"Commit {document['commit']}, {document['threads']} thread(s), torch "
        f"{document['versions']['torch']}. Evaluation tokens are not those of calibration. Means "
        "over the linears of a kind; bits and multiply-adds are what a row adds to plain NVFP4 at "
        "the shapes measured. Constructed problems have the channel profiles of a real model's "
        f"importance matrix, not its weights{_reduced(document['arguments'])}. MXFP4 and int4 rows "
        "are the formats alone.",
    ]
    for title, result in document["results"].items():
        kinds = result["kinds"]
        shapes = {kind: [tuple(s) for s in result["shapes"][kind]] for kind in kinds}
        lines += ["", f"## {title}", ""]
        lines += [f"* {kind}: {len(s)} linears [N, K] {_joined(s)}" for kind, s in shapes.items()]
        columns = headings(kinds)
        lines += ["", _line(columns), _line(["---", *(["---:"] * (len(columns) - 1))])]
        lines += [_line(row) for row in table_rows(kinds)] + [""]
        lines += [f"* {sentence(c, found)}" for c, found in result["relations"].items()]
    return "\n".join(lines) + "\n"


def _reduced(arguments: dict[str, Any]) -> str:
    """Says so where the constructed problems are smaller than the model's linears."""
    outputs, channels = arguments["out_features"], arguments["max_channels"]
    thinned = f" and at most {channels} channels of the profile" if channels else ""
    return f", at a reduced size: {outputs} outputs{thinned}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _joined(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"{n} x {k}" for n, k in dict.fromkeys(shapes))
