"""activation="bf16" (W4A16): the operator against its formula, and every flow that reaches it."""

import copy

import pytest
import torch
from tiny_models import VOCAB_SIZE, Logits, tiny_llama
from torch import Tensor, nn

import arc_ao
from arc_ao import ARCConfig, ARCTensor
from arc_ao.formats import nvfp4
from arc_ao.loading import empty_tensor, loading_config
from arc_ao.ops import nvfp4_weight_only_gemm
from arc_ao.ops.layout import to_panels

EMPTY = torch.zeros(0, dtype=torch.int32)
BLOCKS = torch.tensor([4, 0], dtype=torch.int32)
TOKENS = torch.randint(VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(0))
UNCALIBRATED = ARCConfig(budget=0.0, recipe="plain", activation="bf16")
CALIBRATED = ARCConfig(budget=0.2, recipe="balanced", activation="bf16")


def operands(rows: int, blocks: Tensor = BLOCKS, dtype: torch.dtype = torch.bfloat16) -> dict:
    """72 channels are 4 blocks and a half; 19 columns; the residuals of two blocks."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(19, 72, generator=generator)
    b, b_scale, outer = nvfp4.quantize(weight)
    rest = nvfp4.to_blocks(weight - nvfp4.dequantize(b, b_scale, outer)[:, :72])
    rest, rest_scale, _ = nvfp4.quantize(
        rest.index_select(1, blocks).flatten(1), amax=outer * nvfp4.NVFP4_MAX
    )
    return {
        "x": torch.randn(rows, 72, generator=generator).to(dtype),
        "b": torch.cat([b, rest], 1),
        "b_scale": torch.cat([b_scale, rest_scale], 1),
        "b_outer": outer.reshape(1),
        "bias": torch.randn(19, generator=generator).to(dtype),
        "weight_blocks": blocks,
    }


def decoded(args: dict) -> Tensor:
    """Q(w) plus its residual, float64 [19, 80]."""
    values = nvfp4.to_blocks(nvfp4.decode(args["b"], args["b_scale"]).double())
    base, rest = values[:, :5].clone(), values[:, 5:]
    base.index_add_(1, args["weight_blocks"], rest)
    return base.flatten(1) * args["b_outer"].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("blocks", [EMPTY, BLOCKS], ids=["plain", "residuals"])
@pytest.mark.parametrize("rows", [1, 7])
def test_product_is_the_float64_one_rounded_once(dtype, blocks, rows):
    """x times the corrected weight, to an ulp of the output dtype and 1e-6 of the sums."""
    args = operands(rows, blocks, dtype)
    x, w = args["x"].double(), decoded(args)[:, :72]
    exact = x @ w.t() + args["bias"].double()
    y = nvfp4_weight_only_gemm(**args)
    allowed = torch.finfo(dtype).eps * exact.abs() + 1e-6 * (x.abs() @ w.abs().t())
    assert y.dtype == dtype and ((y.double() - exact).abs() <= allowed).all()


def test_residuals_bring_the_product_nearer_to_the_weight():
    """Kept blocks are read at their own place, not at another one."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(19, 72, generator=generator)  # the one of `operands`
    every = torch.arange(5, dtype=torch.int32).flip(0)
    plain, fixed = (decoded(operands(7, blocks))[:, :72] for blocks in (EMPTY, every))
    assert (fixed - weight).norm() < 0.2 * (plain - weight).norm()


def test_layouts_strides_and_empty_batches_change_nothing():
    args = operands(6)
    y = nvfp4_weight_only_gemm(**args)
    b, b_scale = to_panels(args["b"], args["b_scale"])
    packed = args | {"b": b, "b_scale": b_scale, "b_layout": "panels"}
    assert torch.equal(nvfp4_weight_only_gemm(**packed), y)
    strided = args | {"x": args["x"].t().contiguous().t().view(6, 72)}
    assert torch.equal(nvfp4_weight_only_gemm(**strided), y)
    assert torch.equal(nvfp4_weight_only_gemm(**args | {"x": args["x"].view(2, 3, 72)}), y)
    assert nvfp4_weight_only_gemm(**args | {"x": args["x"][:0]}).shape == (0, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nvfp4_weight_only_gemm(**args), y)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_token_stays_alone(bad):
    args = operands(3)
    clean = nvfp4_weight_only_gemm(**args)
    args["x"][1, 5] = bad
    y = nvfp4_weight_only_gemm(**args)
    assert not y[1].isfinite().any() and torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("blocks", [EMPTY, BLOCKS], ids=["plain", "residuals"])
def test_opcheck(rows, blocks):
    torch.library.opcheck(nvfp4_weight_only_gemm, tuple(operands(rows, blocks).values()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 72, dtype=torch.int32)}, "x must be bf16, fp16 or fp32"),
        (
            {"x": torch.zeros(2, 90)},
            r"x has 90 channels and 2 residual blocks, so b must be \[N, 6",
        ),
        ({"weight_blocks": EMPTY}, r"and 0 residual blocks, so b must be \[N, 40\]"),
        ({"bias": torch.zeros(1)}, r"bias must be bf16, fp16 or fp32 \[19\], got fp32 \[1\]"),
        ({"b_layout": "rows"}, "b_layout must be one of"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    with pytest.raises(RuntimeError, match="nvfp4_weight_only_gemm: .*" + message):
        nvfp4_weight_only_gemm(**operands(2) | change)


def test_plain_weights_need_no_calibration_and_input_error_is_gone():
    """One call without data; the layer computes with the dequantized weight and x as it is."""
    linear = nn.Linear(64, 24).bfloat16()
    model = nn.Sequential(copy.deepcopy(linear))
    summary = arc_ao.quantize_(model, UNCALIBRATED)
    weight = model[0].weight
    assert isinstance(weight, ARCTensor) and not weight.quantizes_input
    assert weight.weight_layout == "plain" and summary.configs[0]["_data"]["activation"] == "bf16"
    x = torch.randn(2, 3, 64).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).t() + linear.bias.double()
    assert torch.allclose(model(x).double(), exact, rtol=2**-8, atol=1e-6)


def test_a_budget_goes_to_weight_residuals_alone():
    """And the model that they correct is nearer to the original than the plain one and W4A4."""
    original = tiny_llama()
    models = {}
    configs = {
        "w4a4": ARCConfig(budget=0.0, recipe="balanced"),
        "plain": ARCConfig(budget=0.0, recipe="balanced", activation="bf16"),
        "corrected": ARCConfig(budget=1.0, recipe="balanced", activation="bf16"),
    }
    for name, config in configs.items():
        models[name] = copy.deepcopy(original)
        arc_ao.quantize_(models[name], config, calibration_data=[TOKENS], progress=False)
    tensors = [m.weight for m in models["corrected"].modules() if isinstance(m, nn.Linear)]
    tensors = [t for t in tensors if isinstance(t, ARCTensor)]
    assert all(t.num_act_channels == 0 for t in tensors)
    assert sum(t.num_weight_channels for t in tensors) > 0
    expected = original(TOKENS).logits
    error = {name: (m(TOKENS).logits - expected).norm().item() for name, m in models.items()}
    assert error["corrected"] < 0.5 * error["plain"] and error["plain"] < error["w4a4"]


def test_a_compiled_layer_has_no_graph_break():
    """One graph for every number of tokens, with the bits of the eager layer."""
    model = nn.Sequential(nn.Linear(64, 24).bfloat16(), nn.GELU(), nn.Linear(24, 8).bfloat16())
    arc_ao.quantize_(model, ARCConfig(budget=0.0, activation="bf16", pad_in_features=True))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9, 1):
        x = torch.randn(tokens, 64).bfloat16()
        assert torch.equal(compiled(x), model(x))


def test_exported_and_eager_models_agree():
    """Dynamic lengths, and the graph flow's bits are those of the eager flow."""
    eager = Logits(tiny_llama().bfloat16()).requires_grad_(False)
    quantized = copy.deepcopy(eager)
    arc_ao.quantize_(quantized.model, CALIBRATED, calibration_data=[TOKENS], progress=False)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(eager, (TOKENS,), dynamic_shapes=({1: length},))
    prepared = arc_ao.prepare_arc(program, CALIBRATED)
    prepared(TOKENS)
    graph = arc_ao.convert_arc(prepared)
    short = TOKENS[:, :9]
    assert torch.equal(graph(short), quantized(short))
    calls = [
        n for n in graph.graph.nodes if n.target is torch.ops.arc.nvfp4_weight_only_gemm.default
    ]
    assert len(calls) == 14 and "arc.quant_augment" not in str(graph.graph)


def test_checkpoints_recreate_it():
    """The loading config says that activations stay, and makes a weight that copies take."""
    model = nn.Sequential(nn.Linear(64, 24).bfloat16())
    arc_ao.quantize_(
        model, CALIBRATED, calibration_data=[torch.randn(8, 64).bfloat16()], progress=False
    )
    weight = model[0].weight
    config = loading_config(weight)
    assert config.activation == "bf16"
    empty = empty_tensor(nn.Linear(64, 24).bfloat16(), config)
    empty.copy_(weight.detach())
    assert torch.equal(empty.qdata, weight.qdata) and not empty.quantizes_input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"activation": "fp8"}, "activation must be one of"),
        ({"activation_scale": "none"}, "say activation='bf16'"),
        ({"activation": "bf16", "recipe": "paper"}, "expected selection='energy'"),
        ({"activation": "bf16", "num_act_channels": 16}, "num_act_channels must be 0 or None"),
        ({"activation": "bf16", "four_over_six": True}, "block_scale must be 'amax' or None"),
        ({"activation": "bf16", "channel_order": "amax"}, "channel_order must be 'none' or None"),
        ({"activation": "bf16", "exchange_rate": 1.0}, "exchange_rate must be 'inf' or None"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ARCConfig(**fields)
