"""arc_ao's operators from a bare checkout, also where torch and triton are all that is installed.

`import arc_ao` needs torchao, transformers and more. The operators, the formats and the environment
report need torch alone: where something is missing, a package object without arc_ao's own
`__init__` stands in for it, and `arc_ao.ops` is imported below that.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

from benchmarks.common.checkout import ROOT

NEEDED = ("torchao", "transformers", "safetensors", "tokenizers", "rich", "tqdm", "matplotlib")


def load_operators(needed: tuple[str, ...] = NEEDED) -> list[str]:
    """Import `arc_ao.ops` from this checkout; names of the packages that `import arc_ao` lacks."""
    missing = [name for name in needed if find_spec(name) is None]
    if missing and "arc_ao" not in sys.modules:
        package = ModuleType("arc_ao")
        package.__path__ = [str(ROOT / "arc_ao")]
        sys.modules["arc_ao"] = package
    importlib.import_module("arc_ao.ops")
    return missing
