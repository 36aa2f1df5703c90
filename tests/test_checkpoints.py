"""Checkpoints of other libraries: what is exported, that it comes back, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from arc_ao import (
    ARCConfig,
    NVFP4Config,
    SERQConfig,
    SVDQuantConfig,
    export_checkpoint,
    import_checkpoint,
    quantize_,
)
from arc_ao.checkpoints import compressed_tensors, side_file
from arc_ao.checkpoints.model_files import INDEX
from arc_ao.cli import main
from arc_ao.config_budget import BudgetConfig
from arc_ao.integrations.huggingface import load_model, save_pretrained
from arc_ao.summary import arc_tensors

FORMATS = ("compressed-tensors", "modelopt")
LAYER = "model.layers.0.self_attn.q_proj"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BOTH = {"recipe": "balanced", "budget": 0.3}  # residuals of activations and of weights
CONFIGS = {
    "residuals": ARCConfig(**BOTH, exportable=True),
    "plain": NVFP4Config(exportable=True),
    "static": ARCConfig(**BOTH, exportable=True, activation_scale="static"),
    "weights alone": ARCConfig(**BOTH, exportable=True, activation="bf16"),
    "searched activation scales": ARCConfig(
        **BOTH, exportable=True, activation_block_scale="mse", activation_scale="tensor"
    ),
    "single channels": ARCConfig(**BOTH, granularity="channel"),
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (2, 48), generator=generator) for _ in range(3)]


def llama(**overrides):
    """A bf16 model as loading gives it: `.to(bfloat16)` would cast the rotary buffer, too."""
    model = tiny_llama(**overrides)
    state = model.state_dict()
    return (
        type(model)
        .from_pretrained(None, config=model.config, state_dict=state, dtype=torch.bfloat16)
        .eval()
    )


def quantized(config, **overrides):
    model = llama(**overrides)
    quantize_(model, config, calibration_data=batches(), progress=False)
    return model


def export(model, directory, format="compressed-tensors", **settings):
    settings = {"calibration_data": batches(), "progress": False} | settings
    return export_checkpoint(model, directory, format, **settings)


@torch.no_grad()
def logits(model):
    return model(batches()[0]).logits


@pytest.fixture
def exported(tmp_path):
    """A compressed-tensors directory with residual blocks."""
    return export(quantized(CONFIGS["residuals"]), tmp_path / "exported")


def edit(directory, change):
    """Let `change` have the tensors of a directory's one file of weights."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_comes_back_bit_for_bit(tmp_path, name, format):
    """Residual columns, exact outer scales and the ways of activations included."""
    model = quantized(CONFIGS[name])
    before = {n: t.__tensor_flatten__()[1] for n, t in arc_tensors(model).items()}
    expected = logits(model)
    back = import_checkpoint(export(model, tmp_path / "out", format))
    assert torch.equal(logits(back), expected)
    assert {n: t.__tensor_flatten__()[1] for n, t in arc_tensors(back).items()} == before
    assert torch.equal(logits(model), expected) and hasattr(model, "hf_quantizer")


def test_compressed_tensors_names_shapes_and_dtypes(exported):
    """As its nvfp4-pack-quantized compressor has them, and nothing else in the model's files."""
    tensors = load_file(exported / "model.safetensors")
    found = {n[len(LAYER) + 1 :]: t for n, t in tensors.items() if n.startswith(LAYER + ".")}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {
        "weight_packed": (torch.uint8, (64, 32)),
        "weight_scale": (torch.float8_e4m3fn, (64, 4)),
        "weight_global_scale": (torch.float32, (1,)),
        "input_global_scale": (torch.float32, (1,)),
    }
    config = json.loads((exported / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == "nvfp4-pack-quantized" and config["ignore"] == ["lm_head"]
    assert group["targets"] == ["Linear"] and group["input_activations"]["dynamic"] == "local"
    assert group["weights"]["scale_dtype"] == "torch.float8_e4m3fn"
    assert config[side_file.KEY]["side_file"] == "arc_ao/residuals.data"


def test_modelopt_names_shapes_and_dtypes(tmp_path):
    """As ModelOpt's unified export has them; multipliers are scalars."""
    directory = export(quantized(CONFIGS["residuals"]), tmp_path / "out", "modelopt")
    tensors = load_file(directory / "model.safetensors")
    found = {n[len(LAYER) + 1 :]: t for n, t in tensors.items() if n.startswith(LAYER + ".")}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {
        "weight": (torch.uint8, (64, 32)),
        "weight_scale": (torch.float8_e4m3fn, (64, 4)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    legacy = json.loads((directory / "hf_quant_config.json").read_text())
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "NVFP4")
    assert legacy["producer"]["name"] == "modelopt"
    assert legacy["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }


def test_files_decode_to_the_quantized_weight(tmp_path):
    """By the format's definition alone: low nibble first, scale times code over global scale."""
    model = quantized(NVFP4Config(exportable=True))
    directory = export(model, tmp_path / "out")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in arc_tensors(model).items():
        packed = tensors[f"{name}.weight_packed"].int()
        codes = torch.stack((packed % 16, packed // 16), -1).flatten(1)
        values = E2M1[codes % 8] * (1 - 2.0 * (codes // 8))
        scales = tensors[f"{name}.weight_scale"].float().repeat_interleave(16, 1)
        decoded = values * scales / tensors[f"{name}.weight_global_scale"]
        torch.testing.assert_close(decoded, tensor.dequantize(torch.float32), rtol=3e-7, atol=0)


def test_reciprocal_scales():
    """2688 / amax divides where amax / 2688 multiplies; a weight of zeros stays finite."""
    outer = torch.tensor([0.5, 2.0**-20, 0.0])
    assert compressed_tensors.reciprocal_scale(outer).tolist() == [2.0, 2.0**20, 1.0]


@pytest.mark.parametrize("headroom", [1.0, 4.0])
def test_input_scales_leave_headroom(tmp_path, headroom):
    """The largest magnitude of the calibration data, times the headroom, over 2688."""
    model, seen = quantized(CONFIGS["plain"]), []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].abs().max().float())
    )
    for batch in batches():
        model(batch)
    hook.remove()
    directory = export(model, tmp_path / "out", "modelopt", headroom=headroom)
    found = load_file(directory / "model.safetensors")[f"{LAYER}.input_scale"]
    assert found.item() == pytest.approx(headroom * max(seen).item() / 2688, rel=1e-6)


def test_fused_linears_share_their_scales(exported):
    """q, k and v, and gate and up: one weight scale and one input scale."""
    tensors = load_file(exported / "model.safetensors")
    for group in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        names = [f"model.layers.1.{group[0]}.{part}_proj" for part in group[1]]
        for scale in ("weight_global_scale", "input_global_scale"):
            assert len({tensors[f"{name}.{scale}"].item() for name in names}) == 1


def test_weights_alone_have_no_input_scales(tmp_path):
    model = quantized(CONFIGS["weights alone"])
    for format, algorithm in (("compressed-tensors", None), ("modelopt", "W4A16_NVFP4")):
        directory = export(model, tmp_path / format, format, calibration_data=None)
        names = load_file(directory / "model.safetensors").keys()
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert not [name for name in names if "input" in name.rpartition(".")[2]]
        assert config.get("quant_algo") == algorithm
        assert config["config_groups"]["group_0"].get("input_activations") is None


def test_an_index_lists_every_tensor_of_every_shard(tmp_path):
    """Also where one file has them all: engines then read no other."""
    model = quantized(CONFIGS["residuals"])
    for size, shards in (("5GB", 1), (40_000, 2)):
        directory = export(model, tmp_path / str(size), max_shard_size=size)
        index = json.loads((directory / INDEX).read_text())["weight_map"]
        files = sorted(directory.glob("*.safetensors"))
        found = {name: f.name for f in files for name in load_file(f)}
        assert found == index and len(files) >= shards
        assert torch.equal(logits(import_checkpoint(directory)), logits(model))


REFUSED = {
    "channel_order": ARCConfig(**BOTH, channel_order="amax"),
    "rotation": ARCConfig(budget=0.0, recipe="balanced", rotation=16),
    "smooth": SERQConfig(channel_order="none"),
    "rank=8": SVDQuantConfig(rank=8, smooth="none", branch_iterations=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_layers_that_no_other_engine_holds_are_refused(tmp_path, reason):
    model = quantized(REFUSED[reason])
    with pytest.raises(ValueError, match=rf"{LAYER}: .*{reason}.*exportable=True"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_padded_layers_are_refused(tmp_path):
    sizes = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 9}
    model = quantized(ARCConfig(**BOTH, pad_in_features=True), **sizes)
    with pytest.raises(ValueError, match="q_proj: in_features 72 padded"):
        export(model, tmp_path / "out")


def test_scales_that_fused_linears_do_not_share_are_refused(tmp_path):
    """Without calibration nothing tells that q, k and v read one input."""
    model = llama()
    quantize_(model, NVFP4Config(), progress=False)
    with pytest.raises(ValueError, match="q_proj, .*k_proj, .*v_proj.*exportable=True"):
        export(model, tmp_path / "out")


def test_partly_quantized_fused_linears_are_refused(tmp_path):
    model = llama()
    keep = lambda module, name: not name.endswith(("k_proj", "lm_head"))
    config = CONFIGS["plain"]
    quantize_(model, config, calibration_data=batches(), filter_fn=keep, progress=False)
    with pytest.raises(ValueError, match=r"q_proj, .*k_proj, .*v_proj"):
        export(model, tmp_path / "out")


def test_export_needs_data_for_the_scales_of_inputs(tmp_path):
    with pytest.raises(ValueError, match="expected calibration_data"):
        export(quantized(CONFIGS["plain"]), tmp_path / "out", calibration_data=None)


def test_export_refuses_what_is_no_quantized_transformers_model(tmp_path):
    with pytest.raises(ValueError, match="found no ARCTensor"):
        export(tiny_llama(), tmp_path / "out")
    with pytest.raises(TypeError, match="expected a transformers model"):
        export(torch.nn.Linear(16, 16), tmp_path / "out")
    with pytest.raises(ValueError, match="format: expected one of compressed-tensors, modelopt"):
        export(tiny_llama(), tmp_path / "out", "safetensors")


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (ARCConfig, {"channel_order": "rms"}, "channel_order must be 'none'"),
        (ARCConfig, {"granularity": "channel"}, "granularity must be 'block'"),
        (ARCConfig, {"rotation": 32}, "rotation must be 0"),
        (ARCConfig, {"pad_in_features": True}, "pad_in_features must be False"),
        (ARCConfig, {"recipe": "paper", "budget": None}, "recipe='paper' sorts channels"),
        (SERQConfig, {}, "channel_order must be 'none'"),
        (SVDQuantConfig, {}, "must be .* with exportable=True"),
        (BudgetConfig, {}, "methods must be \\['residual'\\]"),
    ],
)
def test_fields_that_contradict_exportable_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(exportable=True, **fields)


def test_exportable_restricts_the_search():
    searched = ARCConfig(exportable=True).searched
    assert searched == ["exchange_rate", "activation_block_scale"]
    assert BudgetConfig(exportable=True, methods=["residual"]).channel_order == "none"
    with pytest.raises(ValueError, match="expected calibration_data"):
        quantize_(tiny_llama(), NVFP4Config(exportable=True), progress=False)


def test_commands_export_and_import(tmp_path, capsys):
    """Quantized on the command line, to another form, and back into ours: the same model."""
    names = ("original", "quantized", "exported", "imported")
    original, arc, exported, imported = (tmp_path / name for name in names)
    llama().save_pretrained(original)
    byte_tokenizer().save_pretrained(original)
    quantize = ["quantize", str(original), "-o", str(arc), "--exportable", "--recipe", "balanced"]
    assert main([*quantize, "--calib-tokens", "512"]) == 0
    options = ["--format", "modelopt", "--calib-tokens", "256"]
    assert main(["export", str(arc), "-o", str(exported), *options]) == 0
    assert main(["import", str(exported), "-o", str(imported)]) == 0
    assert "imported from modelopt" in capsys.readouterr().out
    assert (exported / "tokenizer.json").is_file()
    models = [load_model(directory)[0] for directory in (arc, exported, imported)]
    for model in models[1:]:
        assert torch.equal(logits(model), logits(models[0]))


def test_an_imported_model_is_saved_in_our_form(exported, tmp_path):
    model = import_checkpoint(exported)
    save_pretrained(model, tmp_path / "ours")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits(model)
    )
