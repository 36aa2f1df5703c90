"""What torch.compile does before every call of a model: microseconds until its first operator.

    python -m benchmarks.cpu.guards                # 112 linears, as in a Llama of 16 layers

That is the check of all guards and the collection of the weights. The linears are small, follow
each other and are not computed; their number alone matters. Variants take turns:

    bf16            not quantized
    arc_ao          what `ARCTensor.__tensor_flatten__` returns is kept in the weight
    made anew       the same weights, with the answer of torchao's base class, made in every check
    ... unguarded   compiled with `torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe`: changes
                    of weights after the first call go unnoticed

A call is `warm` behind another one, and `cold` where other memory was read in between, as a large
model's weights are. Reported is the median over rounds. The last line of stdout is one JSON
document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from arc_ao import ARCConfig, ARCTensor, quantize_
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.timing import Timing, interleaved

FEATURES = 64
ELSEWHERE = torch.zeros(2**23, dtype=torch.int64)  # 64 MiB, read before a cold call
CALLS = 20  # in a sample
GuardFilter = Callable[..., list[bool]]
RESULT = (torch.zeros(1, FEATURES, dtype=torch.bfloat16),)
UNGUARDED = torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe


@contextmanager
def made_anew() -> Iterator[None]:
    """Inside, `__tensor_flatten__` is what ARCTensor would inherit."""
    kept = ARCTensor.__tensor_flatten__
    ARCTensor.__tensor_flatten__ = TorchAOBaseTensor.__tensor_flatten__
    try:
        yield
    finally:
        ARCTensor.__tensor_flatten__ = kept


def build(linears: int, budget: float | None) -> nn.Module:
    """Linears with random weights, quantized unless `budget` is None."""
    layers = (nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(linears))
    model = nn.Sequential(*layers).bfloat16().requires_grad_(False)
    if budget is not None:
        config = ARCConfig(recipe="balanced", budget=budget)
        quantize_(model, config, calibration_data=[token(FEATURES)], progress=False)
    return model


def token(rows: int = 1) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(rows)).bfloat16()


def computes_nothing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that leaves of a call what comes before its first operator."""
    return lambda *inputs: RESULT


def call_seconds(run: Callable[[], Any], between: Callable[[], Any]) -> float:
    """Median seconds of a call of `run`, with an untimed call of `between` before each."""
    seconds = []
    for _ in range(CALLS):
        between()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def samplers(
    model: nn.Module, guards: GuardFilter | None, context: Callable[[], Any]
) -> dict[str, Callable[[], float]]:
    """Compiles the model, for itself, inside `context`; where its calls are sampled, too."""
    compiled = torch.compile(
        model,
        backend=computes_nothing,
        options={"guard_filter_fn": guards} if guards else None,
        isolate_recompiles=True,
    )
    x = token()
    with context():
        compiled(x)

    def sample(between: Callable[[], Any]) -> float:
        with context(), torch._dynamo.config.patch(error_on_recompile=True):
            return call_seconds(lambda: compiled(x), between)

    return {"warm": lambda: sample(lambda: None), "cold": lambda: sample(ELSEWHERE.sum)}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict[str, Timing]]:
    """Timings of every variant, "warm" and "cold"."""
    plain, quantized = build(args.linears, None), build(args.linears, args.budget)
    variants = {
        "bf16": samplers(plain, None, nullcontext),
        "arc_ao": samplers(quantized, None, nullcontext),
        "made anew": samplers(quantized, None, made_anew),
        "bf16, unguarded": samplers(plain, UNGUARDED, nullcontext),
        "arc_ao, unguarded": samplers(quantized, UNGUARDED, nullcontext),
    }
    by_state = {
        state: interleaved({name: both[state] for name, both in variants.items()}, args.rounds)
        for state in ("warm", "cold")
    }
    return {name: {state: by_state[state][name] for state in by_state} for name in variants}


def print_table(timings: dict[str, dict[str, Timing]]) -> None:
    """One line per variant, in microseconds."""
    print(f"{'':20}{'warm us':>10}{'cold us':>10}{'spread':>10}")
    for name, by_state in timings.items():
        micro = "".join(f"{1e6 * by_state[state].seconds:10.0f}" for state in ("warm", "cold"))
        print(f"{name:20}{micro}{by_state['cold'].spread:10.0%}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linears", type=int, default=112)
    parser.add_argument("--budget", type=float, default=0.06)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    header = machine_header(vars(args))
    print_header(header)
    timings = measure(args)
    print_table(timings)
    seconds = {
        name: {state: timing.seconds for state, timing in by_state.items()}
        for name, by_state in timings.items()
    }
    print(json.dumps({"benchmark": "bench_guards", **header, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
