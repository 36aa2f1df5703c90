"""Padding is not calibrated: texts make the same choices whether they are padded or not."""

import copy

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import arc_ao
from arc_ao.calibration.data import calibrate, num_tokens, to_batches
from arc_ao.calibration.padding import kept_rows, kept_tokens_of_output, watched, without_padding
from arc_ao.calibration.session import observer_on
from arc_ao.eval.report import layer_report
from arc_ao.inference import run_model
from arc_ao.passes.export.quantizer import GraphObserver
from arc_ao.quantize import quantize_
from arc_ao.summary import arc_tensors
from arc_ao.tensor import ARCTensor

LENGTHS = (40, 9, 23, 5, 31, 14, 12, 26)
PAD = 7


def texts(lengths=LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, 250, (1, length), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str, size: int = 1, length: int = 48) -> list[dict]:
    """Batches of `size` texts each, all as long."""
    batches = []
    for start in range(0, len(rows), size):
        ids = torch.full((size, length), PAD)
        mask = torch.zeros(size, length, dtype=torch.int64)
        for i, row in enumerate(rows[start : start + size]):
            where = (
                slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], None)
            )
            ids[i, where], mask[i, where] = row[0], 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def model_with_outliers(massive: bool = True) -> nn.Module:
    """Some channels carry more; those of the padding token carry most, elsewhere."""
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[torch.randint(128, (6,), generator=generator)] *= 8
        if massive:
            embedding = model.model.embed_tokens.weight
            embedding[PAD, :16] += 30 * embedding.std()
    return model


def quantized(model: nn.Module, data: list, **options) -> dict[str, ARCTensor]:
    config = arc_ao.ARCConfig(budget=0.1, **options)
    model = copy.deepcopy(model)
    quantize_(model, config, calibration_data=data, progress=False)
    return arc_tensors(model)


def choices(tensors: dict[str, ARCTensor]) -> dict[str, list]:
    """Residual blocks and channel order of every layer."""
    parts = ("act_blocks", "weight_blocks", "channel_order", "act_channels")
    return {
        name: [None if (v := getattr(t, part)) is None else v.tolist() for part in parts]
        for name, t in tensors.items()
    }


def equal_codes(first: dict[str, ARCTensor], second: dict[str, ARCTensor]) -> float:
    """Share of weight codes that are the same."""
    same = [(first[n].qdata == second[n].qdata).float().mean().item() for n in first]
    return sum(same) / len(same)


RECIPES = {
    "balanced": {"recipe": "balanced"},
    "default": {},
    "best": {"recipe": "best"},
    "gptq": {"recipe": "balanced", "rounding": "gptq"},
    "local_hessian": {"recipe": "balanced", "weight_scale": "local_hessian"},
    "awq": {"recipe": "balanced", "smooth": "awq"},
    "branch": {"recipe": "balanced", "rank": 8, "branch": "arhq"},
    "static": {"recipe": "balanced", "activation_scale": "static"},
}


@pytest.mark.filterwarnings("ignore:rounding='gptq'")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_is_not_calibrated(recipe, side):
    """One text a batch: the same blocks and channel orders; codes but for a few at a tie, which the
    sums of a longer attention round otherwise."""
    model = model_with_outliers()
    plain = quantized(model, texts(), **RECIPES[recipe])
    found = quantized(model, padded(texts(), side), **RECIPES[recipe])
    assert choices(found) == choices(plain)
    # An SVD of nearly equal singular values turns with the last bits of its sums.
    assert equal_codes(found, plain) > (0.9 if recipe == "branch" else 0.999)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_several_texts_is_not_calibrated(side):
    model = model_with_outliers()
    plain = quantized(model, texts(), recipe="balanced")
    found = quantized(model, padded(texts(), side, size=4), recipe="balanced")
    assert choices(found) == choices(plain) and equal_codes(found, plain) > 0.999


def three_steps(model: nn.Module, run, **options) -> dict[str, ARCTensor]:
    model, config = copy.deepcopy(model), arc_ao.ARCConfig(budget=0.1, **options)
    quantize_(model, config.with_step("prepare"), progress=False)
    run(model)
    quantize_(model, config.with_step("convert"), progress=False)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return arc_tensors(model)


@pytest.mark.filterwarnings("ignore:rounding='gptq'")
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("runner", ["ours", "the user's"])
def test_padding_is_not_calibrated_in_the_three_steps(runner, rounding):
    """Also where the user runs the model; every hook is gone afterwards."""

    def run(data: list):
        if runner == "ours":
            return lambda model: calibrate(model, data, progress=False)
        return lambda model: [run_model(model, batch) for batch in to_batches(data)]

    model, options = model_with_outliers(), {"recipe": "balanced", "rounding": rounding}
    plain = three_steps(model, run(texts()), **options)
    found = three_steps(model, run(padded(texts(), "left")), **options)
    assert choices(found) == choices(plain) and equal_codes(found, plain) > 0.999


class Hidden(nn.Module):
    """Token ids and their mask -> last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask).last_hidden_state


def test_padding_is_not_calibrated_in_an_exported_graph():
    """Keywords and positions; the quantized graph has no hook left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        bert = BertModel(BertConfig(vocab_size=257, num_attention_heads=4, **sizes), False)
    model = Hidden(bert.eval()).requires_grad_(False)
    batches = padded(texts(), "right")
    program = torch.export.export(model, (), batches[0])
    seen = []
    for run in (lambda gm, b: gm(**b), lambda gm, b: gm(b["input_ids"], b["attention_mask"])):
        prepared = arc_ao.prepare_arc(program, arc_ao.ARCConfig(recipe="balanced"))
        for batch in batches:
            run(prepared, batch)
        observers = [m for m in prepared.modules() if isinstance(m, GraphObserver)]
        seen += [int(observer.statistics.count) for observer in observers]
        converted = arc_ao.convert_arc(prepared)
        hooks = [*converted._forward_hooks.values(), *converted._forward_pre_hooks.values()]
        assert not any(getattr(hook, "__module__", "").endswith("padding") for hook in hooks)
    assert len(seen) >= 8 and set(seen) == {sum(LENGTHS)}


def test_a_copy_of_a_prepared_model_leaves_padding_out():
    model, config = tiny_llama(), arc_ao.ARCConfig(recipe="balanced", step="prepare")
    quantize_(model, config, progress=False)
    twin = copy.deepcopy(model)
    run_model(twin, padded(texts((5,)), "left")[0])
    linear = "model.layers.0.mlp.up_proj"
    assert observer_on(twin.get_submodule(linear)).count == 5
    assert observer_on(model.get_submodule(linear)).count == 0


def test_a_report_leaves_padding_out():
    model = model_with_outliers()
    changed = copy.deepcopy(model)
    quantize_(changed, arc_ao.NVFP4Config(), progress=False)
    plain = layer_report(changed, model, texts(), progress=False)
    found = layer_report(changed, model, padded(texts(), "left"), progress=False)
    for one, other in zip(plain, found, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, abs=1e-3)


def test_padding_is_not_counted_as_tokens():
    batches = padded(texts(), "left", size=4)
    assert sum(map(num_tokens, batches)) == sum(LENGTHS)
    assert num_tokens({"input_ids": torch.zeros(2, 5, dtype=torch.int64)}) == 10


def test_an_unpadded_batch_is_observed_as_it_is():
    """No row is asked for, also with a mask of ones: nothing is copied."""
    model, seen = tiny_llama(), []
    ids = texts((9,))[0]
    linear = model.model.layers[0].mlp.up_proj
    linear.register_forward_pre_hook(
        lambda _, args: seen.append(without_padding(args[0]) is args[0])
    )
    with watched(model):
        for batch in (ids, {"input_ids": ids}, {"input_ids": ids, "attention_mask": ids > 0}):
            run_model(model, batch)
        run_model(model, {"input_ids": ids, "attention_mask": ids > ids[0, 4]})
    assert seen == [True, True, True, False]


def test_nothing_is_remembered_after_an_error():
    """A model that fails half-way leaves no mask behind for the next one."""
    model, other = tiny_llama(), nn.Linear(64, 64)
    batch = padded(texts((5,)), "left")[0]

    def fail(module: nn.Module, args: tuple) -> None:
        raise RuntimeError("half-way")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with watched(model):
        with pytest.raises(RuntimeError, match="half-way"):
            run_model(model, batch)
        assert kept_rows(torch.zeros(1, 48, 64)) is None
    handle.remove()
    assert kept_tokens_of_output(other(torch.zeros(1, 48, 64))) is None
