"""Text encoders and encoder-decoders in the table of architectures."""

import torch
from architecture_case import (
    ENCODER,
    SIZES,
    SPECIAL,
    TEXT,
    VOCABULARY,
    Architecture,
    padded_tokens,
    source_and_target,
)

DISTIL = {"dim": 64, "hidden_dim": 96, "n_layers": 1, "n_heads": 4, **TEXT}
DEBERTA = ENCODER | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
}
MODERN = ENCODER | {"cls_token_id": 1, "sep_token_id": 2}
XLNET = {"d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96, "d_head": 16}
XLNET |= {"vocab_size": VOCABULARY, **SPECIAL}
FUNNEL = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4, "d_head": 16}
FUNNEL |= {"d_inner": 96, "vocab_size": VOCABULARY, **SPECIAL}
SMALL_EMBEDDING = ENCODER | {"embedding_size": 32}
MOBILE = SMALL_EMBEDDING | {"intra_bottleneck_size": 32, "true_hidden_size": 32}
CANINE = SIZES | SPECIAL | {"max_position_embeddings": 64, "num_hash_buckets": 32}
CANINE |= {"local_transformer_stride": 8}
MASKED_HEAD = ("cls.predictions.decoder", "cls.predictions.transform.dense")
FUNNEL_LEFT = tuple(
    f"{place}.attention.{name}"
    for place in ("encoder.blocks.*.*", "decoder.layers.*")
    for name in ("r_kernel", "seg_embed")
)
THREE = ENCODER | {"num_labels": 3}
TWO_STACKS = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **TEXT,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **TEXT,
}
PROPHET = TEXT | {"hidden_size": 64, "decoder_start_token_id": 0, "num_decoder_layers": 1}
PROPHET |= {"num_encoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
PROPHET |= {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}


def encoder(model: str, settings: dict, *left: str, **expected) -> Architecture:
    """A text encoder on padded texts, and what of it stays in 16 bits."""
    return Architecture(model, settings, padded_tokens, left, **expected)


def translator(model: str, settings: dict, *left: str, **expected) -> Architecture:
    """An encoder-decoder on padded sources; its output head stays in 16 bits."""
    return Architecture(model, settings, source_and_target, ("lm_head", *left), **expected)


ENCODERS = [
    encoder("BertModel", ENCODER),
    encoder("BertForMaskedLM", ENCODER, *MASKED_HEAD),
    encoder("BertForSequenceClassification", THREE, "classifier"),
    encoder("BertForTokenClassification", THREE, "classifier"),
    encoder("BertForQuestionAnswering", ENCODER, "qa_outputs"),
    encoder("RobertaModel", ENCODER),
    encoder("RobertaForSequenceClassification", THREE, "classifier.dense", "classifier.out_proj"),
    encoder("DistilBertModel", DISTIL),
    encoder("DistilBertForQuestionAnswering", DISTIL, "qa_outputs"),
    encoder("ElectraModel", SMALL_EMBEDDING),
    encoder(
        "ElectraForPreTraining",
        SMALL_EMBEDDING,
        "discriminator_predictions.dense",
        "discriminator_predictions.dense_prediction",
    ),
    encoder("DebertaV2Model", DEBERTA),
    encoder(
        "DebertaV2ForSequenceClassification",
        DEBERTA | {"num_labels": 1},
        "classifier",
        "pooler.dense",
    ),
    encoder("AlbertModel", SMALL_EMBEDDING | {"num_hidden_layers": 2}),
    encoder("MPNetModel", ENCODER),
    encoder("ModernBertModel", MODERN),
    encoder("ModernBertForMaskedLM", MODERN, "decoder", "head.dense"),
    encoder(
        "XLNetModel",
        XLNET,
        *(f"layer.*.rel_attn.{name}" for name in ("k", "o", "q", "r", "seg_embed", "v")),
        dtype=torch.float32,
    ),
    encoder("NomicBertModel", ENCODER | {"head_dim": 16}),
    encoder("FNetModel", ENCODER, dtype=torch.float32),
    encoder("LlamaForSequenceClassification", ENCODER, "score"),
    encoder("FunnelModel", FUNNEL, *FUNNEL_LEFT),
    encoder(
        "LongformerModel",
        ENCODER | {"attention_window": 8},
        *(f"encoder.layer.*.attention.self.{name}_global" for name in ("key", "query", "value")),
    ),
    encoder("CanineModel", CANINE),
    encoder("MobileBertModel", MOBILE, slow=True),
    encoder("SqueezeBertModel", ENCODER | {"embedding_size": 64}, slow=True),
    encoder("ConvBertModel", ENCODER | {"embedding_size": 64}, slow=True),
    encoder("RoFormerModel", ENCODER, slow=True),
    encoder("TapasModel", ENCODER, slow=True),
    encoder("EsmModel", ENCODER | {"mask_token_id": 90}, "contact_head.regression", slow=True),
    encoder("T5EncoderModel", T5, slow=True),
    encoder("EuroBertModel", ENCODER | {"num_key_value_heads": 4, "head_dim": 16}, slow=True),
    encoder("XLMRobertaModel", ENCODER, slow=True),
]
ENCODER_DECODERS = [
    translator("T5ForConditionalGeneration", T5),
    translator("BartForConditionalGeneration", TWO_STACKS),
    translator("MarianMTModel", TWO_STACKS | {"decoder_vocab_size": VOCABULARY}),
    translator("MBartForConditionalGeneration", TWO_STACKS),
    translator("M2M100ForConditionalGeneration", TWO_STACKS),
    translator("PegasusForConditionalGeneration", TWO_STACKS),
    translator(
        "LEDForConditionalGeneration",
        TWO_STACKS
        | {"attention_window": 8}
        | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        *(
            f"led.encoder.layers.*.self_attn.longformer_self_attn.{name}_global"
            for name in ("key", "query", "value")
        ),
    ),
    translator("ProphetNetForConditionalGeneration", PROPHET),
    translator(
        "SwitchTransformersForConditionalGeneration",
        T5
        | {"num_layers": 2, "num_decoder_layers": 2, "num_experts": 2}
        | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "encoder.block.*.layer.*.mlp.router.classifier",
        "decoder.block.*.layer.*.mlp.router.classifier",
    ),
    translator("LongT5ForConditionalGeneration", T5 | {"local_radius": 4}, slow=True),
    translator("UMT5ForConditionalGeneration", T5, slow=True),
    translator("BlenderbotForConditionalGeneration", TWO_STACKS, slow=True),
]
