"""Saving and loading through transformers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, tiny_llama
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_ as torchao_quantize_
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.integrations.huggingface import SUMMARY_FILE, load_model
from arc_ao.integrations.quantizer import ArcHfConfig
from arc_ao.registration import register

CONFIGS = {
    "plain": ARCConfig(budget=0.0, recipe="plain"),
    "both residuals": ARCConfig(budget=0.3, recipe="balanced"),
    "channels, static scale": ARCConfig(
        budget=0.3, recipe="balanced", granularity="channel", activation_scale="static"
    ),
    "sorted": ARCConfig(budget=0.3, recipe="paper"),
    "weights alone": ARCConfig(budget=0.3, recipe="balanced", activation="bf16"),
}


@pytest.fixture(scope="module")
def original_dir(tmp_path_factory):
    """A bf16 checkpoint on disk: `.to(bfloat16)` would cast the rotary buffer, loading does not."""
    directory = tmp_path_factory.mktemp("original")
    tiny_llama().to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def quantized(original_dir):
    """Function from a config to a freshly quantized model."""
    return lambda config: _quantized(original_dir, config)


def _quantized(original_dir, config: ARCConfig):
    model = AutoModelForCausalLM.from_pretrained(original_dir, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 200, (2, 32), generator=generator) for _ in range(2)]
    quantize_(model, config, calibration_data=batches, progress=False)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
def test_reload_is_bit_equal(name, quantized, tmp_path):
    """A saved model reloads to the same inner tensors and the same logits, bit for bit."""
    model = quantized(CONFIGS[name])
    arc_ao.save_pretrained(model, tmp_path / "saved", byte_tokenizer())
    loaded, _ = load_model(tmp_path / "saved")
    for key, tensor in model.state_dict().items():
        other = loaded.state_dict()[key]
        if isinstance(tensor, ARCTensor):
            for inner in tensor.__tensor_flatten__()[0]:
                assert torch.equal(getattr(tensor, inner), getattr(other, inner)), (key, inner)
        else:
            assert torch.equal(tensor, other), key
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, loaded(_ids()).logits)


def test_plain_save_pretrained_works_after_quantize(quantized, tmp_path):
    """transformers' own save_pretrained is enough: quantize_ attached the quantizer."""
    model = quantized(CONFIGS["both residuals"])
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, loaded(_ids()).logits)


def test_saved_twice_and_resaved_after_loading(quantized, tmp_path):
    """A loaded model saves again, with the same weights."""
    arc_ao.save_pretrained(quantized(CONFIGS["sorted"]), tmp_path / "a", byte_tokenizer())
    loaded, tokenizer = load_model(tmp_path / "a")
    arc_ao.save_pretrained(loaded, tmp_path / "b", tokenizer)
    first = load_file(tmp_path / "a" / "model.safetensors")
    second = load_file(tmp_path / "b" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def spelled_as_before(described: dict, old: bool) -> None:
    """A stored config's or tensor's fields as versions before activation_block_scale wrote them."""
    del described["_data"]["activation_block_scale"]
    described["_data"]["four_over_six"] = old


@pytest.mark.parametrize("old, method", [(True, "four_over_six"), (False, "amax")])
def test_checkpoints_from_before_activation_block_scale_load(quantized, tmp_path, old, method):
    """config.json and the metadata of model.safetensors hold `four_over_six`; saving mends it."""
    config = ARCConfig(budget=0.3, recipe="balanced", activation_block_scale=method)
    model = quantized(config)
    arc_ao.save_pretrained(model, tmp_path / "saved", byte_tokenizer())
    file, weights = tmp_path / "saved" / "config.json", tmp_path / "saved" / "model.safetensors"
    stored = json.loads(file.read_text())
    layers = stored["quantization_config"]["quant_type"]["default"]["_data"]["fqn_to_config"]
    for layer in layers.values():
        spelled_as_before(layer, old)
    file.write_text(json.dumps(stored))
    with safe_open(weights, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    for name in json.loads(metadata["tensor_names"]):
        described = json.loads(metadata[name])
        if described["_type"] == "ARCTensor":
            spelled_as_before(described, old)
            metadata[name] = json.dumps(described)
    save_file(tensors, weights, metadata=metadata)
    loaded, _ = load_model(tmp_path / "saved")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert weight.activation_block_scale == method
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, loaded(_ids()).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert 'four_over_six":' not in (tmp_path / "again" / "config.json").read_text()


def test_summary_lies_beside_the_weights(quantized, tmp_path):
    """arc_ao.json says what was done to every layer."""
    model = quantized(CONFIGS["both residuals"])
    arc_ao.save_pretrained(model, tmp_path / "saved")
    summary = json.loads((tmp_path / "saved" / SUMMARY_FILE).read_text())
    assert set(summary["layers"]) == {
        n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), ARCTensor)
    }
    assert summary["configs"][0]["_data"]["budget"] == 0.3


def test_output_that_exists_is_refused_and_untouched(quantized, tmp_path):
    """A folder with something in it is never written into."""
    target = tmp_path / "saved"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        arc_ao.save_pretrained(quantized(CONFIGS["plain"]), target)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert (target / "precious.txt").read_text() == "mine"


def test_failed_save_leaves_nothing(quantized, tmp_path):
    """An error midway removes the temporary folder."""

    class BrokenTokenizer:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        arc_ao.save_pretrained(quantized(CONFIGS["plain"]), tmp_path / "saved", BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_unquantized_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no ARCTensor"):
        arc_ao.save_pretrained(tiny_llama(), tmp_path / "saved")


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    """A tied output head that torchao's default filter took, and a module of no library."""
    model = tiny_llama(tie_word_embeddings=True)
    torchao_quantize_(model, CONFIGS["plain"])
    with pytest.raises(ValueError, match="tie_word_embeddings ties it to the embedding"):
        arc_ao.save_pretrained(model, tmp_path / "saved")
    module = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantize_(module, CONFIGS["plain"], progress=False)
    with pytest.raises(TypeError, match="expected a transformers model, got Sequential"):
        arc_ao.save_pretrained(module, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_converted_by_steps_saves_itself(original_dir, tmp_path):
    """model.save_pretrained works after step="convert" too."""
    model = AutoModelForCausalLM.from_pretrained(original_dir, dtype="auto").eval()
    config = CONFIGS["both residuals"]
    quantize_(model, config.with_step("prepare"))
    arc_ao.calibrate(model, [_ids()], progress=False)
    quantize_(model, config.with_step("convert"), progress=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, loaded(_ids()).logits)


def test_quantize_on_the_fly_in_from_pretrained(quantized, original_dir):
    """A config that needs no calibration works as transformers' quantization_config."""
    config = ArcHfConfig(ARCConfig(budget=0.0, recipe="plain"))
    loaded = AutoModelForCausalLM.from_pretrained(
        original_dir, dtype="auto", quantization_config=config
    )
    weight = loaded.model.layers[0].mlp.down_proj.weight
    assert isinstance(weight, ARCTensor)
    # Layer by layer there is no group to share an outer scale with, so compare one that has none.
    expected = quantized(CONFIGS["plain"]).model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight.qdata, expected.qdata)


def test_registration_twice_does_nothing():
    register()
    register()


def test_config_survives_the_dictionary():
    config = ArcHfConfig(ARCConfig(budget=0.25, exchange_rate="inf"))
    assert ArcHfConfig.from_dict(config.to_dict()).quant_type == config.quant_type
    assert config_from_dict(config_to_dict(config.quant_type)) == config.quant_type


def test_hint_without_the_import(quantized, tmp_path):
    """Without `import arc_ao` transformers' own warning names the package to import."""
    arc_ao.save_pretrained(quantized(CONFIGS["plain"]), tmp_path / "saved")
    assert (
        "import arc_ao"
        in json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"][
            "hint"
        ]
    )
    load = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r})"
    code = f"from transformers import AutoModelForCausalLM; {load}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "Unknown quantization type, got arc_ao" in run.stderr
