"""Which kernel multiplies, by GPU and shape: tables in tuned/, one file per compute capability.

A table is a list of rules; the first one that fits (M at most `max_m`; N equal to `n`, and K_aug at
most a quarter above `k`, where these are given) names the route and its tile. tuned/default.json
serves GPUs without a table of their own; its rules are reasoned, not measured ("measured": null).
`python benchmarks/gpu/gpu_suite.py --tune` measures a table for the GPU at hand.

    row      one or two rows, sums of integers, memory-bound
    tiles    tensor cores on tiles decoded in the kernel
    decode   operands decoded to bf16 once, cuBLAS, epilogue; by chunks of N
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

TABLES = Path(__file__).parent / "tuned"
MOST_AUGMENTED = 1.25  # K_aug over in_features that a rule still fits
Route = Literal["row", "tiles", "decode"]


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        route: see above; the tile matters to "row" (block_m rows at once) and "tiles" alone.
        max_m: largest M it is for; None is any.
        n, k: out_features and in_features that it is for; None is any.
        block_m, block_n: rows and columns of y in a tile; block_k: 16-channel blocks in a step.
        split: parts of K that are summed in a second pass; 0 chooses by the number of processors.
        chunk: columns decoded at a time; 0 chooses by the size of the fp32 sums.
    """

    route: Route
    max_m: int | None = None
    n: int | None = None
    k: int | None = None
    block_m: int = 16
    block_n: int = 64
    block_k: int = 16
    num_warps: int = 4
    num_stages: int = 3
    split: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.route not in get_args(Route):
            raise ValueError(f"route: expected one of {get_args(Route)}, got {self.route!r}")

    def fits(self, m: int, n: int, k: int) -> bool:
        """Whether the rule is for a product [m, k] x [n, k]^T, residual channels counted in k."""
        return (
            (self.max_m is None or m <= self.max_m)
            and self.n in (None, n)
            and (self.k is None or self.k <= k <= MOST_AUGMENTED * self.k)
        )

    def document(self) -> dict[str, int | str]:
        """What a table holds of it: the fields that differ from their defaults, and the route."""
        fields = dataclasses.fields(self)
        changed = {f.name: getattr(self, f.name) for f in fields}
        return {
            name: value
            for name, value in changed.items()
            if name == "route" or value != getattr(Rule, name, None)
        }


def choose(capability: tuple[int, int] | None, m: int, n: int, k: int) -> Rule:
    """The rule for a product on a GPU; capability None (no GPU) takes the default table."""
    return next(rule for rule in table(capability) if rule.fits(m, n, k))


@cache
def table(capability: tuple[int, int] | None) -> tuple[Rule, ...]:
    """All rules for a GPU, the last of which fits everything.

    Raises:
        ValueError: a table without such a rule.
    """
    return read_table(table_path(capability))


def read_table(path: Path) -> tuple[Rule, ...]:
    """The rules of one file; raises as `table`."""
    rules = tuple(Rule(**entry) for entry in json.loads(path.read_text())["rules"])
    last = rules[-1]
    if (last.max_m, last.n, last.k) != (None, None, None):
        raise ValueError(f"{path.name}: the last rule must fit every shape, got {last}")
    return rules


def table_path(capability: tuple[int, int] | None) -> Path:
    """The file whose rules hold for a GPU."""
    own = own_table_path(capability) if capability else TABLES / "default.json"
    return own if own.exists() else TABLES / "default.json"


def own_table_path(capability: tuple[int, int]) -> Path:
    """The file that a GPU's measured rules are written to."""
    return TABLES / f"sm_{capability[0]}{capability[1]}.json"
