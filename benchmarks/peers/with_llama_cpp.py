"""llama.cpp on the CPU, in its own environment: writes random Llamas, then runs one of them.

    write FOLDER --formats bf16 nvfp4 ...    FOLDER/FORMAT.gguf of each
    serve FILE --logits FILE                 a round of prefill and decode for each line of stdin

bf16 is written by gguf_file.py; llama.cpp's own quantizer makes the other files of it, with its own
choice of types. For NVFP4 it has no such choice: there each linear of a layer is NVFP4, embedding
and head stay bf16, as in a checkpoint converted from ModelOpt. The converter adds a scale per
tensor, so one more multiplication behind each linear; these files lack it.

Settings are llama.cpp's own (mapped file, weights repacked where it has kernels for that, flash
attention where it chooses it), but for threads and a batch that holds the prompt.
"""

import argparse
import ctypes
import json
import re
import sys
import time
from pathlib import Path

import gguf
import gguf_file
import llama_cpp
import numpy as np

BF16, NVFP4 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.NVFP4
BUFFER = re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")
TYPE = re.compile(r" - type +(\S+): +(\d+) tensors")
FLASH = "Flash Attention enabled"  # as it says in its log
DEBUG = 1  # its lowest level: several lines a token
SHOWN_LOG_LINES = 15
STATUS = Path("/proc/self/status")  # Linux

log_lines: list[str] = []


def quantize(source: Path, target: Path, fmt: str, threads: int) -> None:
    """`source` in another format, by llama.cpp's quantizer.

    Raises:
        SystemExit: it refused; the message shows what it logged.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    if fmt == "nvfp4":
        # Not a file type that it takes: Q8_0 is, and each tensor's type is overridden.
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
        params.output_tensor_type = params.token_embedding_type = BF16
        override = llama_cpp.llama_model_tensor_override
        overrides = (override * 2)(override(rb"^blk\.", NVFP4), override(None))
        params.tt_overrides = overrides
    else:
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{fmt.upper()}")
    status = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params))
    if status:
        raise SystemExit(f"{fmt}: llama_model_quantize ended with {status}{logged()}")


def write(args: argparse.Namespace) -> None:
    """A file of each format; the bf16 one is removed unless asked for."""
    source = args.path / "bf16.gguf"
    gguf_file.write_bf16(source, args)
    for fmt in args.formats:
        if fmt != "bf16":
            progress(f"{fmt}: quantizing")
            quantize(source, args.path / f"{fmt}.gguf", fmt, args.threads)
    if "bf16" not in args.formats:
        source.unlink()


class Session:
    """A model with a context: a prompt, then token by token."""

    def __init__(self, path: Path, length: int, batch: int, threads: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it{logged()}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"{path}: llama.cpp makes no context{logged()}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )

    def feed(self, tokens: list[int]) -> None:
        """Run tokens; logits come from the last one alone."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(
            self.context, llama_cpp.llama_batch_get_one(array, len(tokens))
        )
        if status:
            raise SystemExit(f"llama_decode ended with {status}{logged()}")

    def logits(self) -> np.ndarray:
        """fp32 [vocabulary], valid until the next token."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))

    def prefill(self, prompt: list[int]) -> int:
        """The token behind a prompt in an empty cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        self.feed(prompt)
        return int(self.logits().argmax())

    def decode(self, token: int, tokens: int) -> None:
        """As many tokens behind `token`."""
        for _ in range(tokens):
            self.feed([token])
            token = int(self.logits().argmax())

    def round(self, prompt: list[int], tokens: int) -> dict[str, float]:
        """Seconds of a prompt, and of a token behind it."""
        start = time.perf_counter()
        token = self.prefill(prompt)
        prefilled = time.perf_counter()
        self.decode(token, tokens)
        decoded = time.perf_counter()
        return {"prefill": prefilled - start, "decode": (decoded - prefilled) / tokens}


def serve(args: argparse.Namespace) -> None:
    """One file: answers every line of stdin with one JSON line, first with what it is."""
    progress(f"{args.path.stem}: loading")
    session = Session(args.path, args.prompt + 2 * args.tokens, args.prompt, args.threads)
    generator = np.random.default_rng(args.seed)
    prompt = generator.integers(session.vocabulary, size=args.prompt).tolist()
    token = session.prefill(prompt)  # a first round, untimed: reads the file, allocates
    session.logits().tofile(args.logits)
    session.decode(token, args.tokens)
    log = "\n".join(log_lines)
    facts = {
        "stored": args.path.stat().st_size,
        "total": peak_bytes(),
        "buffers_mib": {name: float(size) for name, size in BUFFER.findall(log)},
        "tensors": {name: int(count) for name, count in TYPE.findall(log)},
        "flash_attention": FLASH in log,
        "versions": {"llama_cpp_python": llama_cpp.__version__, "numpy": np.__version__},
        "system_info": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(json.dumps(session.round(prompt, args.tokens)), flush=True)


def peak_bytes() -> int:
    """Most memory this process ever held, pages of the mapped file included."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def progress(text: str) -> None:
    """To stderr: stdout is for figures."""
    print(text, file=sys.stderr, flush=True)


def logged() -> str:
    return "; the end of its log:\n" + "\n".join(log_lines[-SHOWN_LOG_LINES:])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("write", "serve"))
    parser.add_argument("path", type=Path, help="folder to write to, or file to serve")
    parser.add_argument("--formats", nargs="+", default=["bf16"])
    parser.add_argument("--logits", type=Path, help="file for those behind the prompt, fp32")
    for name in ("layers", "hidden", "intermediate", "heads", "kv-heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("prompt", "tokens", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    text = []  # of a line that is not complete

    @llama_cpp.llama_log_callback
    def keep(level: int, part: bytes, data: ctypes.c_void_p) -> None:
        if level == DEBUG:
            return
        text.append(part.decode(errors="replace"))
        if text[-1].endswith("\n"):
            log_lines.extend("".join(text).splitlines())
            text.clear()

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    write(args) if args.command == "write" else serve(args)


if __name__ == "__main__":
    main()
