"""One linear under training: its forward is the quantized one, its gradients pass rounding by."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_ao import ARCConfig, quantize_
from arc_ao.formats import nvfp4
from arc_ao.formats.rotation import rotate
from arc_ao.methods.tuning import latent
from arc_ao.methods.tuning.grid import MARGIN, round_to_grid, start_latent
from arc_ao.methods.tuning.latent import RANK
from arc_ao.methods.tuning.layer import InputCache, TunedForward, TunedWeight
from arc_ao.methods.tuning.parameters import Trainables, bytes_per_weight
from arc_ao.ops import quant_augment
from arc_ao.tensor import ARCTensor

# Both kinds of residuals in each; channels are sorted, copied, rotated, scaled, beside a branch.
CONFIGS = {
    "blocks": {"num_act_channels": 32, "num_weight_channels": 32},
    "sorted": {"num_act_channels": 32, "num_weight_channels": 32, "channel_order": "amax"},
    "copies": {"num_act_channels": 32, "num_weight_channels": 32, "granularity": "channel"},
    "weights": {"num_weight_channels": 32, "activation": "bf16"},
    "static": {"num_act_channels": 16, "activation_scale": "static"},
    "rotated": {"num_act_channels": 16, "num_weight_channels": 16, "rotation": 16},
    "branch": {"num_weight_channels": 16, "smooth": "search", "rank": 8},
}
RAGGED = {"num_act_channels": 16, "num_weight_channels": 16, "pad_in_features": True}


def linear(config: dict, in_features: int = 96, dtype=torch.float32):
    """A quantized linear, its original weight, and rows of input."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(in_features, 80).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(80, in_features, generator=generator) / 10)
        module.bias.copy_(torch.randn(80, generator=generator))
    sizes = torch.exp(torch.randn(in_features, generator=generator))
    x = (torch.randn(24, in_features, generator=generator) * sizes).to(dtype)
    original = module.weight.detach().clone()
    config = ARCConfig(recipe="balanced", **config)
    quantize_(nn.Sequential(module), config, calibration_data=[x], progress=False)
    return module, original, x


CASES = [*((name, config, 96) for name, config in CONFIGS.items()), ("ragged", RAGGED, 88)]


def test_rounding_is_that_of_the_format():
    """Every tie and its neighbours, subnormals, zeros and what saturates."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 1e-40, 0.0])
    around = torch.cat((ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(-ties - 9)))
    u = torch.cat((around, -around, torch.linspace(-8, 8, 4001)))
    assert torch.equal(round_to_grid(u), nvfp4.decode_e2m1(nvfp4.encode_e2m1(u)))
    assert round_to_grid(torch.tensor([2.5, 5.0, 1.25])).tolist() == [2.0, 4.0, 1.0]


def test_latents_start_in_their_cells_on_the_originals_side():
    """Every code against every target: the code stays, and the latent is next to the target."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(301)
    target = torch.linspace(-7, 7, 301).repeat(16)
    values = nvfp4.decode_e2m1(codes)
    latent = start_latent(values, target)
    assert torch.equal(round_to_grid(latent), values)
    assert ((latent - target).abs() <= (values - target).abs()).all()
    inside = round_to_grid(values + (target - values) / (1 - MARGIN)) == values
    inside &= target.abs() < 6
    assert inside.sum() > 200 and torch.equal(latent[inside], target[inside])


@pytest.mark.parametrize(("name", "config", "in_features"), CASES)
def test_forward_is_the_quantized_linear(name, config, in_features):
    """To the rounding of fp32 sums, and the codes are those it began with."""
    module, original, x = linear(config, in_features)
    weight = TunedWeight(module.weight.data, original)
    weight.refresh()
    y = TunedForward(weight, module.bias, InputCache())(x)
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)
    finished = weight.finished(weight.codes())
    assert finished.weight_layout == module.weight.weight_layout
    assert torch.equal(finished.dequantize(), module.weight.dequantize())


def test_forward_in_bf16_is_the_quantized_linear_to_one_rounding():
    module, original, x = linear(CONFIGS["sorted"], dtype=torch.bfloat16)
    y = TunedForward(TunedWeight(module.weight.data, original), module.bias, InputCache())(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, module(x), rtol=2e-2, atol=3e-2)


def moved(weight: TunedWeight, size: float) -> TunedWeight:
    """Factors other than those at the start: B of normal values times `size`, then refreshed."""
    with torch.no_grad():
        weight.latent.right.normal_(generator=torch.Generator().manual_seed(2)).mul_(size)
    weight.refresh()
    return weight


def latent_of(weight: TunedWeight, left: Tensor, right: Tensor) -> Tensor:
    """u by its formula, differentiable, [N, T]."""
    scale = nvfp4.decode_e4m3(weight.scale)
    ratio = ((scale**2).mean().sqrt() / scale).clamp(max=4)
    return weight.latent.start + ratio.repeat_interleave(16, dim=1) * (left @ right)


class Explicit:
    """The same linear of plain operations: x + (Q(x) - x).detach(), stored part by stored part."""

    def __init__(self, tensor: ARCTensor) -> None:
        self.tensor = tensor.to_layout("plain")
        codes = nvfp4.decode_e2m1(nvfp4.unpack(self.tensor.qdata))
        self.codes = nvfp4.to_blocks(codes).clone()  # [N, stored, 16]
        self.scale = nvfp4.decode_e4m3(self.tensor.scale).unsqueeze(-1) * self.tensor.outer_scale
        fine, base = tensor.weight_blocks.tolist(), tensor.base_blocks
        stored = self.codes.shape[1]
        self.trained = [b for b in range(base) if b not in fine]
        self.trained += range(stored - len(fine), stored)  # their base codes are not trained

    def __call__(self, x: Tensor, latent: Tensor, bias: Tensor) -> Tensor:
        tensor = self.tensor
        u = nvfp4.to_blocks(latent)
        u = u + (round_to_grid(u.detach()) - u).detach()
        weight = self.codes.index_copy(1, torch.tensor(self.trained), u) * self.scale
        z = x if tensor.input_scale is None else x * tensor.input_scale
        z = z if tensor.rotation is None else rotate(z, tensor.rotation)
        y = self.inputs(z).flatten(1) @ weight.flatten(1).t() + bias
        return y if tensor.down is None else y + x @ (tensor.up.float() @ tensor.down.float()).t()

    def inputs(self, z: Tensor) -> Tensor:
        """What every stored block meets, [M, stored, 16]; corrections of x are constants."""
        tensor = self.tensor
        ordered = z if tensor.channel_order is None else z[:, tensor.channel_order.long()]
        ordered = nvfp4.to_blocks(ordered)
        if not tensor.quantizes_input:
            return torch.cat((ordered, ordered[:, tensor.weight_blocks.long()]), dim=1)
        qdata, scale, outer = quant_augment(
            z.detach(),
            tensor.act_blocks,
            tensor.weight_blocks[:0],
            tensor.act_outer_scale,
            tensor.activation_scale,
            channel_order=tensor.channel_order,
            act_channels=tensor.act_channels,
        )
        values = nvfp4.to_blocks(nvfp4.decode(qdata, scale) * outer.unsqueeze(1))
        base, added = tensor.base_blocks, tensor.act_blocks.shape[0]
        rounded = ordered + (values[:, :base] - ordered).detach()
        repeated = rounded[:, tensor.weight_blocks.long()]
        main = rounded.index_add(1, tensor.act_blocks, values[:, base : base + added])
        return torch.cat((main, values[:, base + added :], repeated), dim=1)


@pytest.mark.parametrize(("name", "config", "in_features"), CASES)
def test_gradients_are_those_of_straight_through_rounding(name, config, in_features):
    """Of x and of both factors, against autograd on the parts written out; blocks on both sides of
    the limit of their step."""
    module, original, x = linear(config, in_features)
    weight = moved(TunedWeight(module.weight.data, original), 0.1)
    parts = [p.detach().clone().requires_grad_() for p in weight.parameters.values()]
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = torch.randn(24, 80, generator=torch.Generator().manual_seed(1))
    y = TunedForward(weight, module.bias, InputCache())(x)
    (y * out).sum().backward()
    expected = Explicit(module.weight.data)(other, latent_of(weight, *parts), module.bias)
    (expected * out).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    for own, part in zip(weight.parameters.values(), parts, strict=True):
        torch.testing.assert_close(own.grad, part.grad, rtol=1e-4, atol=1e-4)
        assert part.grad.abs().max() > 0.1
    small = nvfp4.decode_e4m3(weight.scale) * 4 < weight.latent.unit
    assert not small.all() and (small.any() or module.weight.num_weight_channels == 0)


def test_training_starts_at_the_codes_in_directions_of_its_own():
    """Whatever A is: B is 0. A has entries of variance 1 / R and depends on the seed alone."""
    module, original, _ = linear(CONFIGS["sorted"])
    first, same, other = (TunedWeight(module.weight.data, original, seed) for seed in (3, 3, 4))
    start = first.latent
    assert torch.equal(start.rows(slice(None)), start.start) and not start.right.any()
    before = first.values.clone()
    first.refresh()
    assert torch.equal(first.values, before)
    assert torch.equal(start.left, same.latent.left)
    assert not torch.equal(start.left, other.latent.left)
    assert start.left.square().mean().item() == pytest.approx(1 / RANK, rel=0.1)


def test_chunks_change_nothing(monkeypatch):
    """Rows made and gradients summed a few at a time, the last chunk a short one."""
    module, original, _ = linear(CONFIGS["blocks"])
    weight = moved(TunedWeight(module.weight.data, original), 0.5)
    of_weight = torch.randn(weight.latent.start.shape, generator=torch.Generator().manual_seed(1))
    values, codes = weight.values.clone(), weight.codes()
    expected = weight.latent.gradients(of_weight)
    monkeypatch.setattr(latent, "CHUNK_ELEMENTS", 7 * of_weight.shape[1])
    assert len(weight.latent.chunks()) == 12
    weight.refresh()
    assert torch.equal(weight.values, values) and torch.equal(weight.codes(), codes)
    for found, whole in zip(weight.latent.gradients(of_weight), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_of_a_weight_is_what_is_held(dtype):
    """After a step, with the codes of the best and of a new best, for a linear of 576 channels."""
    module = nn.Linear(576, 576, bias=False).to(dtype)
    x = torch.randn(32, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    config = ARCConfig(recipe="balanced", num_act_channels=32, num_weight_channels=32)
    quantize_(nn.Sequential(module), config, calibration_data=[x], progress=False)
    trained = Trainables({"linear": TunedWeight(module.weight.data)}, {})
    weight, (optimizer,) = trained.weights["linear"], trained.optimizers.values()
    for parameter in weight.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    held = [v for owner in (weight, weight.latent) for v in vars(owner).values()]
    held += [v for state in optimizer.state.values() for v in state.values()]
    held += [*trained.finished().values(), *trained.finished().values()]
    tensors = [v for v in held if isinstance(v, Tensor) and not isinstance(v, ARCTensor)]
    bytes_held = {(t.data_ptr(), t.nbytes) for t in tensors}
    found = sum(size for _, size in bytes_held) / (576 * 576)
    assert bytes_per_weight(dtype) - 0.5 < found <= bytes_per_weight(dtype)


def test_changed_codes_are_what_the_finished_tensor_multiplies_with():
    """Latents moved far: forward, finished tensor and its kernels agree."""
    module, original, x = linear(CONFIGS["copies"])
    weight = moved(TunedWeight(module.weight.data, original), 1.0)
    assert weight.latent.rows(slice(None)).abs().max() > 7  # saturates
    finished = weight.finished(weight.codes())
    y = TunedForward(weight, module.bias, InputCache())(x)
    assert (y - module(x)).abs().max() > 0.5
    torch.testing.assert_close(F.linear(x, finished, module.bias), y, rtol=1e-5, atol=1e-5)
    untouched = ("scale", "outer_scale", "act_blocks", "weight_blocks", "act_channels")
    assert all(torch.equal(getattr(finished, n), getattr(module.weight, n)) for n in untouched)


def test_linears_with_one_input_quantize_it_once(monkeypatch):
    """q, k and v share; another input, or the same one changed in place, does not."""
    module, original, x = linear(CONFIGS["blocks"])
    calls, effective = itertools.count(), TunedWeight.effective_input
    monkeypatch.setattr(
        TunedWeight, "effective_input", lambda self, x: (next(calls), effective(self, x))[1]
    )
    weight, cache = TunedWeight(module.weight.data, original), InputCache()
    first, second = TunedForward(weight, None, cache), TunedForward(weight, None, cache)
    assert torch.equal(first(x), second(x)) and next(calls) == 1
    x.mul_(2)
    second(x)
    second(x.clone())
    assert next(calls) == 4
