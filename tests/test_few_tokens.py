"""GPTQ and the number of its tokens: damping, tokens kept aside, massive tokens, the warning."""

import warnings

import pytest
import torch
from test_gptq import correlated, gram_of, ids, output_error, plan_for, weights
from test_quantize import assert_same_tensors, batches
from tiny_models import NormedPair, tiny_llama
from torch import Tensor, nn

import arc_ao
from arc_ao import ARCConfig, quantize_
from arc_ao.calibration.few_tokens import RoundingNote, warn_of_few_tokens
from arc_ao.calibration.held_out import HeldOut
from arc_ao.calibration.input_gram import InputGram, token_weights
from arc_ao.methods import gptq, hessian
from arc_ao.methods.gptq import damping_for, prepare_rounding
from arc_ao.methods.gram import Gram, effective_input
from arc_ao.methods.held_error import held_error, held_rows
from arc_ao.methods.hessian import quantize_group
from arc_ao.methods.weights import quantize_weight
from arc_ao.tensor import arc_linear

GPTQ = {"recipe": "balanced", "rounding": "gptq", "budget": 0.2}
FEW = ".*expected at least 10 calibration tokens for each input channel"


def white(tokens: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def numbered(count: int) -> Tensor:
    """Rows [count, 16] that tell their place."""
    return torch.arange(1.0, count + 1).unsqueeze(1).expand(count, 16)


@pytest.mark.parametrize("tokens, stride", [(0, 8), (4096, 8), (16384, 16), (100_000, 98)])
def test_rows_are_kept_aside_evenly(tokens, stride):
    """One of every group of `stride`, and of windows of 512 no position always or never."""
    held, passed = HeldOut(), tokens or 2048
    held.spread_over(tokens)
    others, _ = held.split(numbered(passed))
    kept = held.rows()[:, 0].long() - 1
    assert held.stride == stride and kept.shape[0] == pytest.approx(passed / stride, abs=1)
    assert kept.shape[0] <= 1024 and others.shape[0] + kept.shape[0] == passed
    assert torch.equal(kept // stride, torch.arange(kept.shape[0]))
    within = torch.bincount(kept % stride, minlength=stride).float()
    assert within.amax() <= 2 * within.mean() + 1
    assert not set(kept.tolist()) & set((others[:, 0].long() - 1).tolist())


def test_batches_of_any_size_keep_the_same_rows():
    whole, parts = HeldOut(), HeldOut()
    others, _ = whole.split(numbered(300))
    passed = [parts.split(rows)[0] for rows in numbered(300).split([1, 6, 0, 93, 200])]
    assert torch.equal(parts.rows(), whole.rows()) and torch.equal(torch.cat(passed), others)


def test_there_is_an_end_to_what_is_kept():
    held = HeldOut(tokens=10)
    others, _ = held.split(numbered(800))
    assert held.rows().shape[0] == 10 and others.shape[0] == 790
    assert torch.equal(others[-700:], numbered(800)[-700:])


def test_damping_grows_as_tokens_get_fewer():
    found = [damping_for(tokens, 1000) for tokens in (0, 500, 3000, 10_000, 20_000, 10**6)]
    assert found == [1.0, 1.0, 0.5, 0.15, 0.1, 0.1]
    weight, x = weights(8, 32), correlated(256, 32)
    open_, fixed = plan_for(weight, x, damping=None), plan_for(weight, x, damping=0.3)
    take = lambda: gram_of(x, open_)
    assert prepare_rounding(take, open_, ["layer"], 64).damping == 0.75
    assert prepare_rounding(take, fixed, ["layer"], 64).damping == 0.3


def spread(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs of as many directions as channels, none of them negligible."""
    strength = torch.linspace(1.0, 0.2, channels).unsqueeze(1)
    return white(tokens, channels, seed) @ (white(channels, channels, seed=7) * strength)


@pytest.mark.parametrize(
    "make, tokens, damping",
    [
        (correlated, 256, gptq.LITTLE),
        (correlated, 12_800, gptq.LITTLE),
        (spread, 256, damping_for(224, 128)),
        (spread, 12_800, gptq.LEAST),
    ],
)
def test_damping_follows_tokens_unless_less_is_clearly_better(make, tokens, damping):
    """Few directions are known from few tokens, and damping would hide them; of many they are not.
    On tokens not seen, both choices are at least nearly as good as those that were not taken."""
    weight, x, unseen = weights(64, 128), make(tokens, 128), make(512, 128, seed=5)
    errors = {}
    for given in (None, 1e-4, gptq.LITTLE, 0.3):
        plan = plan_for(weight, x, damping=given)
        result = next(quantize_group([weight], [plan], ["layer"], summed(x, plan)))
        errors[given] = output_error(weight, result.tensor, unseen, plan)
        assert result.note.damping == (damping if given is None else given)
    assert errors[None] < 1.25 * min(errors.values())
    assert errors[None] < max(errors.values())


def test_token_weights_tame_massive_tokens_alone():
    x = torch.cat([white(99, 64), 1000 * white(1, 64, seed=1), torch.zeros(2, 64)])
    weight, energy = token_weights(x), x.square().sum(1)
    middle = energy[:100].median()
    assert torch.equal(weight[energy <= middle], torch.ones_like(weight[energy <= middle]))
    heavy = energy > middle
    torch.testing.assert_close((weight * energy)[heavy], middle.expand(int(heavy.sum())))
    torch.testing.assert_close(token_weights(1e-3 * x), weight)
    assert torch.equal(token_weights(torch.zeros(3, 64)), torch.ones(3))
    assert token_weights(x[:0]).shape == (0,)


def massive(tokens: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ordinary tokens, and the same with every 64th in one direction and 300 times as large."""
    x = correlated(tokens, channels, seed)
    spiked = x.clone()
    spiked[::64] += 300 * white(1, channels, seed=9)
    return x, spiked


def test_massive_tokens_do_not_crowd_out_the_others(monkeypatch):
    """The error on ordinary tokens, with token weights against a plain sum."""
    weight, (_, x) = weights(64, 128), massive(2048, 128)
    unseen, _ = massive(512, 128, seed=3)
    plan = plan_for(weight, x, damping=None)
    weighted = next(quantize_group([weight], [plan], ["layer"], summed(x, plan))).tensor
    monkeypatch.setattr(
        "arc_ao.calibration.input_gram.token_weights", lambda rows: torch.ones(rows.shape[0])
    )
    plain = next(quantize_group([weight], [plan], ["layer"], summed(x, plan))).tensor
    errors = [output_error(weight, tensor, unseen, plan) for tensor in (weighted, plain)]
    assert errors[0] < 0.75 * errors[1]


def summed(x: Tensor, plan) -> Gram:
    gram = Gram(plan)
    gram.add(x)
    return gram


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_blocks": ids(0, 3)},
        {"act_blocks": ids(1, 2)},
        {"channel_order": torch.arange(63, -1, -1, dtype=torch.int32), "weight_blocks": ids(2)},
    ],
    ids=["plain", "weight residual", "activation residual", "sorted"],
)
def test_the_held_error_is_that_of_the_outputs(settings, monkeypatch):
    """Against outputs of the dequantized weight, in parts of some rows too."""
    weight, x = weights(24, 64), correlated(100, 64)
    plan = plan_for(weight, x, **settings)
    tensor = quantize_weight(weight, plan)
    gram = Gram(plan)
    gram.held.split(x)
    kept = gram.held.rows()
    root = token_weights(kept).sqrt().unsqueeze(1)
    met = effective_input(kept, plan)
    if plan.channel_order is not None:
        met = torch.empty_like(met).index_copy_(1, plan.channel_order.long(), met)
    expected = (met * root @ (weight - tensor.dequantize(torch.float32)).T).square().sum().item()
    rows = held_rows(gram, plan)
    assert held_error(weight, tensor, plan, rows) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("arc_ao.methods.held_error.CHUNK_ELEMENTS", 5 * 64)
    assert held_error(weight, tensor, plan, rows) == pytest.approx(expected, rel=1e-4)
    assert gram.held.rows() is None and held_rows(gram, plan) is None  # handed over


def test_the_held_error_counts_copied_channels():
    """The copy of a channel meets the residual of its input, and has an error of its own."""
    weight, x = weights(24, 64), correlated(64, 64)
    plan = plan_for(weight, x, act_channels=ids(*range(16)), mean_error=torch.ones(64))
    tensor, met = quantize_weight(weight, plan), effective_input(x, plan)
    exact = met @ torch.cat([weight, weight[:, :16]], dim=1).T
    expected = (exact - arc_linear(x, tensor)).square().sum().item()
    assert held_error(weight, tensor, plan, met) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tokens", [9, 40, 160, 4096])
@pytest.mark.parametrize("make", [white, correlated])
@pytest.mark.parametrize("damping", [1e-6, None])
def test_never_worse_than_nearest_on_rows_kept_aside(tokens, make, damping):
    """Whatever the data and the damping; which of both it is, the note says."""
    weight, x = weights(32, 64), make(tokens, 64)
    plan = plan_for(weight, x, damping=damping)
    result = next(quantize_group([weight], [plan], ["layer"], summed(x, plan)))
    rows, nearest = held_rows(summed(x, plan), plan), quantize_weight(weight, plan)
    mine, theirs = (held_error(weight, t, plan, rows) for t in (result.tensor, nearest))
    assert mine <= theirs
    assert (result.note.rounding == "nearest") == torch.equal(result.tensor.qdata, nearest.qdata)
    assert result.note.tokens == tokens and result.note.channels == 64


def test_noise_is_rounded_to_nearest_and_structure_by_gptq():
    """White tokens have nothing to teach: fitting 40 of them is harm, which 5 kept aside show."""
    weight, noise, x = weights(32, 64), white(40, 64), correlated(4096, 64)
    kept = []
    for some in (noise, x):
        plan = plan_for(weight, some, damping=1e-6 if some is noise else None)
        kept.append(next(quantize_group([weight], [plan], ["layer"], summed(some, plan))).note)
    assert [note.rounding for note in kept] == ["nearest", "gptq"]
    assert [note.damping for note in kept] == [1e-6, gptq.LITTLE]


def quantized(model: nn.Module, data: list[Tensor], **settings):
    return quantize_(model, ARCConfig(**GPTQ | settings), calibration_data=data, progress=False)


def test_one_warning_says_what_was_done_and_what_to_do():
    with pytest.warns(UserWarning, match=FEW) as caught:
        summary = quantized(tiny_llama(), batches())
    assert len(caught) == 1
    kept = [layer["rounding"] for layer in summary.layers.values()]
    assert 0 < kept.count("gptq") < 15
    text = str(caught[0].message)
    assert "found 0.5 (64 tokens, 128 channels) at model.layers.0.mlp.down_proj" in text
    assert f"{kept.count('nearest')} of 14 linears were rounded to nearest" in text
    assert "Give 20.0 times as many tokens (--calib-tokens)" in text
    assert caught[0].filename == __file__


def test_enough_tokens_are_no_matter():
    """More than ten for each channel: no warning; rounding and damping are in the summary."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = quantized(tiny_llama(), batches(48))
        quantized(tiny_llama(), batches(), rounding="nearest")
        quantized(tiny_llama(), batches(), rounding="nearest", weight_scale="local_hessian")
    layers = summary.layers
    assert {layer["tokens"] for layer in layers.values()} == {48 * 32}
    down = layers["model.layers.0.mlp.down_proj"]
    assert down["damping"] in (damping_for(48 * 32 * 7 // 8, 128), gptq.LITTLE)
    assert [layer["rounding"] for layer in layers.values()].count("gptq") > 10


def test_the_summary_of_nearest_says_so():
    layers = quantized(tiny_llama(), batches(), rounding="nearest").layers
    assert all(
        layer["rounding"] == "nearest" and "damping" not in layer for layer in layers.values()
    )


@pytest.mark.filterwarnings("ignore" + FEW.replace(".*", ":.*"))
def test_a_resumed_call_says_the_same(tmp_path):
    """Notes of finished blocks are taken over with their weights, nothing is rounded again."""
    first, again = tiny_llama(), tiny_llama()
    config = ARCConfig(**GPTQ)
    run = lambda model: quantize_(
        model, config, calibration_data=batches(), progress=False, work_dir=tmp_path
    )
    summary = run(first)
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match=FEW) as caught:
        patch.setattr(hessian, "prepare_rounding", lambda *_: pytest.fail("worked"))
        assert run(again).layers == summary.layers
    assert len(caught) == 1
    assert_same_tensors(first, again)


def test_the_three_steps_and_the_graph_warn_and_decide_too(monkeypatch):
    """Damping by tokens, rows kept aside and one warning without the numbers of a decision."""
    config = ARCConfig(**GPTQ | {"budget": 0.0})
    data = white(96, 64).bfloat16().split(48)
    pair = lambda: NormedPair().bfloat16().requires_grad_(False)
    dampings = []
    monkeypatch.setattr(hessian, "prepare_rounding", lambda *args: noted(dampings, *args))
    steps = pair()
    quantize_(steps, config.with_step("prepare"))
    for batch in data:
        steps(batch)
    with pytest.warns(UserWarning, match=FEW) as caught:
        quantize_(steps, config.with_step("convert"), progress=False)
    assert len(caught) == 1 and "linears are rounded to nearest" in str(caught[0].message)
    graph = arc_ao.prepare_arc(torch.export.export(pair(), (data[0],)), config)
    for batch in data:
        graph(batch)
    with pytest.warns(UserWarning, match=FEW) as caught:
        arc_ao.convert_arc(graph)
    assert len([w for w in caught if "expected at least 10" in str(w.message)]) == 1
    assert len(dampings) == 4
    assert set(dampings) <= {damping_for(84, 64), damping_for(84, 96), gptq.LITTLE}


def noted(found: list[float], *args):
    rounding = prepare_rounding(*args)
    found.append(rounding.damping)
    return rounding


def test_a_warning_only_where_it_is_due():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_tokens({"a": RoundingNote("gptq", 0.1, 640, 64)})
        warn_of_few_tokens({})
    with pytest.warns(UserWarning, match="found 0.0 .0 tokens, 64 channels. at b and fewer"):
        warn_of_few_tokens(
            {"a": RoundingNote("gptq", 0.1, 640, 64), "b": RoundingNote("gptq", 1.0, 0, 64)}
        )


def test_the_sum_is_that_of_all_columns(monkeypatch):
    """Groups of columns, of which those below the diagonal are mirrored."""
    x = correlated(60, 80)
    whole = InputGram()
    whole.add(x)
    monkeypatch.setattr("arc_ao.calibration.input_gram.COLUMNS", 32)
    parts = InputGram()
    parts.add(x)
    torch.testing.assert_close(parts.take(), whole.take())
