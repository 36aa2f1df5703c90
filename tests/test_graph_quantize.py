"""prepare_arc and convert_arc: the bits of quantize_, and what is left alone and why."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, Logits, tiny_llama
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import arc_ao
from arc_ao import ARCConfig, convert_arc, prepare_arc
from arc_ao.passes.export.quantizer import ARCQuantizer

arc = torch.ops.arc
TOKENS = torch.randint(VOCAB_SIZE, (4, 48), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:2], TOKENS[2:]]
CONFIG = ARCConfig(recipe="balanced", budget=0.2)
BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
SHAPES = ({0: BATCH, 1: LENGTH},)


def llama() -> Logits:
    return Logits(tiny_llama().bfloat16()).requires_grad_(False)


def count(gm: torch.fx.GraphModule, operator) -> int:
    return sum(node.target is operator.default for node in gm.graph.nodes)


def converted(model: nn.Module, batches: list, config: ARCConfig = CONFIG, **rest):
    example = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    program = torch.export.export(model, example, **rest)
    prepared = prepare_arc(program, config)
    for batch in batches:
        prepared(*(batch if isinstance(batch, tuple) else (batch,)))
    return convert_arc(prepared)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_order": "amax", "activation_block_scale": "mse"},
        {"granularity": "channel", "exchange_rate": 0.3},
        {"activation_scale": "static"},
    ],
)
def test_the_graph_flow_gives_the_bits_of_the_eager_one(changes):
    """Same blocks, codes and logits; two dynamic dimensions; the result exports again."""
    config = ARCConfig(recipe="balanced", budget=0.2, **changes)
    quantized = converted(llama(), BATCHES, config, dynamic_shapes=SHAPES)
    eager = llama()
    arc_ao.quantize_(eager.model, config, calibration_data=BATCHES, progress=False)
    for ids in (TOKENS, TOKENS[:1, :17], TOKENS[:3, :2]):
        assert torch.equal(quantized(ids), eager(ids))
    assert count(quantized, arc.quant_augment) == 8 and count(quantized, arc.nvfp4_gemm) == 14
    again = torch.export.export(quantized, (TOKENS[:2],), dynamic_shapes=SHAPES).module()
    assert torch.equal(again(TOKENS[:3, :9]), eager(TOKENS[:3, :9]))


def test_old_weights_are_gone_and_the_head_is_kept():
    quantized = converted(llama(), BATCHES)
    names = [name for name, _ in quantized.named_parameters()]
    assert not [name for name in names if "_proj" in name]
    assert [name for name in names if "lm_head" in name]


def test_torchaos_own_functions_with_our_quantizer():
    quantizer = ARCQuantizer(CONFIG)
    prepared = prepare_pt2e(torch.export.export(llama(), (TOKENS,)).module(), quantizer)
    prepared(TOKENS)
    assert list(quantizer.skipped) == ["model.lm_head"]
    direct = convert_pt2e(prepared, fold_quantize=False)
    assert torch.equal(direct(TOKENS), converted(llama(), [TOKENS])(TOKENS))


def mlp(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)
        return nn.Sequential(*layers).to(dtype).requires_grad_(False)


def rows(seed: int = 1, shape: tuple[int, ...] = (24, 64)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", [(24, 64), (2, 3, 8, 64), (64,)])
def test_bias_and_any_number_of_dimensions(shape):
    x, eager = rows(shape=shape), mlp()
    quantized = converted(mlp(), [x])
    arc_ao.quantize_(eager, CONFIG, calibration_data=[x], progress=False)
    assert torch.equal(quantized(x), eager(x)) and quantized(x).shape == eager(x).shape


def test_decomposed_products_with_transposed_parameters():
    """addmm(bias, x, w.t()) and mm(x, w.t()), as run_decompositions leaves them."""
    x = rows()
    program = torch.export.export(mlp(), (x,)).run_decompositions()
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.addmm.default in targets and torch.ops.aten.mm.default in targets
    prepared = prepare_arc(program, CONFIG)
    prepared(x)
    quantized = convert_arc(prepared)
    assert count(quantized, arc.nvfp4_gemm) == 2 and not dict(quantized.named_parameters()).get(
        "0.weight"
    )
    assert torch.equal(quantized(x), converted(mlp(), [x])(x))


def test_a_transposed_weight_that_is_none_stays():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 32).bfloat16(), requires_grad=False)
            self.linear = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ self.weight  # not transposed: rows are channels

    quantized = converted(Product(), [rows()])
    assert count(quantized, arc.nvfp4_gemm) == 1


class Tied(nn.Module):
    """An embedding whose weight is also a linear's, and a linear of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64, dtype=torch.bfloat16).requires_grad_(False)
        self.own = nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
        self.out = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.own(self.embedding(ids)))


def test_tied_weights_are_left_alone_with_a_reason():
    quantizer = ARCQuantizer(CONFIG)
    ids = torch.arange(20)
    prepared = prepare_pt2e(torch.export.export(Tied(), (ids,)).module(), quantizer)
    assert [name for name in quantizer.skipped] and len(quantizer.skipped) == 1
    assert "quantizing would untie them" in next(iter(quantizer.skipped.values()))
    prepared(ids)
    assert count(convert_pt2e(prepared, fold_quantize=False), arc.nvfp4_gemm) == 1


def test_a_filter_chooses_by_name():
    program = torch.export.export(llama(), (TOKENS,))
    prepared = prepare_arc(program, CONFIG, filter_fn=lambda name: "mlp" in name)
    prepared(TOKENS)
    quantized = convert_arc(prepared)
    assert count(quantized, arc.nvfp4_gemm) == 6
    reasons = prepared.meta["arc_skipped"]
    assert reasons["model.model.layers.0.self_attn.q_proj"] == "excluded by filter_fn"


def test_ragged_layers_are_listed_or_padded():
    model = nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 16)).bfloat16().requires_grad_(False)
    x = rows(shape=(8, 40))
    with pytest.warns(UserWarning, match=r"1 linears stay unquantized .* multiple of 16 .*: 0"):
        quantized = converted(model, [x])
    assert count(quantized, arc.nvfp4_gemm) == 1
    padded = converted(model, [x], ARCConfig(recipe="balanced", pad_in_features=True))
    assert count(padded, arc.nvfp4_gemm) == 2


def test_refusals_say_what_is_missing():
    with pytest.raises(ValueError, match="expected linears to quantize, found none; skipped: {}"):
        prepare_arc(torch.export.export(nn.ReLU(), (rows(),)), CONFIG)
    prepared = prepare_arc(torch.export.export(mlp(), (rows(),)), CONFIG)
    with pytest.raises(ValueError, match="0: expected calibration tokens, found none; run the"):
        convert_arc(prepared)
