"""The compiler flows on what is no decoder: a BERT encoder (bias, GELU), a vision transformer."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import arc_ao
from arc_ao.passes import backend

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = arc_ao.ARCConfig(recipe="balanced", budget=0.2)


class Hidden(nn.Module):
    """First input -> last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


def bert() -> tuple[nn.Module, list[Tensor]]:
    config = BertConfig(vocab_size=99, num_attention_heads=4, **SIZES)
    generator = torch.Generator().manual_seed(0)
    return BertModel(config), [torch.randint(99, (2, 24), generator=generator) for _ in range(2)]


def vit() -> tuple[nn.Module, list[Tensor]]:
    config = ViTConfig(image_size=32, patch_size=8, num_attention_heads=4, **SIZES)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(2, 3, 32, 32, generator=generator).bfloat16() for _ in range(2)]
    return ViTModel(config), images


def built(make) -> tuple[Hidden, list[Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, batches = make()
    return Hidden(model.eval().bfloat16()).requires_grad_(False), batches


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield


@pytest.mark.parametrize("make", [bert, vit])
def test_graph_and_eager_quantization_agree(make):
    model, batches = built(make)
    prepared = arc_ao.prepare_arc(torch.export.export(model, (batches[0],)), CONFIG)
    for batch in batches:
        prepared(batch)
    quantized = arc_ao.convert_arc(prepared)
    summary = arc_ao.quantize_(model, CONFIG, calibration_data=batches, progress=False)
    assert len(summary.layers) >= 2 * 6
    for batch in batches:
        assert torch.equal(quantized(batch), model(batch))


@pytest.mark.parametrize("make", [bert, vit])
def test_the_backend_compiles_them_whole_with_the_eager_bits(make):
    """Query, key and value share a quantization; nothing else changes."""
    model, batches = built(make)
    arc_ao.quantize_(model, CONFIG, calibration_data=batches, progress=False)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        compiled = torch.compile(model, backend=backend.arc, fullgraph=True)
        found = compiled(batches[0])
    assert backend.ARC_PASS.applied["share_quantize"] == 2 * SIZES["num_hidden_layers"]
    error = (found - model(batches[0])).float().norm() / found.float().norm()
    assert error < 0.05  # layer norm is not rounded as in eager mode, codes may flip
