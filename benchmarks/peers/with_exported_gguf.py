"""A GGUF file in llama.cpp, in its own environment: next-token loss of windows of tokens.

    with_exported_gguf.py FILE --ids IDS.npy --text TEXT --result RESULT.json

IDS are int32 [B, T]; the loss, in nats a token and in fp64, is the mean over the tokens that have
one before them in their window. TEXT is cut into tokens by the file's own tokenizer.
"""

import argparse
import ctypes
import json
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from with_llama_cpp import Session


def tokens_of(session: Session, text: bytes) -> list[int]:
    """Ids that llama.cpp's tokenizer gives for a text, without what would be put around it."""
    vocabulary = llama_cpp.llama_model_get_vocab(session.model)
    array = (llama_cpp.llama_token * len(text))()  # a byte is a token at least
    count = llama_cpp.llama_tokenize(vocabulary, text, len(text), array, len(text), False, False)
    return list(array[:count])


def window_logits(session: Session, tokens: np.ndarray) -> np.ndarray:
    """fp32 [T, vocabulary] of a window [T] in an empty cache, valid until the next one."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(session.context), False)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens.tolist()):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = 1
    status = llama_cpp.llama_decode(session.context, batch)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise SystemExit(f"llama_decode ended with {status}")
    pointer = llama_cpp.llama_get_logits(session.context)
    return np.ctypeslib.as_array(pointer, (len(tokens), session.vocabulary))


def losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """fp64 [T - 1] of the tokens behind the first."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    normalizer = np.log(np.exp(rows).sum(axis=1))
    return normalizer - rows[np.arange(len(rows)), tokens[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    for name in ("ids", "text", "result"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    ids = np.load(args.ids)
    kinds = Counter(t.tensor_type.name for t in gguf.GGUFReader(args.path).tensors)
    session = Session(args.path, ids.shape[1], ids.shape[1], args.threads)
    found = [losses(window_logits(session, window), window) for window in ids]
    result = {
        "nll": float(np.concatenate(found).mean()),
        "tokens": tokens_of(session, args.text.read_bytes()),
        "tensors": dict(kinds),
        "versions": {"llama_cpp_python": llama_cpp.__version__, "numpy": np.__version__},
        "system_info": ctypes.string_at(llama_cpp.llama_print_system_info()).decode(),
    }
    args.result.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
