"""Output heads of every kind stay in their own precision; bodies are quantized whole."""

import warnings

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPForImageClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from arc_ao import NVFP4Config, quantize_
from arc_ao.flow.targets import collect_targets

PLAIN = NVFP4Config()
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TEXT = {"vocab_size": 64, "num_hidden_layers": 1, **SIZES}
IMAGE = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, **SIZES}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
CLIP = {"vision_config": IMAGE, "text_config": TEXT, "projection_dim": 32}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# What makes a model, its heads, and how many linears its body has.
MODELS = {
    "sequences": (lambda: BertForSequenceClassification(BertConfig(**TEXT)), {"classifier"}, 7),
    "two linears": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)),
        {"classifier.dense", "classifier.out_proj"},
        6,
    ),
    "score": (
        lambda: LlamaForSequenceClassification(tiny_config(num_hidden_layers=1)),
        {"score"},
        7,
    ),
    "answers": (lambda: BertForQuestionAnswering(BertConfig(**TEXT)), {"qa_outputs"}, 6),
    "masked tokens": (
        lambda: BertForMaskedLM(BertConfig(**TEXT)),
        {"cls.predictions.transform.dense", "cls.predictions.decoder"},
        6,
    ),
    "images": (lambda: ViTForImageClassification(ViTConfig(**IMAGE)), {"classifier"}, 6),
    "no body": (lambda: CLIPForImageClassification(CLIPConfig(**CLIP)), {"classifier"}, 6),
    "speech": (lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)), {"proj_out"}, 16),
    "a second body": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**IMAGE, **DECODER)), set(), 14),
}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside another module"])
@pytest.mark.parametrize("make, heads, body", MODELS.values(), ids=MODELS)
def test_heads_stay_and_the_body_is_chosen(make, heads, body, inside):
    model = make()
    targets = collect_targets(nn.ModuleDict({"model": model}) if inside else model, PLAIN)
    prefix = "model." if inside else ""
    assert targets.skipped.keys() == {prefix + name for name in heads}
    assert set(targets.skipped.values()) <= {"output head or router, kept in its own precision"}
    assert len(targets.modules) == body


def test_a_head_is_quantized_where_it_is_asked_for():
    model = BertForSequenceClassification(BertConfig(**TEXT))
    targets = collect_targets(model, PLAIN, lambda _, name: name == "classifier")
    assert targets.modules.keys() == {"classifier"}


def test_a_convolution_under_weight_norm_is_no_expert():
    """Wav2Vec2's positions: listed nowhere, and no warning."""
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(num_feat_extract_layers=1, **convolutions, **positions, **TEXT)
    model = Wav2Vec2ForCTC(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = quantize_(model, PLAIN, calibration_data=[torch.randn(1, 400)], progress=False)
    assert summary.skipped.keys() == {"lm_head"} and len(summary.layers) == 7


@pytest.mark.parametrize(
    "norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_no_kind_of_weight_norm_makes_experts_of_a_convolution(norm):
    model = nn.Sequential(nn.Linear(32, 32), norm(nn.Conv1d(4, 4, 3), dim=2))
    assert collect_targets(model, PLAIN).skipped == {}
