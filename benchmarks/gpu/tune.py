"""Measure which route and tile is fastest on this GPU, and write its table (ops/cuda/tuned).

Candidates are timed on the plain NVFP4 weights of shapes.py; every shape and every step of M
gets the fastest, and the default rules follow for all other shapes. Outer scales, bias and
splitting of K are part of what is timed; quantizing x is not.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from arc_ao.ops.cuda import triton_products, tuning
from arc_ao.ops.cuda.tuning import Rule
from benchmarks.common.checkout import commit
from benchmarks.common.timing import interleaved
from benchmarks.gpu import providers
from benchmarks.gpu.clock import CudaClock
from benchmarks.gpu.shapes import SHAPES, Shape

STEPS_OF_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ROUNDS = 3
TILES = ((64, 16, 4), (64, 8, 4), (128, 8, 4), (128, 8, 8), (128, 16, 8), (32, 16, 4))
ROWS = ((8, 128, 2), (8, 256, 4), (16, 128, 2), (4, 128, 2), (8, 64, 1), (16, 64, 1))
LARGEST_ROW_M = 4  # a power of two
SMALLEST_DECODE_M = 128


def candidates(rows: int) -> Iterator[Rule]:
    """What is tried for `rows` tokens."""
    if rows <= LARGEST_ROW_M:
        for block_n, block_k, warps in ROWS:
            yield Rule("row", None, None, None, rows, block_n, block_k, warps)
    block_m = min(128, max(16, rows))
    for block_n, block_k, warps in TILES if rows > 1 else ():
        for stages in (2, 3):
            yield Rule("tiles", None, None, None, block_m, block_n, block_k, warps, stages)
    if rows >= SMALLEST_DECODE_M:
        yield Rule("decode")
        yield Rule("decode", chunk=4096)


def tune(device: torch.device, in_time: Callable[[], bool]) -> str:
    """Write the table of the GPU's compute capability; what came of it."""
    capability = torch.cuda.get_device_capability(device)
    rules: list[Rule] = []
    failures: dict[str, str] = {}
    for shape in SHAPES:
        if not in_time():
            break
        rules += best_rules(device, shape, failures)
    rules += tuning.read_table(tuning.TABLES / "default.json")
    document = {
        "capability": f"{capability[0]}.{capability[1]}",
        "measured": {
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": commit(),
        },
    }
    path = tuning.own_table_path(capability)
    path.write_text(table_text(document, rules))
    tuning.table.cache_clear()
    return f"{len(rules)} rules in {path.name}; not possible: {failures or 'none'}"


def best_rules(device: torch.device, shape: Shape, failures: dict[str, str]) -> list[Rule]:
    """The fastest rule for every step of M, equal neighbours as one."""
    weight = torch.randn(shape.n, shape.k, device=device).bfloat16()
    provider = providers.build("nvfp4", weight)
    best: list[Rule] = []
    for rows in STEPS_OF_M:
        x = torch.randn(rows, shape.k, device=device).bfloat16()
        rule = fastest(x, provider, list(candidates(rows)), failures)
        rule = placed(rule, rows, shape)
        if best and placed(best[-1], rows, shape) == rule:
            best.pop()
        best.append(rule)
    return best


def placed(rule: Rule, rows: int, shape: Shape) -> Rule:
    """`rule` for up to `rows` tokens and for this shape alone."""
    fields = rule.document() | {"max_m": rows, "n": shape.n, "k": shape.k}
    return Rule(**fields)


def fastest(
    x: torch.Tensor, provider: providers.Provider, rules: list[Rule], failures: dict[str, str]
) -> Rule:
    """Of `rules`; one that a GPU has too little shared memory for is left out."""
    clock, samplers = CudaClock(), {}
    for i, rule in enumerate(rules):
        calls = [_product(x, weight, rule) for weight in provider.weights]
        try:
            samplers[str(i)] = clock.sampler(calls, graph=x.shape[0] <= 64)
        except Exception as error:  # of triton: out of resources
            failures[json.dumps(rule.document())] = type(error).__name__
    found = interleaved(samplers, ROUNDS)
    return rules[int(min(found, key=lambda i: found[i].seconds))]


def _product(x: torch.Tensor, weight: providers.Weight, rule: Rule) -> Callable[[], Any]:
    a = providers.quantize_input(x, weight)
    return lambda: triton_products.nvfp4_gemm(
        *a, weight.qdata, weight.scale, weight.outer, None, x.dtype, rule=rule
    )


def table_text(document: dict[str, Any], rules: list[Rule]) -> str:
    """JSON with a line per rule."""
    head = json.dumps(document, indent=2).removesuffix("\n}")
    body = ",\n    ".join(json.dumps(rule.document()) for rule in rules)
    return f'{head},\n  "rules": [\n    {body}\n  ]\n}}\n'
