"""Vision and audio models, and one of time series, in the table of architectures."""

import torch
from architecture_case import (
    ENCODER,
    IMAGE,
    SPECIAL,
    VOCABULARY,
    Architecture,
    Batch,
    ids,
    images,
    mask,
    noise,
    waves,
)
from architecture_cases_encoders import TWO_STACKS

CONVOLUTIONS = ENCODER | {
    "conv_dim": [32, 32],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
WHISPER = TWO_STACKS | {
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "begin_suppress_tokens": None,
}
SPEECH_TO_TEXT = TWO_STACKS | {
    "input_feat_per_channel": 16,
    "num_conv_layers": 1,
    "conv_kernel_sizes": [3],
    "conv_channels": 32,
    "max_source_positions": 64,
    "max_target_positions": 64,
}
SPEECH_T5 = CONVOLUTIONS | {k: v for k, v in TWO_STACKS.items() if k != "d_model"}
SPECTROGRAM = {"frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
MOONSHINE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "encoder_num_hidden_layers": 1,
    "decoder_num_hidden_layers": 1,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [32, 64],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}
CONVNEXT = {
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "num_stages": 2,
    "layer_scale_init_value": 0.5,
    "image_size": 32,
}
DETR = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 8,
    "num_labels": 5,
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    },
}
SEGMENT = {
    "vision_config": IMAGE
    | {"output_channels": 32, "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 16}
    | {"mlp_dim": 96},
    "prompt_encoder_config": {
        "hidden_size": 32,
        "image_size": 32,
        "patch_size": 8,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
}
DEPTH = IMAGE | {
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 32, 32],
    "fusion_hidden_size": 16,
}
PATCH_SERIES = {
    "num_input_channels": 2,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "num_hidden_layers": 1,
    "d_model": 64,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "prediction_length": 8,
}


def vision(model: str, settings: dict, *left: str, **expected) -> Architecture:
    """A vision model on images of 32 pixels, and what of it stays in 16 bits."""
    return Architecture(model, settings, images, left, **expected)


def listener(model: str, settings: dict, *left: str, **expected) -> Architecture:
    """An audio encoder on padded recordings, and what of it stays in 16 bits."""
    return Architecture(model, settings, waves, left, **expected)


def target(generator: torch.Generator) -> Batch:
    """The beginning of a transcript."""
    return {"decoder_input_ids": ids(generator, 2, 12)}


def spectrograms(generator: torch.Generator) -> Batch:
    """[bins, frames] for Whisper, and a transcript."""
    return {"input_features": noise(generator, 2, 16, 32)} | target(generator)


def padded_frames(generator: torch.Generator) -> Batch:
    """[frames, bins], the second recording shorter, and a transcript."""
    frames = {"input_features": noise(generator, 2, 24, 16), "attention_mask": mask(24)}
    return frames | target(generator)


def points(generator: torch.Generator) -> Batch:
    """Images, and a point in each whose object is to be found."""
    return images(generator) | {"input_points": 16 + 4 * noise(generator, 2, 1, 1, 2)}


VISION = [
    vision("ViTModel", IMAGE),
    vision("ViTForImageClassification", IMAGE | {"num_labels": 5}, "classifier"),
    vision("DeiTModel", IMAGE),
    vision("SwinModel", SWIN),
    vision("Dinov2Model", IMAGE),
    vision("DINOv3ViTModel", IMAGE),
    vision("ConvNextModel", CONVNEXT),
    vision("BeitModel", IMAGE | {"use_relative_position_bias": True}),
    vision(
        "SegformerForSemanticSegmentation",
        PYRAMID | {"decoder_hidden_size": 32, "num_labels": 5},
        "decode_head.linear_projections.*.proj",
    ),
    vision("DetrForObjectDetection", DETR, "bbox_predictor.layers.*", "class_labels_classifier"),
    vision("DPTForDepthEstimation", DEPTH, "neck.reassemble_stage.readout_projects.*.*"),
    Architecture("SamModel", SEGMENT, points),
    vision("ViTMAEModel", IMAGE, slow=True),
]
AUDIO = [
    Architecture("WhisperForConditionalGeneration", WHISPER, spectrograms, ("proj_out",)),
    listener("Wav2Vec2Model", CONVOLUTIONS),
    listener("Wav2Vec2ForCTC", CONVOLUTIONS, "lm_head"),
    listener("HubertModel", CONVOLUTIONS),
    listener(
        "WavLMModel",
        CONVOLUTIONS,
        *(f"encoder.layers.*.attention.{name}_proj" for name in ("k", "out", "q", "v")),
    ),
    Architecture(
        "SpeechT5ForSpeechToText",
        SPEECH_T5,
        lambda generator: waves(generator) | target(generator),
        ("text_decoder_postnet.lm_head",),
    ),
    Architecture(
        "ASTModel",
        IMAGE | SPECTROGRAM,
        lambda generator: {"input_values": noise(generator, 2, 32, 16)},
    ),
    Architecture(
        "Speech2TextForConditionalGeneration", SPEECH_TO_TEXT, padded_frames, ("lm_head",)
    ),
    Architecture(
        "MoonshineForConditionalGeneration",
        MOONSHINE,
        lambda generator: {"input_values": noise(generator, 2, 2000)} | target(generator),
        ("proj_out",),
    ),
    Architecture(
        "PatchTSTForPrediction",
        PATCH_SERIES,
        lambda generator: {"past_values": noise(generator, 2, 32, 2).float()},
        ("head.projection", "model.encoder.embedder.input_embedding"),
        dtype=torch.float32,
    ),
]
