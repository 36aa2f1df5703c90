"""The tokenizer in a GGUF file: byte-level BPE, as llama.cpp's "gpt2" has it.

llama.cpp does not read how a tokenizer cuts a text into words: it has the rules of known ones under
names. Here the name follows from the tokenizer's own rules; where there is none for them, the file
would give other tokens than the model was trained on, and is refused.
"""

import json
from typing import Any

from gguf import TokenType

MODEL = "gpt2"  # llama.cpp's byte-level BPE
BYTES_OF_SPLITS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
BYTES_AND_SPLITS = BYTES_OF_SPLITS | {"use_regex": True}  # with GPT-2's own rule
DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(numbers: str) -> dict[str, Any]:
    regex = WORDS.replace("NUMBERS", numbers)
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {
    "gpt-2": [BYTES_AND_SPLITS],
    "smollm": [DIGITS, BYTES_AND_SPLITS],
    "qwen2": [_split(r"\p{N}"), BYTES_OF_SPLITS],
    "llama-bpe": [_split(r"\p{N}{1,3}"), BYTES_OF_SPLITS],
}
IGNORES_MERGES = ("llama-bpe",)  # words of the vocabulary are one token, merges or not
NORMALIZERS = (None, "NFC")  # of texts in that form, which nearly all are, it changes nothing
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
SAMPLE = "a"  # any text: what is put around it counts


def write_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write tokens, merges, special ids and chat template.

    Args:
        writer: gguf.GGUFWriter.
        vocab_size: rows of the embedding; ids without a token get a placeholder.

    Raises:
        ValueError: a tokenizer that llama.cpp would not do the same as.
    """
    found = _definition(tokenizer)
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre(pre_tokenizer_name(found))
    _write_tokens(writer, tokenizer, found, vocab_size)
    writer.add_token_merges(_merges(found))
    for kind in SPECIAL:
        token_id = getattr(tokenizer, f"{kind}_token_id", None)
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    _write_surroundings(writer, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _definition(tokenizer: Any) -> dict[str, Any]:
    """What tokenizer.json says.

    Raises:
        ValueError: no such tokenizer, or no byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("a tokenizer of the tokenizers library", type(tokenizer).__name__)
    found = json.loads(backend.to_str())
    model, decoder = found["model"], found["decoder"] or {}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel" or affixes:
        kind = f"{model['type']} with the decoder {decoder.get('type')}"
        raise _refusal("byte-level BPE", f"{kind} and affixes" if affixes else kind)
    if not model["merges"]:
        raise _refusal("byte-level BPE with merges", "one without: llama.cpp reads no empty list")
    return found


def _refusal(expected: str, found: str) -> ValueError:
    return ValueError(
        f"tokenizer: expected {expected}, found {found}; export without the tokenizer "
        "(tokenizer=None) for a file that takes token ids alone"
    )


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts texts into words.

    Args:
        definition: what tokenizer.json says.

    Raises:
        ValueError: it has none.
    """
    steps = _steps(definition["pre_tokenizer"])
    normalizer = (definition["normalizer"] or {}).get("type")
    ignores_merges = bool(definition["model"].get("ignore_merges"))
    for name, expected in PRE_TOKENIZERS.items():
        same = steps == expected and ignores_merges == (name in IGNORES_MERGES)
        if same and normalizer in NORMALIZERS:
            return name
    raise _refusal(
        f"the rules of one of {', '.join(PRE_TOKENIZERS)}",
        f"normalizer {normalizer}, pre_tokenizer {json.dumps(steps)}, ignore_merges "
        f"{ignores_merges}",
    )


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Pre-tokenizers one after the other, without what concerns offsets alone."""
    whole = pre_tokenizer or {"type": "Sequence", "pretokenizers": []}
    steps = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]


def _write_tokens(writer: Any, tokenizer: Any, found: dict[str, Any], vocab_size: int) -> None:
    """A text and a type for each row of the embedding."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= vocab_size:
        raise _refusal(f"ids below the vocabulary's size {vocab_size}", f"{max(texts)}")
    added = {
        token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for token in found["added_tokens"]
    }
    ids = range(vocab_size)
    types = [added.get(i, TokenType.NORMAL if i in texts else TokenType.UNUSED) for i in ids]
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types(types)


def _merges(found: dict[str, Any]) -> list[str]:
    """Pairs with a space between them; releases of the library differ in how they write them."""
    return [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]


def _write_surroundings(writer: Any, tokenizer: Any) -> None:
    """Whether a text gets a token before it or behind it.

    Raises:
        ValueError: others than the begin and the end of a sequence.
    """
    plain = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    whole = tokenizer(SAMPLE).input_ids
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    ways = {
        (before, behind): begin * before + plain + end * behind
        for before in (False, True)
        for behind in (False, True)
    }
    found = next((way for way, ids in ways.items() if ids == whole), None)
    if found is None:
        raise _refusal("at most a begin and an end of sequence around a text", f"{whole}")
    writer.add_add_bos_token(found[0])
    writer.add_add_eos_token(found[1])
