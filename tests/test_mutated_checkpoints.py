"""Checkpoints changed at random places of a fixed seed: what breaks a rule is refused by layer."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

import arc_ao
from arc_ao import ARCConfig, ARCTensor, quantize_

SEEDS = range(4)  # places that every kind of mutation is tried at
IDS = torch.arange(16).view(1, 16)
# Together they have every tensor that a weight may have.
CONFIGS = {
    "blocks": ARCConfig(recipe="balanced", num_act_channels=32, num_weight_channels=32),
    "channels": ARCConfig(
        recipe="balanced",
        num_act_channels=16,
        granularity="channel",
        channel_order="amax",
        activation_scale="static",
    ),
    "branch": ARCConfig(recipe="balanced", budget=0.0, smooth="flatten", rotation=16, rank=4),
}
INVALID_SCALES = (float("nan"), float("inf"), -1.0, 0.0)
OTHER_DTYPE = {torch.uint8: torch.int8, torch.int8: torch.uint8, torch.int32: torch.int64}


@dataclass
class Saved:
    """A checkpoint in memory, to be changed and written, and the layer that is changed."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any]
    layer: str
    random: Random

    def inner(self, name: str) -> Tensor:
        return self.tensors[f"{self.layer}._weight_{name}"]

    def names(self) -> list[str]:
        prefix = f"{self.layer}._weight_"
        return [name for name in self.tensors if name.startswith(prefix)]

    def put(self, name: str, values: tuple) -> None:
        """One of `values` at a random place of an inner tensor."""
        flat = self.inner(name).view(-1)
        flat[self.random.randrange(flat.numel())] = self.random.choice(values)

    def repeat(self, name: str) -> None:
        """The first value of an inner tensor at another place."""
        values = self.inner(name)
        values[self.random.randrange(1, values.numel())] = values[0].clone()

    def describe(self, **changes: Any) -> None:
        """Change attributes in the metadata."""
        described = json.loads(self.metadata[f"{self.layer}.weight"])
        described["_data"] |= changes
        self.metadata[f"{self.layer}.weight"] = json.dumps(described)

    def retype(self, name: Any) -> None:
        """Change the name of the class in the metadata."""
        described = json.loads(self.metadata[f"{self.layer}.weight"])
        self.metadata[f"{self.layer}.weight"] = json.dumps(described | {"_type": name})

    def promise(self, change: Callable[[list[str]], Any]) -> None:
        """Change the names of the promised tensors in the metadata."""
        described = json.loads(self.metadata[f"{self.layer}.weight"])
        change(described["_tensor_data_names"])
        self.metadata[f"{self.layer}.weight"] = json.dumps(described)

    @property
    def layers(self) -> dict[str, Any]:
        quantization = self.config["quantization_config"]
        return quantization["quant_type"]["default"]["_data"]["fqn_to_config"]

    def configure(self, **changes: Any) -> None:
        """Change the layer's config in config.json."""
        self.layers[self.layer]["_data"] |= changes


def drop_one(saved: Saved) -> None:
    del saved.tensors[saved.random.choice(saved.names())]


def drop_all(saved: Saved) -> None:
    for name in saved.names():
        del saved.tensors[name]


def cast_one(saved: Saved) -> None:
    name = saved.random.choice(saved.names())
    tensor = saved.tensors[name]
    saved.tensors[name] = tensor.to(OTHER_DTYPE.get(tensor.dtype, torch.float64))


def shorten_one(saved: Saved) -> None:
    name = saved.random.choice([n for n in saved.names() if saved.tensors[n].numel()])
    dim = saved.random.randrange(saved.tensors[name].dim())
    tensor = saved.tensors[name]
    saved.tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()


def copy_from_other(saved: Saved) -> None:
    """An intact layer of another shape in the place of this one."""
    other = "mlp.down_proj" if "mlp.down_proj" not in saved.layer else "self_attn.k_proj"
    for name in saved.names():
        suffix = name.rpartition("._weight_")[2]
        saved.tensors[name] = saved.tensors[f"model.layers.0.{other}._weight_{suffix}"].clone()


def unlist(saved: Saved) -> None:
    names = json.loads(saved.metadata["tensor_names"])
    names.remove(f"{saved.layer}.weight")
    saved.metadata["tensor_names"] = json.dumps(names)


def add_float(saved: Saved) -> None:
    saved.tensors[f"{saved.layer}.weight"] = torch.ones(64, 64)


# Kind -> checkpoint, change. Each breaks a rule, so that loading names the layer.
REFUSED: dict[str, tuple[str, Callable[[Saved], Any]]] = {
    "block scale 0": ("blocks", lambda s: s.put("scale", (0,))),
    "block scale NaN": ("branch", lambda s: s.put("scale", (0x7F, 0xFF))),
    "block scale with a sign": ("channels", lambda s: s.put("scale", (0x80, 0x81, 0xB8, 0xFE))),
    "outer scale": ("blocks", lambda s: s.put("outer_scale", INVALID_SCALES)),
    "static scale": ("channels", lambda s: s.put("act_outer_scale", INVALID_SCALES)),
    "channel scale": ("branch", lambda s: s.put("input_scale", (*INVALID_SCALES, 3.0, -2.0))),
    "rotation": ("branch", lambda s: s.put("rotation", (0, 3))),
    "rotation's sign": ("branch", lambda s: s.inner("rotation")[3, s.random.randrange(16)].neg_()),
    "branch": ("branch", lambda s: s.put("down", INVALID_SCALES[:2])),
    "branch, other factor": ("branch", lambda s: s.put("up", INVALID_SCALES[:2])),
    "activation blocks twice": ("blocks", lambda s: s.repeat("act_blocks")),
    "weight blocks twice": ("blocks", lambda s: s.repeat("weight_blocks")),
    "activation channels twice": ("channels", lambda s: s.repeat("act_channels")),
    "no permutation": ("channels", lambda s: s.repeat("channel_order")),
    "block that is not there": ("blocks", lambda s: s.put("act_blocks", (-1, 99, 1 << 30))),
    "weight block that is not there": ("blocks", lambda s: s.put("weight_blocks", (-1, 99))),
    "channel that is not there": ("channels", lambda s: s.put("act_channels", (-5, 128))),
    "order beyond": ("channels", lambda s: s.put("channel_order", (-1, 128))),
    "a tensor gone": ("blocks", drop_one),
    "a tensor of a branch gone": ("branch", drop_one),
    "all tensors gone": ("channels", drop_all),
    "dtype": ("blocks", cast_one),
    "dtype of a branch": ("branch", cast_one),
    "shape": ("channels", shorten_one),
    "shape of a branch": ("branch", shorten_one),
    "another layer's tensors": ("blocks", copy_from_other),
    "weight in 16 bit, too": ("blocks", add_float),
    "a tensor too many": ("blocks", lambda s: s.tensors.update({f"{s.layer}._weight_up": IDS})),
    "no description": ("blocks", lambda s: s.metadata.pop(f"{s.layer}.weight")),
    "no JSON": ("blocks", lambda s: s.metadata.update({f"{s.layer}.weight": '{"_type": "ARC'})),
    "no dictionary": ("blocks", lambda s: s.metadata.update({f"{s.layer}.weight": "[1]"})),
    "no attributes": ("blocks", lambda s: s.metadata.update({f"{s.layer}.weight": "{}"})),
    "promise too many": ("blocks", lambda s: s.promise(lambda names: names.append("up"))),
    "promise too few": ("blocks", lambda s: s.promise(lambda names: names.pop())),
    "in_features": ("blocks", lambda s: s.describe(in_features=s.random.choice((16, 65, 0, "64")))),
    "original dtype": ("blocks", lambda s: s.describe(orig_dtype={"_data": "int8"})),
    "layout": ("blocks", lambda s: s.describe(weight_layout=s.random.choice(("panels", "x")))),
    "activation scale": ("blocks", lambda s: s.describe(activation_scale="static")),
    "no activation scale": ("blocks", lambda s: s.describe(activation_scale="none")),
    "activation scale by config": ("blocks", lambda s: s.describe(activation_scale="tensor")),
    "block scale by config": ("blocks", lambda s: s.describe(activation_block_scale="mse")),
    "unknown block scale": ("blocks", lambda s: s.describe(activation_block_scale="best")),
    "unknown attribute": ("blocks", lambda s: s.describe(group_size=16)),
    "unknown type": ("blocks", lambda s: s.retype(s.random.choice(("Tensor", "ARCTensr", 3)))),
    "unlisted": ("blocks", unlist),
    "config: no number": ("blocks", lambda s: s.configure(num_act_channels="many")),
    "config: no choice": ("channels", lambda s: s.configure(granularity="row")),
    "config: no field": ("branch", lambda s: s.configure(group_size=32)),
    "config: no config": ("blocks", lambda s: s.layers.update({s.layer: "ARCConfig"})),
    "config: channels": ("blocks", lambda s: s.configure(num_act_channels=16)),
    "config: granularity": ("channels", lambda s: s.configure(granularity="block")),
    "config: order": ("channels", lambda s: s.configure(channel_order="none")),
    "config: rank": ("branch", lambda s: s.configure(rank=8)),
    "config: rotation": ("branch", lambda s: s.configure(rotation=32)),
    "config: smooth": ("branch", lambda s: s.configure(smooth="none")),
    "config: layer gone": ("blocks", lambda s: s.layers.pop(s.layer)),
    "config: layer renamed": ("blocks", lambda s: s.layers.update({"x": s.layers.pop(s.layer)})),
}
# What changes nothing that counts.
HARMLESS: dict[str, Callable[[Saved], Any]] = {
    "stale digest": lambda s: s.describe(input_plan="0" * 16),
    "foreign metadata": lambda s: s.metadata.update(author="me"),
    "promises in another order": lambda s: s.promise(lambda names: names.reverse()),
    "default spelled out": lambda s: s.configure(granularity="block", budget=0.5),
}
# Valid, and yet other values: no rule tells them from what was saved.
UNDETECTED: dict[str, Callable[[Saved], Any]] = {
    "code": lambda s: s.inner("qdata").view(-1)[s.random.randrange(64)].bitwise_xor_(0x21),
    "block scale": lambda s: s.inner("scale").clamp_(max=0x40),
    "outer scale": lambda s: s.inner("outer_scale").mul_(2),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints by the names of CONFIGS."""
    folder, directories = tmp_path_factory.mktemp("original"), {}
    for name, config in CONFIGS.items():
        model = tiny_llama(num_hidden_layers=1).to(torch.bfloat16)
        quantize_(model, config, calibration_data=[IDS], progress=False)
        directories[name] = arc_ao.save_pretrained(model, folder / name)
    return directories


def read(directory: Path, seed: int) -> Saved:
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    config = json.loads((directory / "config.json").read_text())
    random = Random(seed)
    saved = Saved(load_file(file), metadata, config, "", random)
    saved.layer = random.choice(sorted(saved.layers))
    return saved


def load(saved: Saved, directory: Path) -> Any:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    save_file(saved.tensors, directory / "model.safetensors", metadata=saved.metadata)
    (directory / "config.json").write_text(json.dumps(saved.config))
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_rule_is_refused_by_layer(kind, originals, tmp_path):
    name, change = REFUSED[kind]
    for seed in SEEDS:
        saved = read(originals[name], seed)
        change(saved)
        with pytest.raises(ValueError) as refusal:
            load(saved, tmp_path / "changed")
        assert saved.layer in str(refusal.value), seed


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_changes_load_the_same_weights(kind, originals, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(originals["blocks"], dtype="auto")
    for seed in SEEDS:
        saved = read(originals["blocks"], seed)
        HARMLESS[kind](saved)
        loaded = load(saved, tmp_path / "changed")
        weight, other = (m.get_submodule(saved.layer).weight for m in (expected, loaded))
        names, attributes = weight.__tensor_flatten__()
        assert other.__tensor_flatten__() == (names, attributes)
        assert all(torch.equal(getattr(weight, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("kind", UNDETECTED)
def test_changes_within_the_rules_load(kind, originals, tmp_path):
    """They load as what the file says, no matter what had been saved."""
    for seed in SEEDS:
        saved = read(originals["blocks"], seed)
        UNDETECTED[kind](saved)
        weight = load(saved, tmp_path / "changed").get_submodule(saved.layer).weight
        plain = weight.to_layout("plain")
        assert all(torch.equal(getattr(plain, n), saved.inner(n)) for n in ("qdata", "scale"))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_plain_tensor_that_was_saved_is_missed(name, originals, tmp_path):
    """Not replaced by a random one."""
    saved = read(originals["blocks"], 0)
    del saved.tensors[name]
    with pytest.raises(ValueError, match=f"^{name}: expected in the checkpoint, found none"):
        load(saved, tmp_path / "changed")


def test_every_inner_tensor_is_among_the_checkpoints(originals):
    """So that the mutations reach all of them."""
    found = {n.rpartition("._weight_")[2] for d in originals.values() for n in read(d, 0).tensors}
    assert found >= {*ARCTensor.tensor_data_names, *ARCTensor.optional_tensor_data_names}
