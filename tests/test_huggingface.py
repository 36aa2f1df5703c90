"""Saving and loading through transformers."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from torchao.core.config import config_from_dict, config_to_dict
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.integrations.huggingface import SUMMARY_FILE, ArcHfConfig, load_model, register

CONFIGS = {
    "plain": ARCConfig(budget=0.0, recipe="plain"),
    "both residuals": ARCConfig(budget=0.3, recipe="balanced"),
    "channels, static scale": ARCConfig(
        budget=0.3, recipe="balanced", granularity="channel", activation_scale="static"
    ),
    "sorted": ARCConfig(budget=0.3, recipe="paper"),
}


def _quantized(config: ARCConfig, seed: int = 0):
    model = tiny_llama(seed=seed).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(0, 200, (2, 32), generator=generator) for _ in range(2)]
    quantize_(model, config, calibration_data=batches, progress=False)
    return model


def _ids() -> torch.Tensor:
    return torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
def test_reload_is_bit_equal(name, tmp_path):
    """A saved model reloads to the same inner tensors and the same logits, bit for bit."""
    model = _quantized(CONFIGS[name])
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


def test_plain_save_pretrained_works_after_quantize(tmp_path):
    """transformers' own save_pretrained is enough: quantize_ attached the quantizer."""
    model = _quantized(CONFIGS["both residuals"])
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    with torch.no_grad():
        assert torch.equal(model(_ids()).logits, loaded(_ids()).logits)


def test_saved_twice_and_resaved_after_loading(tmp_path):
    """A loaded model saves again, with the same weights."""
    arc_ao.save_pretrained(_quantized(CONFIGS["sorted"]), tmp_path / "a", byte_tokenizer())
    loaded, tokenizer = load_model(tmp_path / "a")
    arc_ao.save_pretrained(loaded, tmp_path / "b", tokenizer)
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first


def test_summary_lies_beside_the_weights(tmp_path):
    """arc_ao.json says what was done to every layer."""
    model = _quantized(CONFIGS["both residuals"])
    arc_ao.save_pretrained(model, tmp_path / "saved")
    summary = json.loads((tmp_path / "saved" / SUMMARY_FILE).read_text())
    assert set(summary["layers"]) == {
        n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), ARCTensor)
    }
    assert summary["configs"][0]["_data"]["budget"] == 0.3


def test_output_that_exists_is_refused_and_untouched(tmp_path):
    """A folder with something in it is never written into."""
    target = tmp_path / "saved"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        arc_ao.save_pretrained(_quantized(CONFIGS["plain"]), target)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert (target / "precious.txt").read_text() == "mine"


def test_failed_save_leaves_nothing(tmp_path):
    """An error midway removes the temporary folder."""

    class BrokenTokenizer:
        def save_pretrained(self, directory):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        arc_ao.save_pretrained(_quantized(CONFIGS["plain"]), tmp_path / "saved", BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_unquantized_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no ARCTensor"):
        arc_ao.save_pretrained(tiny_llama(), tmp_path / "saved")


def test_quantize_on_the_fly_in_from_pretrained(tmp_path):
    """A config that needs no calibration works as transformers' quantization_config."""
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "original")
    config = ArcHfConfig(ARCConfig(budget=0.0, recipe="plain"))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", dtype="auto", quantization_config=config
    )
    expected = _quantized(CONFIGS["plain"])
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, ARCTensor)
    assert torch.equal(
        loaded.model.layers[0].mlp.up_proj.weight.qdata,
        expected.model.layers[0].mlp.up_proj.weight.qdata,
    )


def test_registration_twice_does_nothing():
    register()
    register()


def test_config_survives_the_dictionary():
    config = ArcHfConfig(ARCConfig(budget=0.25, exchange_rate="inf"))
    assert ArcHfConfig.from_dict(config.to_dict()).quant_type == config.quant_type
    assert config_from_dict(config_to_dict(config.quant_type)) == config.quant_type


def test_hint_without_the_import(tmp_path):
    """Without `import arc_ao` transformers' own warning names the package to import."""
    arc_ao.save_pretrained(_quantized(CONFIGS["plain"]), tmp_path / "saved")
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
