"""Gradients of quantized linears: those of the dequantized weight, rounding of x let through."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_tensor import VARIANTS, K, N, inputs, linear, make_weight, quantized
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arc_ao import ARCConfig, ARCTensor, quantize_

RECIPES = {
    "both residuals": {"budget": 0.3},
    "sorted, static": {"budget": 0.3, "channel_order": "amax", "activation_scale": "static"},
    "smoothed, branch": {"budget": 0.3, "smooth": "search", "rank": 8},
    "rotated": {"budget": 0.0, "rotation": 16},
    "weights alone": {"budget": 0.3, "activation": "bf16"},
}


def cosine(left: Tensor, right: Tensor) -> float:
    return F.cosine_similarity(left.double().flatten(), right.double().flatten(), 0).item()


def dequantized(model: nn.Module) -> nn.Module:
    """A copy whose quantized weights are plain frozen parameters of the same values."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(getattr(module, "weight", None), ARCTensor):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return plain


def gradients(module: nn.Module, x: Tensor, of_y: Tensor) -> tuple[Tensor, ...]:
    """Of x and of what trains in `module`."""
    x = x.detach().requires_grad_()
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(module(x), (x, *trained), of_y)


def output_gradient(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).bfloat16()


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def pair(request) -> nn.Module:
    return make_pair(**request.param)


def make_pair(**options) -> nn.Module:
    """Two quantized linears in bf16, the biases of which train."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).bfloat16()
    config = ARCConfig(recipe="balanced", **options)
    quantize_(model, config, calibration_data=[torch.randn(256, 64).bfloat16()], progress=False)
    return model


def test_gradients_are_those_of_the_dequantized_weight(pair):
    """Of one linear to the rounding of a product; of two in a row in direction."""
    x, of_y = torch.randn(2, 7, 64).bfloat16(), output_gradient(2, 7, 32)
    plain = dequantized(pair)
    last = (torch.randn(2, 7, 96).bfloat16(), of_y)
    for ours, theirs in zip(gradients(pair[2], *last), gradients(plain[2], *last), strict=True):
        torch.testing.assert_close(ours, theirs)
    found, expected = gradients(pair, x, of_y), gradients(plain, x, of_y)
    assert [g.shape for g in found] == [x.shape, pair[0].bias.shape, pair[2].bias.shape]
    assert min(map(cosine, found, expected)) > 0.99


def test_compiled_gradients_are_those_of_eager(pair):
    assert_compiles_alike(pair, "aot_eager")


def test_backend_arc_compiles_forward_and_backward():
    assert_compiles_alike(make_pair(budget=0.3), "arc")


def assert_compiles_alike(pair: nn.Module, backend: str) -> None:
    """In one graph, by direction: a fused GELU rounds otherwise."""
    torch._dynamo.reset()
    x, of_y = torch.randn(7, 64).bfloat16(), output_gradient(7, 32)
    found = gradients(torch.compile(pair, backend=backend, fullgraph=True), x, of_y)
    assert min(map(cosine, found, gradients(pair, x, of_y))) > 0.999


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_layouts_have_one_gradient(variant):
    plain = linear(quantized(make_weight(), **variant))
    expected = gradients(plain, inputs(), output_gradient(5, N))
    for layout in ("panels", "swizzled"):
        packed = linear(plain.weight.data.to_layout(layout))
        found = gradients(packed, inputs(), output_gradient(5, N))
        assert all(map(torch.equal, found, expected)), layout


def test_a_frozen_weight_stays_frozen():
    """Whatever asks for its gradient: an optimizer would wait for it in vain."""
    module = linear(quantized(make_weight())).requires_grad_(True)
    module.weight.requires_grad = True
    assert not module.weight.requires_grad and module.bias.requires_grad
    assert not nn.Parameter(module.weight.data).requires_grad
    module(inputs()).float().sum().backward()
    assert module.weight.grad is None and module.bias.grad is not None


def test_nothing_is_kept_of_a_forward():
    """Neither without gradients nor, but for the weight itself, with them."""
    module, kept = linear(quantized(make_weight())), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert module(inputs().requires_grad_()).grad_fn is None
        module(inputs().requires_grad_()).sum().backward()
    assert not kept
    module.requires_grad_(False)
    assert module(inputs()).grad_fn is None


def test_a_model_with_a_live_graph_can_be_moved_and_cast():
    module = linear(quantized(make_weight()))
    y = module(inputs().requires_grad_())
    assert module.float().weight.dtype == torch.float32
    y.sum().backward()


def test_checkpointing_accumulation_and_vmap_keep_the_gradient():
    module, x, of_y = linear(quantized(make_weight())), inputs(6), output_gradient(6, N)
    expected, *_ = gradients(module, x, of_y)
    checkpointed = lambda x: checkpoint(module, x, use_reentrant=False)
    asking = x.clone().requires_grad_()
    for rows in (slice(2), slice(2, None)):
        checkpointed(asking[rows]).backward(of_y[rows])
    torch.testing.assert_close(asking.grad, expected)
    assert torch.equal(torch.vmap(module)(x.view(2, 3, K)), module(x).view(2, 3, N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_as_nn_linear_does(pair, dtype):
    model, x = copy.deepcopy(pair).float(), torch.randn(3, 64)
    plain = dequantized(model)
    with torch.autocast("cpu", dtype):
        y, expected = model[0](x), plain[0](x)
        found = gradients(model, x, torch.ones(3, 32, dtype=dtype))
    assert y.dtype == expected.dtype == dtype
    assert found[0].dtype == torch.float32 and found[0].any()
    assert torch.equal(y, pair[0].to(dtype)(x.to(dtype)))


class AdaptedLinear(nn.Module):
    """A linear and, beside it, LoRA: two small linears, the second of which begins at zero."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


def adapted(model: nn.Module) -> nn.Module:
    """`model`, frozen, with an adapter beside every linear of its blocks."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AdaptedLinear(module))
    return model


def losses(model: nn.Module, tokens: Tensor, steps: int) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


TOKENS = torch.arange(97, 129).repeat(4, 1)  # there is something to learn: each token's next


@pytest.fixture(scope="module")
def quantized_llama() -> nn.Module:
    model = tiny_llama()
    quantize_(model, ARCConfig(recipe="balanced"), calibration_data=[TOKENS], progress=False)
    return model


def test_adapters_have_the_gradients_of_the_dequantized_model(quantized_llama):
    """All together, through every block from the last to the first."""
    found, expected = (
        adapter_gradients(copy.deepcopy(quantized_llama)),
        adapter_gradients(dequantized(quantized_llama)),
    )
    assert cosine(torch.cat(found), torch.cat(expected)) >= 0.99
    assert min(map(cosine, found, expected)) > 0.9


def adapter_gradients(model: nn.Module) -> list[Tensor]:
    """Of every adapter's matrices, at one batch, with adapters that do something already."""
    adapted(model)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            nn.init.normal_(module.lora_B.weight, std=0.02)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return [p.grad.flatten() for p in model.parameters() if p.requires_grad]


def test_lora_trains_as_on_the_dequantized_model(quantized_llama):
    """After 50 steps the loss has fallen to the same value, to 1 %: rounding of activations in the
    forward is all that differs."""
    ours = losses(adapted(copy.deepcopy(quantized_llama)), TOKENS, 50)
    theirs = losses(adapted(dequantized(quantized_llama)), TOKENS, 50)
    print(f"loss {ours[0]:.4f} -> {ours[-1]:.4f}, dequantized {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    assert theirs[-1] < theirs[0] - 1 and abs(ours[-1] - theirs[-1]) < 0.01 * theirs[-1]


def test_a_compiled_training_step_trains_alike():
    torch._dynamo.reset()
    pair = make_pair(budget=0.3).float().requires_grad_(False)
    model = nn.Sequential(AdaptedLinear(pair[0]), nn.GELU(), AdaptedLinear(pair[2]))
    x, y = torch.randn(16, 64), torch.randn(16, 32)

    def train(model: nn.Module, forward) -> list[float]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        found = []
        for _ in range(10):
            loss = F.mse_loss(forward(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    eager, other = train(copied := copy.deepcopy(model), copied), copy.deepcopy(model)
    compiled = train(other, torch.compile(other, backend="aot_eager", fullgraph=True))
    assert eager[-1] < 0.95 * eager[0]
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager))
