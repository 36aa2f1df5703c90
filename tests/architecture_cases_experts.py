"""Mixtures of experts, state-space and hybrid models in the table of architectures."""

import torch
from architecture_case import DECODER, SIZES, SPECIAL, TEXT, VOCABULARY
from architecture_cases_decoders import NARROW_HEADS, causal, relative

EXPERTS = DECODER | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
FOUR_EXPERTS = EXPERTS | {"num_experts": 4}
FOUR_LOCAL_EXPERTS = EXPERTS | {"num_local_experts": 4}
DENSE_FIRST = EXPERTS | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
GROUPED = {  # multi-query attention whose output projection goes by groups of heads
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "n_routed_experts": 4,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
DBRX = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 1,
    "max_seq_len": 64,
    "vocab_size": VOCABULARY,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    **SPECIAL,
}


def weights(*modules: str) -> tuple[str, ...]:
    """The output head, and the weights of fused experts at these places of a block."""
    names = ("down_proj", "gate_up_proj")
    return ("lm_head", *(f"model.layers.*.{module}.{name}" for module in modules for name in names))


FUSED = weights("mlp.experts")
EXPERT_DECODERS = [
    causal("Mixtral", FOUR_LOCAL_EXPERTS, left=FUSED),
    causal(
        "Qwen2Moe",
        FOUR_EXPERTS | {"shared_expert_intermediate_size": 32},
        left=(*FUSED, "model.layers.*.mlp.shared_expert_gate"),
    ),
    causal("Qwen3Moe", FOUR_EXPERTS, left=FUSED),
    causal("Olmoe", FOUR_EXPERTS, left=FUSED),
    causal("GraniteMoe", FOUR_LOCAL_EXPERTS, left=weights("block_sparse_moe.experts")),
    causal("Phimoe", FOUR_LOCAL_EXPERTS, left=(*FUSED, "model.layers.*.mlp.router")),
    causal(
        "Dbrx",
        DBRX,
        left=(
            "lm_head",
            *(f"transformer.blocks.*.ffn.experts.mlp.{k}" for k in ("v1", "w1", "w2")),
        ),
    ),
    causal("GptOss", FOUR_LOCAL_EXPERTS, left=FUSED),
    causal("DeepseekV2", DENSE_FIRST | LATENT, left=FUSED),
    causal("DeepseekV3", DENSE_FIRST | LATENT, left=FUSED),
    causal(
        "DeepseekV4",
        EXPERTS | GROUPED,
        left=(*FUSED, "model.layers.*.self_attn.o_a_proj"),
    ),
    causal(
        "Llama4",
        NARROW_HEADS | {"intermediate_size_mlp": 96, "num_local_experts": 2},
        left=(*weights("feed_forward.experts"), "model.layers.*.feed_forward.router"),
    ),
    causal("Glm4Moe", DENSE_FIRST, left=FUSED),
    causal(
        "JetMoe",
        FOUR_LOCAL_EXPERTS | {"kv_channels": 16},
        left=(
            "lm_head",
            "model.layers.*.mlp.input_linear.weight",
            "model.layers.*.mlp.output_linear.weight",
            "model.layers.*.self_attention.experts.input_linear.weight",
            "model.layers.*.self_attention.experts.output_linear.weight",
        ),
    ),
    relative("Dots1", DENSE_FIRST, left=FUSED),
    relative("FlexOlmo", FOUR_EXPERTS, left=FUSED),
    relative("HunYuanMoEV1", FOUR_EXPERTS | {"moe_topk": 2}, left=FUSED),
]

MAMBA = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "time_step_rank": 16}
MAMBA |= {"vocab_size": VOCABULARY, **SPECIAL}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}
RWKV = SIZES | TEXT | {"num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 64}
TWO_LAYERS = NARROW_HEADS | {"num_hidden_layers": 2}
JAMBA = TWO_LAYERS | {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 16,
    "mamba_dt_rank": 16,
    "use_mamba_kernels": False,
}
ZAMBA2 = TWO_LAYERS | {
    "layers_block_type": ["mamba", "hybrid"],
    "num_key_value_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 16,
    "n_mamba_heads": 8,
    "mamba_headdim": 16,
    "mamba_d_state": 16,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}
NEMOTRON_H = NARROW_HEADS | {
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "num_hidden_layers": 3,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}
LINEAR_ATTENTION = TWO_LAYERS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONVOLUTION = TWO_LAYERS | {"layer_types": ["conv", "full_attention"]}
STEP = ("lm_head", "backbone.layers.*.mixer.dt_proj")  # of dt_proj the weight alone is read
STATE_SPACE = [
    causal("Mamba", MAMBA, left=STEP),
    causal("Mamba2", MAMBA | {"head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    causal("FalconMamba", MAMBA, left=STEP),
    causal("Jamba", JAMBA, left=(*weights("feed_forward.experts"), "model.layers.*.mamba.dt_proj")),
    causal("Zamba2", ZAMBA2),
    causal(
        "RecurrentGemma",
        NARROW_HEADS | {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
        left=(
            "lm_head",
            "model.layers.*.temporal_block.rg_lru.input_gate_weight",
            "model.layers.*.temporal_block.rg_lru.recurrent_gate_weight",
        ),
    ),
    causal("Rwkv", RWKV, refused="rescale_every=0"),
    causal("Rwkv", RWKV | {"rescale_every": 0}, left=("head",), note="rescale_every=0"),
    causal("Bamba", TWO_LAYERS | MAMBA_HEADS | {"attn_layer_indices": [1]}),
    causal("Lfm2", CONVOLUTION | {"block_auto_adjust_ff_dim": False}),
    causal(
        "Qwen3Next",
        FOUR_EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 32},
        left=(*FUSED, "model.layers.*.mlp.shared_expert_gate"),
    ),
    causal("FalconH1", NARROW_HEADS | MAMBA_HEADS | {"mamba_d_ssm": 128}),
    causal("NemotronH", NEMOTRON_H),
    causal(
        "xLSTM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "chunk_size": 8,
            "qk_dim_factor": 1.0,
            **SPECIAL,
        },
        dtype=torch.float32,
    ),
    relative("Qwen3_5", LINEAR_ATTENTION),
    relative(
        "GraniteMoeHybrid",
        FOUR_LOCAL_EXPERTS
        | MAMBA_HEADS
        | {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
        | {"shared_intermediate_size": 32},
        left=weights("block_sparse_moe.experts"),
    ),
    relative(
        "Lfm2Moe",
        FOUR_EXPERTS | CONVOLUTION | {"num_dense_layers": 1},
        left=weights("feed_forward.experts"),
    ),
    relative(
        "MiniMax",
        FOUR_LOCAL_EXPERTS
        | {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        | {"block_size": 8},
        left=FUSED,
    ),
]
