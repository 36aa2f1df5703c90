"""Checkpoints loaded: every model and class that can be saved, in linear time, nothing trusted."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_llama
from torch import Tensor
from torchao.core.config import config_from_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import arc_ao
from arc_ao import ARCConfig, ARCTensor, quantize_
from arc_ao.integrations.quantizer import ArcHfConfig

PLAIN = ARCConfig(budget=0.0, recipe="plain")
IDS = torch.arange(3, 19).view(2, 8)
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 16}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 16}
VISION |= {"num_attention_heads": 2, "patch_size": 8}
SEQUENCE = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
SEQUENCE |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64}
SEQUENCE |= {"decoder_ffn_dim": 64, "max_position_embeddings": 16, "pad_token_id": 0}
SEQUENCE |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
AUDIO = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
AUDIO |= {"num_attention_heads": 2, "conv_dim": (32, 32), "conv_kernel": (3, 3)}
AUDIO |= {"conv_stride": (2, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
AUDIO |= {"num_conv_pos_embedding_groups": 2}
TOWERS = {"text_config": TEXT, "vision_config": VISION}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
PAIRS = {"input_ids": IDS, "pixel_values": PIXELS}
SOUND = {"input_values": torch.linspace(-1, 1, 2 * 400).view(2, 400)}
# Class -> config class, its settings, inputs. The first five have a parameter or a buffer on the
# top module; files of the last two have other names, and joined q, k and v, in their first form.
MODELS = {
    "BartForConditionalGeneration": ("BartConfig", SEQUENCE, {"input_ids": IDS}),
    "MarianMTModel": ("MarianConfig", SEQUENCE, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "CLIPModel": ("CLIPConfig", TOWERS, PAIRS),
    "SiglipModel": ("SiglipConfig", TOWERS, PAIRS),
    "Wav2Vec2Model": ("Wav2Vec2Config", AUDIO, SOUND),
    "ViTModel": ("ViTConfig", VISION, {"pixel_values": PIXELS}),
    "GteModel": ("GteConfig", TEXT, {"input_ids": IDS}),
}


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    quantize_(model.to(torch.bfloat16).eval(), PLAIN, progress=False)
    return model


def parts(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model by name, quantized weights as their inner tensors."""
    for name, tensor in model.state_dict().items():
        inner = tensor.__tensor_flatten__()[0] if isinstance(tensor, ARCTensor) else ()
        yield from ((f"{name}.{part}", getattr(tensor, part)) for part in inner)
        if not inner:
            yield name, tensor


def assert_equal_models(one: torch.nn.Module, other: torch.nn.Module) -> None:
    expected, found = dict(parts(one)), dict(parts(other))
    assert expected.keys() == found.keys()
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


def built(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config_name, settings, inputs = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config_name)(**settings))
    cast = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    return quantized(model), cast


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_parameters_or_names_of_its_own_loads(name, tmp_path):
    """Loaded, and loaded after having been saved a second time: the same tensors and outputs."""
    model, inputs = built(name)
    arc_ao.save_pretrained(model, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", dtype="auto").eval()
    arc_ao.save_pretrained(loaded, tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "b", dtype="auto").eval()
    for other in (loaded, again):
        assert_equal_models(model, other)
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], other(**inputs)[0])


@pytest.fixture(scope="module")
def causal_dir(tmp_path_factory):
    """A quantized causal language model, and where it was saved."""
    directory = tmp_path_factory.mktemp("causal") / "saved"
    model = quantized(tiny_llama())
    arc_ao.save_pretrained(model, directory)
    return model, directory


def test_a_causal_checkpoint_opens_as_its_base_model(causal_dir):
    model, directory = causal_dir
    base = AutoModel.from_pretrained(directory, dtype="auto")
    assert_equal_models(model.model, base)


def test_a_base_checkpoint_opens_with_a_head(tmp_path):
    """All but the head comes from the file; the head is new, as transformers says."""
    base = quantized(tiny_llama().model)
    arc_ao.save_pretrained(base, tmp_path / "saved")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert_equal_models(base, headed.model)


def test_a_checkpoint_in_several_files_loads(causal_dir, tmp_path):
    model, _ = causal_dir
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    assert_equal_models(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))


def test_weights_of_another_library_load_beside_ours(tmp_path):
    """One layer in int8 by torchao, the rest by ARCConfig."""
    model = tiny_llama(num_hidden_layers=1).to(torch.bfloat16)
    layer = "model.layers.0.mlp.down_proj"
    config = FqnToConfig({layer: Int8WeightOnlyConfig(version=2), "re:.*_proj": PLAIN})
    quantize_(model, config, progress=False)
    arc_ao.save_pretrained(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    weight = loaded.get_submodule(layer).weight
    assert type(weight) is type(model.get_submodule(layer).weight) is not ARCTensor
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, loaded(IDS).logits)


def calls_of(function: Callable[[], object]) -> int:
    """Python functions that a call enters: its work, whatever else the machine does."""
    count = 0

    def on_event(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(on_event)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_loading_is_linear_in_the_number_of_linears(tmp_path):
    """16 layers cost what 8 and 8 do; quadratic work would make it four times those."""
    counts = []
    for layers in (4, 8, 16):
        directory = tmp_path / str(layers)
        quantized(tiny_llama(num_hidden_layers=layers)).save_pretrained(directory)
        load = lambda path=directory: AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        load()
        counts.append(calls_of(load))
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


@contextmanager
def edited(path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of a safetensors file, written back after the body."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    yield tensors, metadata
    save_file(tensors, path, metadata=metadata)


def test_a_stale_input_plan_is_computed_anew(causal_dir, tmp_path):
    """From a checkpoint and from a pickle: linears that do not share an input must not share its
    quantization."""
    model, _ = causal_dir
    arc_ao.save_pretrained(model, tmp_path / "saved")
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).weight
    with edited(tmp_path / "saved" / "model.safetensors") as (_, metadata):
        described = json.loads(metadata[f"{name}.weight"])
        described["_data"]["input_plan"] = "0123456789abcdef"
        metadata[f"{name}.weight"] = json.dumps(described)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded.get_submodule(name).weight.input_plan == weight.input_plan
    stale, file = weight.detach(), io.BytesIO()
    stale.input_plan = "0123456789abcdef"
    torch.save(stale, file)
    file.seek(0)
    assert torch.load(file).input_plan == weight.input_plan


@pytest.mark.parametrize("name", ["enable_inductor_passes", "ARCTensor", "quantize_", "no_such"])
@pytest.mark.parametrize("nested", [False, True])
def test_config_json_names_config_classes_alone(name, nested, causal_dir, tmp_path):
    """Functions of arc_ao and torchao, and other classes, are refused, not called."""
    model, directory = causal_dir
    stored = json.loads((directory / "config.json").read_text())["quantization_config"]
    described = {"_type": name, "_version": 1, "_data": {}}
    if nested:
        layers = stored["quant_type"]["default"]["_data"]["fqn_to_config"]
        layers["model.layers.0.mlp.up_proj"] = described
    else:
        stored["quant_type"]["default"] = described
    with pytest.raises(ValueError, match=f"expected names of config classes, found '{name}'"):
        ArcHfConfig.from_dict(stored)


def test_torchao_finds_no_function_of_arc_ao():
    """Its own reader, which any `torchao` checkpoint goes through, calls what it finds."""
    with pytest.raises(ValueError, match="Failed to find class enable_inductor_passes"):
        config_from_dict({"_type": "enable_inductor_passes", "_version": 1, "_data": {}})
    found = config_from_dict({"_type": "NVFP4Config", "_version": 1, "_data": {}})
    assert found == arc_ao.NVFP4Config()


def test_config_json_says_what_loading_reads(causal_dir):
    """How weights were quantized is in arc_ao.json; a layer's config tells its own shapes alone."""
    _, directory = causal_dir
    stored = json.loads((directory / "config.json").read_text())["quantization_config"]
    layers = stored["quant_type"]["default"]["_data"]["fqn_to_config"]
    shapes = {"num_act_channels": 0, "num_weight_channels": 0, "granularity": "block"}
    shapes |= {"channel_order": "none", "activation_scale": "token"}
    shapes |= {"activation_block_scale": "amax", "step": "prepare_for_loading"}
    assert layers["model.layers.0.mlp.up_proj"] == {"_type": "ARCConfig", "_data": shapes}
    assert len(layers) == 7 * tiny_config().num_hidden_layers
