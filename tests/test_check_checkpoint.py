"""The linter of checkpoints finds what is wrong and nothing else; two checkpoints compared."""

import json
import re
import shutil

import pytest
import torch
from test_checkpoints import CONFIGS, LAYER, edit, export, quantized
from test_import_checkpoint import F8, NAN, damage, edit_config

from arc_ao import ARCConfig
from arc_ao.checkpoints import side_file
from arc_ao.checkpoints.compare import compare_checkpoints
from arc_ao.checkpoints.linter import check_checkpoint
from arc_ao.cli import main

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Good checkpoints by name, to be copied before they are damaged."""
    folder = tmp_path_factory.mktemp("exports")
    residuals, alone = quantized(CONFIGS["residuals"]), quantized(CONFIGS["weights alone"])
    return {
        "compressed-tensors": export(residuals, folder / "a"),
        "modelopt": export(residuals, folder / "b", "modelopt"),
        "sharded": export(residuals, folder / "c", max_shard_size=40_000),
        "compressed-tensors, W4A16": export(alone, folder / "d"),
        "modelopt, W4A16": export(alone, folder / "e", "modelopt"),
    }


GOOD = ("compressed-tensors", "modelopt", "sharded", "compressed-tensors, W4A16", "modelopt, W4A16")


@pytest.mark.parametrize("name", GOOD)
def test_good_checkpoints_get_no_complaint(exports, name):
    assert check_checkpoint(exports[name], ranks=(1, 2)) == []


def without_inputs(config):
    config["config_groups"]["group_0"]["input_activations"] = None


def padded(tensors):
    """A layer's scales in the shape that kernels pad to."""
    tensors[f"{LAYER}.weight_scale"] = torch.ones(128, 4).to(F8)


def unquantized_sibling(tensors):
    for suffix in ("packed", "scale", "global_scale"):
        del tensors[f"{LAYER}.weight_{suffix}"]
    del tensors[f"{LAYER}.input_global_scale"]
    tensors[f"{LAYER}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


def other_scale(tensors):
    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] *= 2


WRONG = {
    "missing: expected weight_scale,": damage(weight_scale=None),
    "missing: expected weight_packed,": damage(weight_packed=None),
    "dtype: expected weight_scale in F8_E4M3, found U8": damage(
        weight_scale=torch.ones(64, 4, dtype=torch.uint8)
    ),
    "shape: .*as padded for a kernel": padded,
    "shape: expected one weight_global_scale": damage(weight_global_scale=torch.ones(64)),
    "scale: .*found NaN": damage(weight_scale=NAN),
    "scale: .*found zeros alone": damage(weight_scale=torch.zeros(64, 4).to(F8)),
    "scale: expected a finite input_global_scale above 0, found \\[inf\\]": damage(
        input_global_scale=torch.tensor([torch.inf])
    ),
    "scale: expected a finite weight_global_scale above 0, found \\[0.0\\]": damage(
        weight_global_scale=torch.zeros(1)
    ),
    "activations: expected input_global_scale.*W4A4": damage(input_global_scale=None),
    "fused: expected one weight_global_scale for all": other_scale,
    "fused: expected .*q_proj in NVFP4, too": unquantized_sibling,
    "index: expected in the index, found in a file alone": lambda t: t.update(new=torch.ones(1)),
}


@pytest.mark.parametrize("complaint", WRONG)
def test_damage_is_found_by_name(exports, tmp_path, complaint):
    """And nothing else of that kind is complained about."""
    directory = shutil.copytree(exports["compressed-tensors"], tmp_path / "damaged")
    edit(directory, WRONG[complaint])
    kind, _, message = complaint.partition(": ")
    found = [c for c in check_checkpoint(directory) if c.kind == kind]
    matching = [c for c in found if re.search(message, c.message)]
    assert len(matching) == 1, found
    names = (LAYER, "model.layers.0.mlp.gate_proj", "new")
    assert matching[0].name in names


def test_wrong_configurations_are_found(exports, tmp_path):
    """W4A4 tensors under W4A16, a quantized layer that is excluded, other layers' side file."""
    directory = shutil.copytree(exports["compressed-tensors"], tmp_path / "a")
    edit_config(directory, without_inputs)
    edit_config(directory, lambda config: config["ignore"].append(LAYER))
    (directory / side_file.PATH).unlink()
    found = check_checkpoint(directory)
    assert {c.kind for c in found} == {"activations", "ignore", "side file"}
    assert sum(c.kind == "activations" for c in found) == 14  # every linear
    assert [c.name for c in found if c.kind == "ignore"] == [LAYER]
    modelopt = shutil.copytree(exports["modelopt"], tmp_path / "b")
    edit_config(modelopt, lambda config: config.update(quant_algo="NVFP4_SVD"))
    assert {c.kind for c in check_checkpoint(modelopt)} == {"activations"}


def test_ranks_must_share_whole_tiles(exports):
    """down_proj has 128 in_features: 32 a rank of 4, 16 a rank of 8."""
    found = check_checkpoint(exports["compressed-tensors"], ranks=(1, 2, 4, 8))
    assert {c.kind for c in found} == {"alignment"}
    assert [c.message for c in found if c.name == DOWN] == [
        "expected a multiple of 32 in_features on each of 8 ranks, found 128 / 8"
    ]


def test_the_command_s_status_says_whether_there_are_complaints(exports, tmp_path, capsys):
    directory = str(exports["modelopt"])
    assert main(["check", directory]) == 0
    with pytest.raises(SystemExit) as ended:
        main(["check", directory, "--tp", "8", "--json", str(tmp_path / "found.json")])
    assert ended.value.code == 1 and "alignment: model.layers.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())[0]["kind"] == "alignment"


def test_forms_of_one_model_do_not_differ(exports):
    comparison = compare_checkpoints(exports["compressed-tensors"], exports["modelopt"])
    assert len(comparison.layers) == 14 and not comparison.only_in_a + comparison.only_in_b
    for row in comparison.layers:
        assert row.codes == row.block_scales == 1.0
        assert row.error < 1e-6 and row.weight_scale == pytest.approx(1.0, abs=1e-6)


def test_differences_are_measured(exports, tmp_path, capsys):
    """Doubled outer scales are an error of 100 %; one byte changed is two codes of 4096."""
    directory = shutil.copytree(exports["compressed-tensors"], tmp_path / "changed")

    def change(tensors):
        tensors[f"{LAYER}.weight_global_scale"] /= 2
        tensors[f"{DOWN}.weight_packed"][0, 0] ^= 0x11

    edit(directory, change)
    arguments = [str(exports["compressed-tensors"]), str(directory)]
    assert main(["compare", *arguments, "--json", str(tmp_path / "rows.json")]) == 0
    assert "equal codes" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["layers"]}
    assert rows[LAYER]["error"] == pytest.approx(1.0) and rows[LAYER]["weight_scale"] == 2.0
    assert rows[DOWN]["codes"] == 1 - 2 / (64 * 128) and 0 < rows[DOWN]["error"] < 0.1


def test_other_models_are_refused(exports, tmp_path):
    other = export(
        quantized(
            ARCConfig(recipe="plain", exportable=True), hidden_size=96, num_attention_heads=6
        ),
        tmp_path / "other",
    )
    with pytest.raises(ValueError, match="expected the same shape in both checkpoints"):
        compare_checkpoints(exports["modelopt"], other)
