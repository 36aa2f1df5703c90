"""Models of several parts small enough to build in every test: two stacks, two towers, audio."""

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

STACKS = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=99, decoder_start_token_id=0, **sizes))


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **STACKS))


def whisper() -> nn.Module:
    sizes = {"max_source_positions": 30, "max_target_positions": 32, "num_mel_bins": 16}
    return WhisperForConditionalGeneration(WhisperConfig(**STACKS, **sizes))


def wav2vec2() -> nn.Module:
    """4 samples to a frame, twice; with layer norm, so that padding leaks into no other frame."""
    features = {
        "conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 4),
        "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    }  # fmt: skip
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, **TOWER, **features, **positions))


def clip() -> nn.Module:
    """Nine patches and the class token for an image."""
    tokens = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 1}
    text = {"vocab_size": 99, "max_position_embeddings": 32, **tokens, **TOWER}
    vision = {"image_size": 24, "patch_size": 8, **TOWER}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def question_answering() -> nn.Module:
    return BertForQuestionAnswering(BertConfig(vocab_size=99, **TOWER))


def built(make) -> nn.Module:
    """A model with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch, length), generator=generator)


def mask(length: int, *kept: int) -> Tensor:
    """int64 [len(kept), length]: so many ones at the left of every row."""
    return (torch.arange(length) < torch.tensor(kept).unsqueeze(1)).long()
