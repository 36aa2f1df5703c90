"""Decoders in the table of architectures."""

from architecture_case import DECODER, ENCODER, SPECIAL, TEXT, VOCABULARY, Architecture, tokens

NO_LINEAR = "found no linear layer to quantize"
NARROW_HEADS = DECODER | {"head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
GPT |= SPECIAL
CTRL = GPT | {"dff": 96}
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, **TEXT}
TWO_KINDS = NARROW_HEADS | {"num_hidden_layers": 2, "sliding_window": 8}
FULL_ATTENTION = DECODER | {"layer_types": ["full_attention"]}
GEMMA3N = TWO_KINDS | {
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 16,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 2,
    "activation_sparsity_pattern": [0.0, 0.0],
}
ALTERNATING = tuple(f"model.layers.*.altup.{kind}_coefs" for kind in ("correction", "prediction"))
BARK = {"block_size": 64, "num_layers": 1, "num_heads": 4, "hidden_size": 64}
BARK |= {"input_vocab_size": VOCABULARY, "output_vocab_size": VOCABULARY}


def causal(name: str, settings: dict, **expected) -> Architecture:
    """A causal language model; unless said otherwise all but its output head is quantized."""
    return Architecture(
        f"{name}ForCausalLM", settings, tokens, **{"left": ("lm_head",), **expected}
    )


def relative(name: str, settings: dict, **expected) -> Architecture:
    """A causal language model that differs little from one in the short run."""
    return causal(name, settings, slow=True, **expected)


DECODERS = [
    causal("Llama", DECODER),
    causal("Qwen2", DECODER),
    causal("Qwen3", NARROW_HEADS),
    causal("Mistral", DECODER),
    causal("Gemma", NARROW_HEADS),
    causal("Gemma2", TWO_KINDS),
    causal("Gemma3", TWO_KINDS),
    causal("Gemma3n", GEMMA3N, left=("lm_head", *ALTERNATING)),
    causal("Phi", ENCODER),
    causal("Phi3", DECODER),
    Architecture("GPT2LMHeadModel", GPT2, tokens, refused=f"{NO_LINEAR}.*Conv1D"),
    causal("GPTBigCode", GPT2),
    causal("GPTNeo", ENCODER | {"num_layers": 1, "attention_types": [[["global"], 1]]}),
    causal("GPTJ", GPT2 | {"rotary_dim": 8}),
    causal("GPTNeoX", ENCODER),
    causal("CodeGen", GPT2 | {"rotary_dim": 8}),
    causal("OPT", ENCODER | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    causal("Bloom", {"hidden_size": 64, "n_layer": 1, "n_head": 4, **TEXT}),
    causal("Falcon", ENCODER | {"ffn_hidden_size": 96}, refused=f"{NO_LINEAR}.*FalconLinear"),
    causal("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, **TEXT}),
    causal("StableLm", DECODER),
    causal("Cohere", DECODER),
    causal("Olmo2", DECODER),
    causal("SmolLM3", DECODER),
    causal("Granite", DECODER),
    causal("Glm", NARROW_HEADS),
    causal("Exaone4", FULL_ATTENTION),
    causal("Starcoder2", DECODER),
    causal("Helium", NARROW_HEADS),
    causal("Nemotron", DECODER),
    causal("XGLM", {"d_model": 64, "ffn_dim": 96, "num_layers": 1, "attention_heads": 4, **TEXT}),
    causal("ModernBertDecoder", ENCODER, left=("decoder", "lm_head.dense")),
    Architecture("CTRLLMHeadModel", CTRL, tokens, left=("lm_head",)),
    Architecture("OpenAIGPTLMHeadModel", GPT, tokens, refused=f"{NO_LINEAR}.*Conv1D"),
    relative("Ministral", NARROW_HEADS),
    relative("Cohere2", NARROW_HEADS),
    relative("Olmo", DECODER),
    relative("Olmo3", FULL_ATTENTION),
    relative("Glm4", NARROW_HEADS),
    relative("Persimmon", ENCODER),
    relative("Arcee", DECODER),
    relative("Apertus", DECODER),
    relative("SeedOss", NARROW_HEADS),
    relative("NanoChat", DECODER),
    relative("BitNet", DECODER),
    relative("BioGpt", ENCODER, left=("output_projection",)),
    relative("Ernie4_5", DECODER),
    relative("DiffLlama", DECODER | {"num_hidden_layers": 2}),
    relative("HunYuanDenseV1", NARROW_HEADS),
    relative("VaultGemma", NARROW_HEADS),
    relative("Cwm", DECODER),
    relative("Jais2", DECODER),
    Architecture("BarkSemanticModel", BARK, tokens, left=("lm_head",), slow=True),
]
