"""Causal language models and a tokenizer small enough to build in every test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 257  # 256 bytes and the end of text


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte; adds no special tokens, has no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate([*alphabet, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def tiny_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": VOCAB_SIZE - 1,
        "eos_token_id": VOCAB_SIZE - 1,
    }
    return LlamaConfig(**{**settings, **overrides})


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama with random weights that leaves the global random generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides)).eval()


class Logits(nn.Module):
    """input_ids -> logits: one tensor in, one out, no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def perturbed(model: LlamaForCausalLM, scale: float, seed: int = 1) -> LlamaForCausalLM:
    """A copy with normal noise of standard deviation `scale` on every parameter."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return copy


class NormedPair(nn.Module):
    """Two linears behind one norm and one behind both: what shares, what fuses, and little else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.gain = nn.Parameter(1 + torch.rand(64))
            self.left, self.right = nn.Linear(64, 96), nn.Linear(64, 96, bias=False)
            self.out = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = self.gain * (wide * inverse).to(x.dtype)
        return self.out(self.left(normed).relu() + self.right(normed))


class BigramModel(LlamaForCausalLM):
    """A model whose logits are a function of the last token alone: `table[token]`."""

    def __init__(self, table: Tensor) -> None:
        """table: [VOCAB_SIZE, VOCAB_SIZE] logits of the next token by token."""
        super().__init__(tiny_config(num_hidden_layers=1))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: Tensor, **_) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table[input_ids])


def uniform_model() -> BigramModel:
    return BigramModel(torch.zeros(VOCAB_SIZE, VOCAB_SIZE))


def bigram_model(pairs: str, logit: float = 5.0) -> BigramModel:
    """Logit `logit` for the two bytes of each word of `pairs` in sequence, 0 for all others.

    "_" stands for a space: "a_ _b" makes a space likely after a, and b likely after a space.
    """
    tokenizer = byte_tokenizer()
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    for pair in pairs.split():
        last, following = tokenizer(pair.replace("_", " "))["input_ids"]
        table[last, following] = logit
    return BigramModel(table)


def save_tiny_bert(directory: Path) -> None:
    """One layer of 32 with its byte tokenizer, as a checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, **sizes)
    BertModel(config).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.save_pretrained(directory)
