"""Train a small language model, such as the one arc_ao ships, from a text of public-domain books.

    python -m benchmarks.training.small_model TRAIN.txt VALIDATION.txt -o DIR
    python -m benchmarks.training.small_model TRAIN.txt VALIDATION.txt -o DIR --architecture qwen3

A Llama or Qwen3 architecture (hidden 256, 4 layers, FFN 768, 4 query and 2 key/value heads of 64,
byte-level BPE of 2048 tokens, tied embedding) with the outlier input channels that make real
LLMs hard to quantize. They are put in at initialisation and the weights learn around them:

* RMSNorm gains have the channel profile of a real 4B model and stay frozen;
* rows of v_proj and up_proj start scaled by such a profile, so that o_proj and down_proj read
  outliers too; these are trained like everything else.

A profile is the distribution of rms(x_k) / median_k rms(x_k) over the input channels of a kind of
linear in Qwen3-4B-Instruct-2507, median over its 36 layers, from a published importance matrix.
Of 256 channels 6 are outliers (2.3 %), log-spaced over the real model's top percent, from its 99 %
quantile to its maximum. As in real models they sit in the same channels in every layer.

Prints the validation loss in nats per token; the last line of stdout is one JSON document.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
SEQUENCE_LENGTH = 256
OUTLIER_SHARE = 6 / 256
# rms / median rms of the input channels: these quantiles, then the maximum.
QUANTILES = [0.0, 0.01, 0.1, 0.5, 0.9, 0.99]
PROFILES = {
    "attention_input": ([0.70, 0.76, 0.85, 1.0, 1.74, 5.51], 32.4),
    "attention_output": ([0.40, 0.43, 0.66, 1.0, 1.77, 3.23], 8.0),
    "mlp_input": ([0.80, 0.85, 0.95, 1.0, 1.27, 3.06], 21.1),
    "mlp_middle": ([0.60, 0.63, 0.75, 1.0, 1.68, 3.06], 10.5),
}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every byte representable, one special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Token ids of `text`, encoded in pieces so that the tokenizer's memory stays small."""
    piece = 1 << 20
    pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(pieces)
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])


def channel_profile(kind: str, order: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Channel magnitudes [K] of `kind`; `order` [K] lists the channels from quiet to loud."""
    quantiles, largest = PROFILES[kind]
    outliers = round(OUTLIER_SHARE * len(order))
    ranks = np.linspace(0, QUANTILES[-1], len(order) - outliers)
    bulk = np.interp(ranks, QUANTILES, np.log(quantiles))
    top = np.linspace(math.log(quantiles[-1]), math.log(largest), outliers)
    profile = torch.empty(len(order))
    profile[order] = torch.from_numpy(np.exp(np.concatenate((bulk, top)))).float()
    return profile * torch.exp(0.1 * torch.randn(len(order), generator=generator))


def build_model(architecture: str, generator: torch.Generator) -> PreTrainedModel:
    """Random weights with outlier input channels; fp32."""
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = model_class(config).float()
    add_outlier_channels(model, generator)
    return model


@torch.no_grad()
def add_outlier_channels(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Give the inputs of all linears a real channel profile, see the module's docstring.

    Columns that read a channel of profile p start scaled by 1 / sqrt(p).
    """
    config = model.config
    heads_per_kv = config.num_attention_heads // config.num_key_value_heads
    hidden = torch.randperm(config.hidden_size, generator=generator)
    value = torch.randperm(config.num_key_value_heads * config.head_dim, generator=generator)
    middle = torch.randperm(config.intermediate_size, generator=generator)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (
            (
                layer.input_layernorm,
                "attention_input",
                (attention.q_proj, attention.k_proj, attention.v_proj),
            ),
            (layer.post_attention_layernorm, "mlp_input", (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, kind, readers in norms:
            gain = channel_profile(kind, hidden, generator)
            norm.weight.copy_(gain).requires_grad_(False)
            for reader in readers:
                reader.weight.div_(gain.sqrt())
        up = channel_profile("mlp_middle", middle, generator)
        mlp.up_proj.weight.mul_(up.unsqueeze(1))
        mlp.down_proj.weight.div_(up.sqrt())
        v = channel_profile("attention_output", value, generator)
        attention.v_proj.weight.mul_(v.unsqueeze(1))
        per_head = v.view(-1, config.head_dim).repeat_interleave(heads_per_kv, dim=0)
        attention.o_proj.weight.div_(per_head.flatten().sqrt())


def batches(tokens: np.ndarray, batch_size: int, generator: torch.Generator):
    """Endless random windows [batch_size, SEQUENCE_LENGTH + 1] of the training tokens."""
    while True:
        starts = torch.randint(
            len(tokens) - SEQUENCE_LENGTH - 1, (batch_size,), generator=generator
        )
        rows = [tokens[s : s + SEQUENCE_LENGTH + 1].astype(np.int64) for s in starts.tolist()]
        yield torch.from_numpy(np.stack(rows))


def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token of ids [B, T+1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: PreTrainedModel, tokens: np.ndarray, windows: int = 64) -> float:
    """Mean loss over `windows` consecutive windows."""
    span = SEQUENCE_LENGTH + 1
    ids = torch.from_numpy(tokens[: windows * span].astype(np.int64)).view(-1, span)
    return torch.stack([loss_of(model, chunk) for chunk in ids.split(16)]).mean().item()


def optimizer_of(model: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def learning_rate_factor(progress: float, warmup: float = 0.03) -> float:
    """Linear warm-up, cosine to 2 % of the peak; `progress` in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train(model, train_tokens, val_tokens, args, generator) -> dict[str, float]:
    """Train for `--minutes` of wall time or `--steps`, whichever ends first."""
    optimizer = optimizer_of(model, args.learning_rate)
    model.compile()
    source = batches(train_tokens, args.batch_size, generator)
    start, step, progress = time.monotonic(), 0, 0.0
    bar = tqdm(total=args.steps, mininterval=30)
    while progress < 1:
        elapsed = (time.monotonic() - start) / (60 * args.minutes)
        progress = min(1.0, max(step / args.steps, elapsed))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(progress)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % 250 == 0:
            bar.write(f"step {step}: validation {validation_loss(model, val_tokens):.4f}")
            model.save_pretrained(args.output / "unfinished")
    seen = step * args.batch_size * SEQUENCE_LENGTH
    return {"steps": step, "tokens": seen, "validation_loss": validation_loss(model, val_tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="UTF-8 text to train on")
    parser.add_argument("validation", type=Path, help="UTF-8 text that is never trained on")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=24, help="windows of 256 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    text = args.train.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text[: 16 << 20])
    train_tokens = encode(tokenizer, text)
    val_tokens = encode(tokenizer, args.validation.read_text(encoding="utf-8"))
    model = build_model(args.architecture, generator)
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.output)
    result = train(model, train_tokens, val_tokens, args, generator)
    model.to(torch.bfloat16).save_pretrained(args.output)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
