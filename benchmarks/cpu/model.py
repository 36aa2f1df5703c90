"""Tokens per second and memory of a Llama on the CPU: arc_ao against bf16, both compiled.

    python -m benchmarks.cpu.model --threads 2     # 16 layers, 2048/8192, 32/8 heads
    python -m benchmarks.cpu.model --check         # exit code 1 if an acceptance line fails
    python -m benchmarks.cpu.model --profile       # where the time of decoding goes
    python -m benchmarks.cpu.model --block-scales  # of activations: the search's cost alone

Weights are random. Each variant lives in a process of its own, which builds its model and compiles
it once with a static cache; then the processes take turns, one round each:

    prefill   one prompt of --prompt tokens
    decode    --tokens tokens, one at a time, behind that prompt

Reported is the median over rounds. --block-scales instead compares our backend with four-over-six
and with searched block scales of activations, by the CPU time of a prompt, round by round. Memory
is resident memory of Linux and leaves out the libraries and what torch.compile keeps:

    weights   with the model and its cache there - before either was built
    running   peak while a prompt and its tokens run - right before
    memory    weights + running

The quantized model is made in its process from the bf16 one, whose memory has been freed by then.
The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from arc_ao import ARCConfig, quantize_
from arc_ao.passes import arc
from arc_ao.summary import model_bytes
from benchmarks.common.acceptance import Line, conclude
from benchmarks.common.checkout import ROOT
from benchmarks.common.headers import machine_header, print_header
from benchmarks.common.memory import MIB, peak_of, settle
from benchmarks.common.models import random_llama
from benchmarks.common.timing import summarize

BF16, OURS, FUSED = VARIANTS = "bf16", "arc_ao", 'arc_ao, "arc"'  # plain compile but the last
# The same, by how activations choose block scales.
WIDE, SEARCHED = SCALE_VARIANTS = 'arc_ao, "arc", four_over_six', 'arc_ao, "arc", mse'
PROFILE_ROWS = 15
TINY = {"layers": 1, "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2}


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """Random weights in bf16, quantized in our variants."""
    torch.manual_seed(args.seed)
    model = random_llama(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
    )
    if args.variant != BF16:
        batch = torch.randint(args.vocabulary, (1, 32))
        scales = {WIDE: "four_over_six", SEARCHED: "mse"}.get(args.variant)
        recipe = ARCConfig(
            budget=args.budget,
            recipe="balanced",
            weight_scale="amax",
            activation_block_scale=scales,
        )
        quantize_(model, recipe, calibration_data=[batch], progress=sys.stderr.isatty())
    return model.requires_grad_(False)


class Decoder:
    """A model with a static cache: a prompt, then token by token."""

    def __init__(self, model: PreTrainedModel, length: int, backend: str | Callable) -> None:
        config = model.config
        self.cache = StaticCache(config=config, max_cache_len=length)
        heads, size = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(1, heads, size, model.dtype, model.device)
        self.cache.reset()
        self.step = torch.compile(self._step, fullgraph=True, dynamic=False, backend=backend)
        self.model = model

    def _step(self, ids: Tensor, cache: StaticCache) -> Tensor:
        outputs = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return outputs.logits[:, -1].argmax(-1, keepdim=True)  # [1, 1], the next token

    def prefill(self, prompt: Tensor) -> Tensor:
        """The token behind a prompt [1, T]."""
        self.cache.reset()
        return self.step(prompt, self.cache)

    def decode(self, token: Tensor, tokens: int) -> None:
        """As many tokens behind `token` [1, 1]."""
        for _ in range(tokens):
            token = self.step(token, self.cache)


@torch.no_grad()
def one_round(decoder: Decoder, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Seconds of a prompt, and of a token behind it."""
    start, cpu_start = time.perf_counter(), time.process_time()
    token = decoder.prefill(prompt)
    prefilled, cpu_seconds = time.perf_counter(), time.process_time() - cpu_start
    decoder.decode(token, tokens)
    return {
        "prefill": prefilled - start,
        "prefill_cpu": cpu_seconds,
        "decode": (time.perf_counter() - prefilled) / tokens,
    }


def serve(args: argparse.Namespace) -> None:
    """One variant: answers every line of stdin with one JSON line, first with its memory."""
    torch.set_num_threads(args.threads)
    build_model(argparse.Namespace(**vars(args) | TINY))  # reads libraries: they are not counted
    before = settle()
    progress(f"{args.variant}: building")
    model = build_model(args)
    backend = "inductor" if args.variant in (BF16, OURS) else arc
    decoder = Decoder(model, args.prompt + 2 * args.tokens, backend)
    weights = settle() - before
    prompt = torch.randint(args.vocabulary, (1, args.prompt))
    progress(f"{args.variant}: compiling")
    start = time.perf_counter()
    one_round(decoder, prompt, 2)
    compiled = time.perf_counter() - start
    ready = settle()
    running = peak_of(lambda: one_round(decoder, prompt, args.tokens)) - ready
    memory = {"weights": weights, "running": running, "total": ready + running}
    figures = {**memory, "stored": model_bytes(model), "compile_seconds": compiled}
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round(decoder, prompt, args.tokens)), flush=True)
    if args.profile:
        progress(f"{args.variant}, decoding:\n{profile(decoder, prompt, args.tokens)}")


def progress(text: str) -> None:
    """To stderr: stdout is for figures."""
    print(text, file=sys.stderr, flush=True)


def profile(decoder: Decoder, prompt: Tensor, tokens: int) -> str:
    """Operators of decoding by their own time."""
    with torch.no_grad():
        token = decoder.prefill(prompt)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            decoder.decode(token, tokens)
    averages = profiled.key_averages()
    return averages.table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS)


def command(name: str, argv: list[str]) -> list[str]:
    """Starts a variant: `serve` with the options of `argv`."""
    return [sys.executable, "-m", __spec__.name, *argv, "--variant", name]


class Variant:
    """The process of one variant, which speaks as `serve` does."""

    def __init__(self, command: list[str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
        self.memory = self._read()
        self.rounds: list[dict[str, float]] = []

    def _read(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of a variant ended with {self.process.wait()}")
        return json.loads(line)

    def run(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def speeds(self, prompt: int) -> dict[str, float]:
        """Tokens per second: medians over the rounds, and how far apart they were."""
        prefill = summarize([r["prefill"] for r in self.rounds])
        decode = summarize([r["decode"] for r in self.rounds])
        return {
            "prefill_tokens_per_second": prompt / prefill.seconds,
            "prefill_spread": prefill.spread,
            "decode_tokens_per_second": 1 / decode.seconds,
            "decode_spread": decode.spread,
        }

    def figures(self, prompt: int) -> dict[str, float]:
        """Tokens per second and bytes."""
        memory = self.memory["weights"] + self.memory["running"]
        cpu_seconds = [r["prefill_cpu"] for r in self.rounds]
        speeds = self.speeds(prompt) | {"prefill_cpu_seconds": cpu_seconds}
        return {**speeds, "memory": memory, **self.memory}


def take_turns(variants: dict[str, Variant], rounds: int) -> None:
    """One round of each, as often as asked."""
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for variant in variants.values():
            variant.run()


def measure(args: argparse.Namespace, argv: list[str]) -> dict[str, dict[str, float]]:
    """Variants are built one after the other, then timed in turns."""
    variants: dict[str, Variant] = {}
    try:
        for name in SCALE_VARIANTS if args.block_scales else VARIANTS:
            variants[name] = Variant(command(name, argv))
        take_turns(variants, args.rounds)
    finally:
        for variant in variants.values():
            variant.close()
    return {name: variant.figures(args.prompt) for name, variant in variants.items()}


def acceptance(variants: dict[str, dict[str, float]]) -> list[Line]:
    """Kernels against bf16, both under plain torch.compile; our backend against both."""

    def ratio(key: str, ours: str, theirs: str) -> float:
        return variants[ours][key] / variants[theirs][key]

    decode, prefill = "decode_tokens_per_second", "prefill_tokens_per_second"
    return [
        Line("decode, speedup over bf16", ratio(decode, OURS, BF16), at_least=2.5),
        Line("prefill, speedup over bf16", ratio(prefill, OURS, BF16), at_least=1.3),
        Line("memory (weights + running), of bf16", ratio("memory", OURS, BF16), at_most=0.4),
        Line('decode, backend "arc" over bf16', ratio(decode, FUSED, BF16), at_least=2.5),
        Line('prefill, backend "arc" over bf16', ratio(prefill, FUSED, BF16), at_least=1.3),
        Line('decode, backend "arc" over plain', ratio(decode, FUSED, OURS), at_least=1.1),
        Line('prefill, backend "arc" over plain', ratio(prefill, FUSED, OURS), at_least=1.1),
    ]


def scale_acceptance(variants: dict[str, dict[str, float]]) -> list[Line]:
    """What the search costs a prompt: the median over rounds, each of which ran both."""
    rounds = (variants[name]["prefill_cpu_seconds"] for name in (SEARCHED, WIDE))
    ratio = statistics.median(mine / other for mine, other in zip(*rounds, strict=True))
    return [Line("prefill, CPU time with searched scales over four-over-six", ratio, at_most=1.06)]


def print_table(variants: dict[str, dict[str, float]], title: str) -> None:
    """One line per variant."""
    table = Table("", title=title)
    headings = ("prefill tok/s", "decode tok/s", "weights MiB", "running MiB", "memory MiB")
    for heading in (*headings, "process MiB", "compile s"):
        table.add_column(heading, justify="right")
    for name, figures in variants.items():
        table.add_row(
            name,
            f"{figures['prefill_tokens_per_second']:.1f}",
            f"{figures['decode_tokens_per_second']:.2f}",
            *(f"{figures[key] / MIB:.0f}" for key in ("weights", "running", "memory", "total")),
            f"{figures['compile_seconds']:.0f}",
        )
    Console(width=110).print(table)


def parser(description: str) -> argparse.ArgumentParser:
    """Options of the model and of the run, which cpu/llama_cpp.py shares."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.06)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a line fails")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--profile", action="store_true", help="of decoding, on stderr")
    options.add_argument("--block-scales", action="store_true", help="of activations, compared")
    options.add_argument("--variant", choices=(*VARIANTS, *SCALE_VARIANTS), help=argparse.SUPPRESS)
    return options.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.variant:
        serve(args)
        return 0
    torch.set_num_threads(args.threads)
    header = machine_header({k: v for k, v in vars(args).items() if k != "variant"})
    print_header(header)
    variants = measure(args, sys.argv[1:] if argv is None else argv)
    title = f"Llama, {args.layers} layers of {args.hidden}/{args.intermediate}"
    print_table(variants, f"{title}, {args.threads} threads")
    lines = scale_acceptance(variants) if args.block_scales else acceptance(variants)
    document = {"benchmark": "bench_cpu_model", **header, "variants": variants}
    return conclude(document, lines, args.check)


if __name__ == "__main__":
    sys.exit(main())
