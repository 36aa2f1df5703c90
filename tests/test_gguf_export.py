"""GGUF as a form to export to: what the file holds, read back by others, and what is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, byte_tokenizer, tiny_llama
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from arc_ao import ARCConfig, NVFP4Config, export_checkpoint, quantize_
from arc_ao.checkpoints.gguf_rope import LLAMA3
from arc_ao.checkpoints.layer import split
from arc_ao.cli import main
from arc_ao.formats import nvfp4
from arc_ao.integrations.huggingface import load_model
from arc_ao.shipped import MODEL
from arc_ao.summary import arc_tensors

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("accelerate", reason="transformers' GGUF loader needs accelerate")
from arc_ao.checkpoints.gguf_tensors import nvfp4_blocks  # noqa: E402
from arc_ao.checkpoints.gguf_tokenizer import WORDS, pre_tokenizer_name  # noqa: E402

SIZES = {
    "vocab_size": VOCAB_SIZE + 4,  # more rows than tokens
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RESIDUALS = ARCConfig(recipe="balanced", budget=0.3, exportable=True)
LLAMA3_ROPE = LLAMA3 | {"rope_theta": 500_000.0, "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {  # 128 is the one head_dim of Qwen3 that transformers' loader reads
    "llama": lambda: tiny_llama(**SIZES),
    "llama, biases": lambda: random(LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
    "llama, tied head": lambda: tiny_llama(**SIZES, tie_word_embeddings=True),
    "llama 3's frequencies": lambda: tiny_llama(**SIZES, rope_parameters=LLAMA3_ROPE),
    "yarn": lambda: tiny_llama(**SIZES, rope_parameters=YARN | {"rope_theta": 1e4}),
    "qwen2": lambda: random(Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": lambda: random(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=128)),
}


def random(model_class, config):
    """A model whose biases and norms are no zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".bias", "norm.weight")):
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (2, 48), generator=generator) for _ in range(2)]


def tokenizer(*steps, normalizer=None, ignore_merges=False, merges=(("t", "h"),)):
    """Byte-level BPE behind `steps` of pre-tokenizers, with a token of its own for chats."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    bpe = models.BPE(
        {t: i for i, t in enumerate(tokens)}, list(merges), ignore_merges=ignore_merges
    )
    found = Tokenizer(bpe)
    steps = steps or (pre_tokenizers.ByteLevel(add_prefix_space=False),)
    found.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    found.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|end|>")
    fast.chat_template = "{{ messages[0]['content'] }}<|end|>"
    return fast


def quantized(model, config=RESIDUALS, dtype=torch.bfloat16, **settings):
    settings = {"calibration_data": batches(), "progress": False} | settings
    model = model.to(dtype)
    quantize_(model, config, **settings)
    return model


def export(model, directory, tokenizer=None):
    """Path of the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.gguf: ")
        return export_checkpoint(model, directory, "gguf", tokenizer=tokenizer) / "model.gguf"


def base(name, model):
    """fp32 [N, K]: what the file has to hold of a linear."""
    layer, _ = split(arc_tensors(model)[name], None)
    return nvfp4.dequantize(layer.qdata, layer.scale, layer.outer_scale)


@torch.no_grad()
def base_logits(model):
    """In fp32, of the base of every linear."""
    dense = type(model)(model.config).eval()
    layers = arc_tensors(model)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state |= {f"{name}.weight": base(name, model) for name in layers}
    dense.load_state_dict(state)
    return dense(batches()[0]).logits


def values(path):
    """fp32 tensors by name, as gguf reads them, scales multiplied in."""
    tensors = gguf.GGUFReader(path).tensors
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}
    scales = {name: found.pop(name) for name in list(found) if name.endswith(".scale")}
    for name, scale in scales.items():
        found[name.removesuffix("scale") + "weight"] *= scale
    return {name: value.copy() for name, value in found.items()}


def kinds(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def fields(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def in_floats(path, target):
    """The same file with every tensor in fp32, which transformers reads."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, fields(path)["general.architecture"])
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind, *inner = field.types
            writer.add_key_value(key, field.contents(), kind, inner[0] if inner else None)
    for name, value in values(path).items():
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_blocks_have_the_bytes_of_the_format():
    """64 codes 0, 1, 2, ... of four groups: element j in the low nibble, j + 8 in the high one."""
    codes = torch.arange(64).remainder(16).to(torch.uint8)
    qdata = (codes[::2] | codes[1::2] << 4).reshape(1, 32)
    scale = torch.tensor([[0x38, 0x40, 0x01, 0x7E]], dtype=torch.uint8)
    group = [j | (j + 8) << 4 for j in range(8)]
    blocks = nvfp4_blocks(qdata, scale)
    assert blocks.tolist() == [[0x38, 0x40, 0x01, 0x7E, *group * 4]]
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat((magnitudes, -magnitudes)) * torch.tensor([[1], [2], [2.0**-9], [448]])
    found = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.NVFP4)
    assert torch.equal(torch.tensor(found), expected.reshape(1, 64))


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_reads_back_bit_for_bit(tmp_path, name):
    """By the gguf package; where llama.cpp pairs neighbours, rows 0, D/2, 1, D/2 + 1, ..."""
    model = quantized(MODELS[name]())
    path = export(model, tmp_path / "out")
    found, types = values(path), kinds(path)
    q, k = (f"blk.1.attn_{part}.weight" for part in "qk")
    for ours, theirs, heads in (
        ("self_attn.q_proj", q, 4),
        ("self_attn.k_proj", k, 2),
        ("self_attn.v_proj", "blk.1.attn_v.weight", None),
        ("mlp.down_proj", "blk.1.ffn_down.weight", None),
    ):
        expected = base(f"model.layers.1.{ours}", model)
        rows = torch.arange(len(expected))
        if heads is not None and name != "qwen3":
            rows = rows.reshape(heads, 2, -1).transpose(1, 2).flatten()
        assert types[theirs] == "NVFP4"
        assert torch.equal(torch.tensor(found[theirs]), expected[rows]), theirs
        bias = model.get_submodule(f"model.layers.1.{ours}").bias
        if bias is not None:
            assert torch.equal(torch.tensor(found[theirs[:-6] + "bias"]), bias[rows].float())
    assert sum(kind == "NVFP4" for kind in types.values()) == len(arc_tensors(model)) == 14
    assert types["token_embd.weight"] == "BF16" and types["blk.0.attn_norm.weight"] == "F32"
    assert ("output.weight" in types) == (not model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"llama, biases", "qwen2"}))
def test_a_model_built_from_the_file_computes_what_the_base_does(tmp_path, name):
    """Names, hyperparameters, order of rows: transformers' GGUF loader gives the same logits.

    It passes over biases of the architecture llama.
    """
    model = quantized(MODELS[name]())
    path = in_floats(export(model, tmp_path / "out", tokenizer()), tmp_path / "floats.gguf")
    loaded, _ = load_model(path, torch.float32)
    with torch.no_grad():
        logits = loaded(batches()[0]).logits
    assert torch.equal(logits, base_logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_not_quantized_keeps_its_dtype(tmp_path, dtype):
    model = quantized(MODELS["llama"](), dtype=dtype)
    types = kinds(export(model, tmp_path / "out"))
    kind = {torch.float16: "F16", torch.float32: "F32"}[dtype]
    assert types["token_embd.weight"] == types["output.weight"] == kind


def test_qwen2_is_a_llama_with_biases(tmp_path):
    """llama.cpp's own qwen2 multiplies by no scale in feed-forward layers."""
    model = quantized(MODELS["qwen2"](), filter_fn=lambda module, name: True)
    path = export(model, tmp_path / "out")
    assert fields(path)["general.architecture"] == "llama"
    assert kinds(path)["blk.0.attn_v.bias"] == "F32" and kinds(path)["output.weight"] == "NVFP4"
    assert torch.equal(torch.tensor(values(path)["output.weight"]), base("lm_head", model))


FALLBACKS = {
    "in_features is no multiple of 64": ({"intermediate_size": 176}, "down_proj", "ffn_down"),
    "a bias in feed-forward layers": ({"mlp_bias": True}, "up_proj", "ffn_up"),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_linears_that_gguf_cannot_hold_are_in_their_own_dtype(tmp_path, reason):
    """And named; the base then is rounded to bf16, nothing else."""
    settings, layer, theirs = FALLBACKS[reason]
    model = quantized(tiny_llama(**SIZES | settings))
    with pytest.warns(UserWarning, match=rf"not in NVFP4, .*{reason}.*layers.0.mlp.{layer}"):
        path = export_checkpoint(model, tmp_path / "out", "gguf") / "model.gguf"
    name = f"blk.0.{theirs}.weight"
    assert kinds(path)[name] == "BF16" and kinds(path)["blk.0.attn_q.weight"] == "NVFP4"
    expected = base(f"model.layers.0.mlp.{layer}", model).bfloat16().float()
    assert torch.equal(torch.tensor(values(path)[name]), expected)


def test_what_is_left_out_is_said(tmp_path):
    model = quantized(MODELS["llama"]())
    with pytest.warns(UserWarning) as caught:
        export_checkpoint(model, tmp_path / "out", "gguf")
    said = "\n".join(str(warning.message) for warning in caught)
    assert "the residual channels of" in said and "14 linears have their base alone" in said
    assert "no tokenizer" in said
    plain = quantized(MODELS["llama"](), NVFP4Config(exportable=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_checkpoint(plain, tmp_path / "plain", "gguf", tokenizer=tokenizer())


def test_the_tokenizer_is_part_of_the_file(tmp_path):
    """Tokens, merges, special ids, chat template; ids without a token have a placeholder."""
    given = tokenizer(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    )
    path = export(quantized(MODELS["llama"]()), tmp_path / "out", given)
    found = fields(path)
    assert found["tokenizer.ggml.pre"] == "smollm" and found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.merges"] == ["t h"]
    end = given.eos_token_id
    assert found["tokenizer.ggml.tokens"][end:] == ["<|end|>", "[PAD258]", "[PAD259]", "[PAD260]"]
    types = found["tokenizer.ggml.token_type"]
    assert (types[0], *types[end:]) == (1, 3, 5, 5, 5)  # normal, control, unused
    assert found["tokenizer.ggml.eos_token_id"] == end
    assert found["tokenizer.ggml.add_bos_token"] is found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == given.chat_template
    _, loaded = load_model(in_floats(path, tmp_path / "floats.gguf"))
    assert loaded("the 10th").input_ids == given("the 10th").input_ids


def _words(numbers):
    split = pre_tokenizers.Split(Regex(WORDS.replace("NUMBERS", numbers)), "isolated")
    return split, pre_tokenizers.ByteLevel(False, use_regex=False)


@pytest.mark.parametrize(
    ("name", "steps", "ignore_merges"),
    [
        ("gpt-2", (pre_tokenizers.ByteLevel(False),), False),
        ("smollm", (pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)), False),
        ("qwen2", _words(r"\p{N}"), False),
        ("llama-bpe", _words(r"\p{N}{1,3}"), True),
    ],
)
def test_how_words_are_cut_follows_from_the_tokenizers_rules(name, steps, ignore_merges):
    given = tokenizer(*steps, ignore_merges=ignore_merges)
    assert pre_tokenizer_name(json.loads(given.backend_tokenizer.to_str())) == name


UNKNOWN_TOKENIZERS = {
    "one without: llama.cpp reads no empty list": byte_tokenizer,
    "the rules of one of gpt-2, smollm, qwen2, llama-bpe, found": lambda: tokenizer(
        pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "Unigram": lambda: PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)]))
    ),
    "ids below the vocabulary's size 261, found 276": lambda: tokenizer(
        merges=[("t", chr(ord("a") + i)) for i in range(20)]
    ),
    "a tokenizer of the tokenizers library, found function": lambda: _words,
}


@pytest.mark.parametrize("message", UNKNOWN_TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path, message):
    model = quantized(MODELS["llama"](), NVFP4Config(exportable=True))
    with pytest.raises(ValueError, match=f"tokenizer: .*{message}"):
        export(model, tmp_path / "out", UNKNOWN_TOKENIZERS[message]())
    assert not (tmp_path / "out").exists()


SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
UNKNOWN_MODELS = {  # 128 is the one head_dim of Qwen3 that transformers' loader reads
    "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, found MistralForCausalLM": lambda: (
        random(MistralForCausalLM, MistralConfig(**SIZES))
    ),
    "hidden_act='gelu'": lambda: tiny_llama(**SIZES, hidden_act="gelu"),
    "layer_types full_attention, sliding_attention": lambda: random(
        Qwen2ForCausalLM, Qwen2Config(**SIZES, **SLIDING)
    ),
    "attention_bias=True": lambda: random(
        Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, attention_bias=True)
    ),
    "rope_type='dynamic'": lambda: tiny_llama(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "beta_fast": lambda: tiny_llama(
        **SIZES, rope_parameters=YARN | {"rope_theta": 1e4, "beta_fast": 16.0}
    ),
}


@pytest.mark.parametrize("message", UNKNOWN_MODELS)
def test_models_that_llama_cpp_does_not_compute_are_refused(tmp_path, message):
    model = UNKNOWN_MODELS[message]()
    keep = lambda module, name: isinstance(module, torch.nn.Linear)
    model = quantized(model, NVFP4Config(exportable=True), filter_fn=keep)
    with pytest.raises(ValueError, match=f"format 'gguf': expected .*{message}"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_without_a_name_are_refused(tmp_path):
    model = quantized(MODELS["llama"](), NVFP4Config(exportable=True))
    model.model.prompt = torch.nn.Parameter(torch.zeros(4, 128))
    with pytest.raises(ValueError, match="model.prompt: expected a parameter that llama.cpp's"):
        export(model, tmp_path / "out")


def test_linears_need_share_no_scale(tmp_path):
    """Each has its own in GGUF: also without calibration, and where k stays as it is."""
    model = MODELS["llama"]().bfloat16()
    keep = lambda module, name: not name.endswith(("k_proj", "lm_head"))
    quantize_(model, NVFP4Config(), filter_fn=keep, progress=False)
    path = export(model, tmp_path / "out")
    assert kinds(path)["blk.0.attn_k.weight"] == "BF16"
    v_proj = base("model.layers.0.self_attn.v_proj", model)
    assert torch.equal(torch.tensor(values(path)["blk.0.attn_v.weight"]), v_proj)


def test_layers_that_no_other_engine_holds_are_refused(tmp_path):
    model = quantized(MODELS["llama"](), ARCConfig(recipe="balanced", channel_order="amax"))
    with pytest.raises(ValueError, match=r"q_proj: channels sorted .*exportable=True"):
        export(model, tmp_path / "out")


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    model = quantized(MODELS["llama"](), NVFP4Config(exportable=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'arc-ao\[gguf\]'"):
        export(model, tmp_path / "out")


def test_the_command_writes_a_file_that_is_not_taken_for_dense(tmp_path, capsys):
    """The shipped model: quantized, exported, and refused by name as input, which drops scales."""
    arc, out = tmp_path / "arc", tmp_path / "out"
    quantize = ["quantize", str(MODEL), "-o", str(arc), "--exportable", "--recipe", "plain"]
    assert main([*quantize, "--calib-tokens", "512"]) == 0
    assert main(["export", str(arc), "-o", str(out), "--format", "gguf"]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["model.gguf"]
    found = fields(out / "model.gguf")
    assert found["general.architecture"] == "llama" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert len(found["tokenizer.ggml.tokens"]) == found["llama.vocab_size"] == 2048
    assert main(["quantize", str(out), "-o", str(tmp_path / "again")]) == 2
    assert "found NVFP4" in capsys.readouterr().err
