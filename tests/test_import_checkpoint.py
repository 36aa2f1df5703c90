"""Checkpoints of other libraries, read into ARCTensors: what they may hold, and what is damaged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import CONFIGS, LAYER, edit, export, logits, quantized
from tiny_models import byte_tokenizer, tiny_config
from transformers import MixtralConfig, MixtralForCausalLM

from arc_ao import NVFP4Config, import_checkpoint
from arc_ao.checkpoints import side_file
from arc_ao.checkpoints.read import is_checkpoint
from arc_ao.formats import nvfp4
from arc_ao.integrations.huggingface import load_model
from arc_ao.summary import SUMMARY, arc_tensors

F8 = torch.float8_e4m3fn


def edit_config(directory, change):
    """Let `change` have the quantization_config of a directory's config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.fixture
def plain(tmp_path):
    """A plain NVFP4 model as others export it: without a side file."""
    directory = export(quantized(NVFP4Config(exportable=True)), tmp_path / "plain")
    (directory / side_file.PATH).unlink()
    edit_config(directory, lambda config: config.pop(side_file.KEY))
    return directory


@pytest.fixture
def exported(tmp_path):
    """A compressed-tensors directory with residual blocks."""
    return export(quantized(CONFIGS["residuals"]), tmp_path / "exported")


def test_activations_are_scaled_as_the_checkpoint_says(plain):
    """By its constants; by token where asked for, or where it has no constant."""
    static = arc_tensors(import_checkpoint(plain))[LAYER]
    stored = load_file(plain / "model.safetensors")[f"{LAYER}.input_global_scale"]
    assert static.activation_scale == "static"
    assert static.act_outer_scale.item() == pytest.approx(1 / stored.item(), rel=1e-6)
    asked = arc_tensors(import_checkpoint(plain, activation_scale="token"))[LAYER]
    assert asked.activation_scale == "token" and asked.act_outer_scale is None
    edit(plain, lambda tensors: tensors.pop(f"{LAYER}.input_global_scale"))
    tensors = arc_tensors(import_checkpoint(plain))
    assert tensors[LAYER].activation_scale == "token"
    with pytest.raises(ValueError, match=f"{LAYER}: expected an input scale"):
        import_checkpoint(plain, activation_scale="static")


def test_activation_scales_may_be_chosen_for_our_exports_too(exported):
    """Residual blocks stay, whichever way inputs are scaled."""
    own = arc_tensors(import_checkpoint(exported))[LAYER]
    asked = arc_tensors(import_checkpoint(exported, activation_scale="static"))[LAYER]
    assert (own.activation_scale, asked.activation_scale) == ("token", "static")
    assert asked.extra_channels == own.extra_channels > 0
    assert own.act_outer_scale is None and asked.act_outer_scale > 0


def test_groups_without_activations_are_w4a16(plain):
    """Also where a stray input scale lies beside: the configuration decides, by name or pattern."""

    def two_groups(config):
        groups = config["config_groups"]
        weights = groups["group_0"]["weights"]
        targets = [LAYER, r"re:.*mlp\.down_proj$"]
        groups["group_1"] = {"targets": targets, "weights": weights, "input_activations": None}

    edit_config(plain, two_groups)
    found = {n: t.activation_scale for n, t in arc_tensors(import_checkpoint(plain)).items()}
    weights_alone = {name for name, scale in found.items() if scale == "none"}
    assert weights_alone == {LAYER} | {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert set(found.values()) == {"none", "static"}


def test_autoround_s_own_form_is_read(plain):
    """The same tensors; `act_bits` says what compressed-tensors' groups do."""
    expected = logits(import_checkpoint(plain))

    def autoround(config):
        config.clear()
        config.update(
            {"quant_method": "auto-round", "data_type": "nv_fp", "bits": 4, "act_bits": 4}
        )

    edit_config(plain, autoround)
    assert torch.equal(logits(load_model_of(plain)), expected)
    edit_config(plain, lambda config: config.update(act_bits=16))
    assert arc_tensors(import_checkpoint(plain))[LAYER].activation_scale == "none"


def load_model_of(directory):
    """As the loader of every command does, tokenizer aside."""
    assert is_checkpoint(directory)
    return import_checkpoint(directory)


@pytest.mark.parametrize("scale", ["one", "rows", "tiles"])
def test_fp8_weights_are_dequantized(plain, scale):
    """Beside NVFP4 ones, with every granularity of scales; the summary says so."""
    name = "model.layers.1.mlp.down_proj"  # [64, 128]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).to(F8)
    shape = {"one": (1,), "rows": (64, 1), "tiles": (1, 1)}[scale]
    scales = torch.rand(shape, generator=generator) + 0.5

    def to_fp8(tensors):
        for suffix in ("packed", "scale", "global_scale"):
            del tensors[f"{name}.weight_{suffix}"]
        del tensors[f"{name}.input_global_scale"]
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scales}
        tensors[f"{name}.input_scale"] = torch.ones(1)

    edit(plain, to_fp8)
    with pytest.warns(UserWarning, match=f"1 linears .*{name}"):
        model = import_checkpoint(plain)
    found = model.get_submodule(name).weight
    assert torch.equal(found, (weight.float() * scales).to(torch.bfloat16))
    assert name not in arc_tensors(model) and LAYER in arc_tensors(model)
    assert "dequantized" in getattr(model, SUMMARY)["skipped"][name]


def test_experts_of_a_merged_tensor_are_dequantized(tmp_path):
    """Checkpoints have a linear for each expert, models one tensor for all of them."""
    torch.manual_seed(0)
    sizes = tiny_config(num_hidden_layers=1).to_dict() | {"model_type": "mixtral"}
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)).save_pretrained(tmp_path)
    values = {}

    def pack(tensors):
        for key in [k for k in tensors if ".experts." in k or "q_proj" in k]:
            qdata, scale, outer = nvfp4.quantize(tensors[key])
            values[key] = nvfp4.dequantize(qdata, scale, outer)
            parts = {"weight": qdata, "weight_scale": scale.view(F8), "weight_scale_2": outer}
            tensors |= {f"{key.removesuffix('weight')}{part}": t for part, t in parts.items()}

    edit(tmp_path, pack)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="6 linears .*experts.0.w1"):
        model = import_checkpoint(tmp_path)
    merged = model.get_submodule("model.layers.0.mlp.experts").down_proj
    for expert in (0, 1):
        key = next(k for k in values if f".experts.{expert}.w2" in k)
        assert torch.equal(merged[expert], values[key])
    assert list(arc_tensors(model)) == [LAYER]


def test_older_modelopt_exports_have_one_configuration(tmp_path):
    """hf_quant_config.json alone, with nothing in config.json."""
    directory = export(quantized(CONFIGS["plain"]), tmp_path / "out", "modelopt")
    expected = logits(import_checkpoint(directory))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert torch.equal(logits(load_model_of(directory)), expected)


def test_scales_of_key_value_caches_are_passed_over(plain):
    name = "model.layers.0.self_attn.k_proj.k_scale"
    edit(plain, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert name in getattr(import_checkpoint(plain), SUMMARY)["skipped"]


def damage(**changes):
    """A change of one layer's tensors: a tensor in place of a suffix's, or None to remove it."""

    def change(tensors):
        for suffix, value in changes.items():
            key = f"{LAYER}.{suffix}"
            tensors.pop(key, None)
            if value is not None:
                tensors[key] = value

    return change


NAN = torch.full((64, 4), 0x7F, dtype=torch.uint8).view(F8)
DAMAGED = {
    "block scales from 0 to 448, found NaN": damage(weight_scale=NAN),
    "finite weight scale of at least 0": damage(weight_global_scale=torch.tensor([torch.nan])),
    "finite input scale of at least 0": damage(input_global_scale=torch.tensor([-1.0])),
    "one block scale for 16 channels": damage(weight_scale=torch.ones(64, 2).to(F8)),
    "expected NVFP4, .*weight_packed in I32": damage(
        weight_packed=torch.zeros(64, 8, dtype=torch.int32)
    ),
    "expected NVFP4, .*weight_scale \\(U8\\)": damage(
        weight_scale=torch.zeros(64, 2, dtype=torch.uint8), weight_global_scale=None
    ),
    "found .*pre_quant_scale, too": damage(pre_quant_scale=torch.ones(64)),
    "expected in the checkpoint, found none": lambda tensors: [
        tensors.pop(key) for key in list(tensors) if key.startswith(LAYER)
    ],
    "expected in the model, found none": lambda tensors: tensors.update(strange=torch.ones(2)),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_checkpoints_are_refused(plain, message):
    edit(plain, DAMAGED[message])
    with pytest.raises(ValueError, match=message):
        import_checkpoint(plain)


def test_algorithms_with_tensors_of_their_own_are_refused(tmp_path):
    directory = export(quantized(CONFIGS["plain"]), tmp_path / "out", "modelopt")
    edit_config(directory, lambda config: config.update(quant_algo="NVFP4_AWQ"))
    with pytest.raises(ValueError, match="expected ModelOpt's NVFP4 or W4A16_NVFP4, found NVFP4_"):
        import_checkpoint(directory)


def test_a_missing_shard_is_named(tmp_path):
    model = quantized(CONFIGS["plain"])
    directory = export(model, tmp_path / "out", max_shard_size=40_000)
    last = sorted(directory.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"{last.name}: expected a part of the model"):
        import_checkpoint(directory)


def test_residuals_of_another_base_are_refused(exported):
    """The base alone still loads, as other engines load it."""
    edit(exported, lambda tensors: tensors[f"{LAYER}.weight_global_scale"].mul_(1.01))
    with pytest.raises(ValueError, match=f"{LAYER}: expected the weight that its residual blocks"):
        import_checkpoint(exported)
    base = import_checkpoint(exported, residuals=False)
    assert all(tensor.extra_channels == 0 for tensor in arc_tensors(base).values())


def test_a_lost_side_file_is_named(exported):
    (exported / side_file.PATH).unlink()
    with pytest.raises(FileNotFoundError, match=r"residuals\.data.*residuals=False"):
        import_checkpoint(exported)


def test_a_newer_side_file_is_refused(exported):
    path = exported / side_file.PATH
    document = json.dumps({"version": 2, "layers": {}})
    save_file(load_file(path), path, metadata={"format": "pt", side_file.KEY: document})
    with pytest.raises(ValueError, match="expected version 1, found 2"):
        import_checkpoint(exported)


def test_every_command_loads_foreign_checkpoints(exported):
    byte_tokenizer().save_pretrained(exported)
    model, _ = load_model(exported)
    assert torch.equal(logits(model), logits(import_checkpoint(exported)))
