"""Vision-language and two-tower models in the table of architectures."""

import torch
from architecture_case import (
    DECODER,
    ENCODER,
    IMAGE,
    IMAGE_TOKEN,
    SIZES,
    Architecture,
    Batch,
    Inputs,
    ids,
    images,
    images_and_tokens,
    noise,
    padded_tokens,
    tokens,
)

TOWERS = {"text_config": ENCODER, "vision_config": IMAGE, "projection_dim": 32}
TWO_BLOCKS = DECODER | {"num_hidden_layers": 2}
LLAMA = TWO_BLOCKS | {"model_type": "llama"}
MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
PLACES = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
QWEN_TEXT = TWO_BLOCKS | {"head_dim": 16, "rope_parameters": MULTIMODAL_ROPE}
QWEN_VISION = {"depth": 1, "hidden_size": 64, "num_heads": 4, "patch_size": 8}
QUERIES = SIZES | {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "encoder_hidden_size": 64,
    "cross_attention_frequency": 2,
}
BLIP = TOWERS | {"text_config": ENCODER | {"encoder_hidden_size": 64}, "image_text_hidden_size": 32}


def image_prompt(count: int) -> Inputs:
    """Images, and texts with `count` places for what becomes of each."""

    def inputs(generator: torch.Generator) -> Batch:
        prompt = ids(generator, 2, 8 + count)
        prompt[:, 2 : 2 + count] = IMAGE_TOKEN
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} | images(generator)

    return inputs


def several_images(generator: torch.Generator) -> Batch:
    """One image [1, 3, 32, 32] of a series to each text."""
    batch = image_prompt(4)(generator)
    return batch | {"pixel_values": batch["pixel_values"][:, None]}


def marked_images(generator: torch.Generator) -> Batch:
    """Texts whose places for an image are marked."""
    batch = image_prompt(4)(generator)
    return batch | {"token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).long()}


def patches(generator: torch.Generator) -> Batch:
    """In each of two texts an image of 4 x 4 patches, twice in time, that become 2 x 2."""
    batch = image_prompt(4)(generator)
    return batch | {
        "mm_token_type_ids": (batch["input_ids"] == IMAGE_TOKEN).int(),
        "pixel_values": noise(generator, 2 * 16, 2 * 3 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


VISION_LANGUAGE = [
    Architecture("CLIPModel", TOWERS, images_and_tokens),
    Architecture("CLIPTextModel", ENCODER, tokens),
    Architecture(
        "SiglipModel",
        {"text_config": ENCODER | {"projection_size": 64}, "vision_config": IMAGE},
        images_and_tokens,
        left=("vision_model.head.attention.out_proj",),
    ),
    Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": IMAGE | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
            "image_token_index": IMAGE_TOKEN,
        },
        image_prompt(16),
        left=("lm_head",),
    ),
    Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_VISION | {"embed_dim": 64, "mlp_ratio": 2},
            **PLACES,
        },
        patches,
        left=("lm_head",),
    ),
    Architecture(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": TWO_BLOCKS | {"model_type": "gemma", "head_dim": 16},
            "vision_config": IMAGE | {"model_type": "siglip_vision_model"},
            "image_token_index": IMAGE_TOKEN,
            "projection_dim": 64,
            "vocab_size": 96,
            "hidden_size": 64,
        },
        image_prompt(16),
        left=("lm_head", "model.vision_tower.head.attention.out_proj"),
    ),
    Architecture(
        "BlipForConditionalGeneration",
        BLIP,
        images_and_tokens,
        left=(
            "text_decoder.cls.predictions.decoder",
            "text_decoder.cls.predictions.transform.dense",
        ),
    ),
    Architecture(
        "BlipForImageTextRetrieval",
        BLIP,
        images_and_tokens,
        left=("text_proj", "vision_proj"),
    ),
    Architecture(
        "Blip2ForConditionalGeneration",
        {
            "text_config": ENCODER
            | {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64},
            "vision_config": IMAGE,
            "qformer_config": QUERIES,
            "num_query_tokens": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        image_prompt(4),
        left=("language_model.lm_head",),
    ),
    Architecture(
        "Idefics3ForConditionalGeneration",
        {
            "text_config": LLAMA,
            "vision_config": IMAGE,
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
        },
        several_images,
        left=("lm_head",),
    ),
    Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": TWO_BLOCKS | {"head_dim": 16},
            "vision_config": IMAGE | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        marked_images,
        left=("lm_head",),
    ),
    Architecture(
        "InternVLForConditionalGeneration",
        {
            "text_config": TWO_BLOCKS | {"model_type": "qwen2"},
            "vision_config": IMAGE | {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE_TOKEN,
            "image_seq_length": 4,
        },
        image_prompt(4),
        left=("lm_head",),
    ),
    Architecture(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_VISION
            | {"intermediate_size": 96, "out_hidden_size": 64, "window_size": 32}
            | {"fullatt_block_indexes": [0]},
            **PLACES,
        },
        patches,
        left=("lm_head",),
        slow=True,
    ),
    Architecture(
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_VISION
            | {"intermediate_size": 96, "out_hidden_size": 64, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0]},
            **PLACES,
        },
        patches,
        left=("lm_head",),
        slow=True,
    ),
    Architecture(
        "GitForCausalLM", ENCODER | {"vision_config": IMAGE}, images_and_tokens, ("output",)
    ),
    Architecture("ViltModel", ENCODER | IMAGE, images_and_tokens),
    Architecture(
        "VisualBertModel",
        ENCODER | {"visual_embedding_dim": 32},
        lambda generator: padded_tokens(generator) | {"visual_embeds": noise(generator, 2, 4, 32)},
    ),
]
