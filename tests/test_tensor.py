"""ARCTensor: what loaders, savers and serving engines do to a weight keeps its meaning."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchao.prototype.safetensors import safetensors_support

from arc_ao import ARCConfig, ARCTensor
from arc_ao.methods.weights import LayerPlan, analyse_weight, quantize_weight
from arc_ao.ops import nvfp4_gemm, quant_augment

N, K = 24, 64
ORDER = torch.randperm(K, generator=torch.Generator().manual_seed(5)).int()
VARIANTS = {
    "plain": {"act_blocks": [], "weight_blocks": []},
    "blocks": {},
    "sorted": {"channel_order": ORDER},
    "channels": {"act_blocks": [], "act_channels": torch.arange(1, 64, 2, dtype=torch.int32)},
    "static": {"act_outer_scale": torch.tensor([0.002])},
}


def make_weight(in_features: int = K) -> Tensor:
    return torch.randn(N, in_features, generator=torch.Generator().manual_seed(0)).bfloat16()


def quantized(weight: Tensor, act_blocks=(1, 3), weight_blocks=(0, 2), **rest) -> ARCTensor:
    mode = "static" if "act_outer_scale" in rest else "token"
    config = ARCConfig(recipe="balanced", activation_scale=mode).resolve()
    amax = weight.float().abs().amax()
    scale = analyse_weight(weight, amax, config, rest.get("channel_order")).scale
    picked = [torch.tensor(b, dtype=torch.int32) for b in (act_blocks, weight_blocks)]
    return quantize_weight(weight, LayerPlan(config, amax, scale, *picked, **rest))


def inputs(rows: int = 5) -> Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(9)).bfloat16()


BIAS = inputs(1)[0, :N]


def linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(K, N, dtype=torch.bfloat16)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(BIAS.clone())
    return module


def assert_same(left: Tensor, right: Tensor) -> None:
    """Every inner tensor and attribute, bit for bit."""
    assert type(left) is type(right) is ARCTensor and left.dtype == right.dtype
    assert left.__tensor_flatten__() == right.__tensor_flatten__()
    for name in left.__tensor_flatten__()[0]:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    for tensor in (left, right):
        kept = tensor.__tensor_flatten__()[1]
        assert kept == {name: getattr(tensor, name) for name in ARCTensor.tensor_attribute_names}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def tensor(request) -> ARCTensor:
    return quantized(make_weight(), **request.param)


def test_linear_is_the_two_operators(tensor):
    x = inputs(6)
    options = (tensor.act_outer_scale, tensor.activation_scale, tensor.channel_order)
    ids = (tensor.act_blocks, tensor.weight_blocks)
    q = quant_augment(x, *ids, *options, tensor.act_channels)
    b = (tensor.qdata, tensor.scale, tensor.outer_scale, BIAS, torch.bfloat16)
    expected = nvfp4_gemm(*q, *b, act_blocks=tensor.act_blocks, base_blocks=4)
    assert torch.equal(F.linear(x, tensor, BIAS), expected)
    assert torch.equal(linear(tensor)(x.view(2, 3, K)), expected.view(2, 3, N))
    assert torch.equal(linear(tensor)(x[0]), F.linear(x[:1], tensor, BIAS)[0])


@pytest.mark.parametrize("variant, floor_db", [("plain", 17), ("blocks", 19), ("sorted", 19)])
def test_linear_approximates_the_unquantized_one(variant, floor_db):
    """Residuals of half the blocks of each kind are worth more than 2 dB."""
    x, weight = inputs(64), quantized(make_weight(), **VARIANTS[variant])
    exact = x.double() @ make_weight().double().t()
    error = F.linear(x, weight).double() - exact
    assert 10 * torch.log10(exact.square().sum() / error.square().sum()) > floor_db


@pytest.mark.parametrize("order", [None, ORDER])
@pytest.mark.parametrize("in_features", [64, 40])  # a multiple of 16; padded
def test_dequantize_is_in_the_original_order_with_residuals(order, in_features):
    """Channels of weight residual blocks are nearly exact, all others those of plain Q(w)."""
    weight, columns = make_weight(in_features), torch.arange(16, dtype=torch.int32)
    order = None if order is None else order[order < in_features]
    tensor = quantized(weight, channel_order=order, act_channels=columns)
    plain = quantized(weight, act_blocks=(), weight_blocks=(), channel_order=order)
    error, base = ((t.dequantize() - weight).float().abs() for t in (tensor, plain))
    natural = torch.arange(in_features) if order is None else order.long()
    corrected = natural[[*range(0, 16), *range(32, min(48, in_features))]]
    others = [k for k in range(in_features) if k not in corrected]
    assert tensor.dequantize(torch.float32).dtype == torch.float32 and base.mean() < 0.1
    assert error[:, corrected].mean() < 0.2 * base[:, corrected].mean()
    assert torch.equal(error[:, others], base[:, others])


def test_rows_can_be_sliced_split_and_narrowed(tensor):
    """What serving engines do to shard out_features: rows of the weight are rows of the output."""
    y = F.linear(x := inputs(), tensor)
    for rows in (slice(4, 9), slice(None, None, 3), slice(-5, None), slice(7, 7)):
        assert torch.equal(F.linear(x, tensor[rows]), y[:, rows])
    for parts in (tensor.split(10), tensor.chunk(2), tensor.split([10, 14])):
        assert torch.equal(torch.cat([F.linear(x, part) for part in parts], 1), y)
    for whole in (tensor[:, :], tensor.narrow(1, 0, K), tensor.detach()):
        assert_same(whole, tensor)
        assert whole.qdata.data_ptr() == tensor.qdata.data_ptr()
    assert_same(tensor.clone(), tensor)


def test_columns_cannot_be_cut(tensor):
    for columns in (slice(16), slice(16, None), slice(None, None, 2)):
        with pytest.raises(ValueError, match="slicing in_features .* of 64 would cut residual"):
            tensor[:, columns]
    with pytest.raises(ValueError, match="split along in_features is not possible; split rows"):
        tensor.chunk(2, dim=1)


def test_copy_into_rows_as_a_loader_does(tensor):
    """Narrow the parameter, copy a shard into it; shapes and kinds must agree."""
    module = linear(torch.zeros_like(tensor))
    for start in (0, 12):
        module.weight.data.narrow(0, start, 12).copy_(tensor.narrow(0, start, 12))
    assert_same(module.weight.data, tensor)
    with pytest.raises(ValueError, match="expected a weight quantized alike"):
        tensor.clone().copy_(tensor[:4])


def test_dtype_conversion_keeps_the_bytes_and_changes_what_they_stand_for(tensor):
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        converted = tensor.to(dtype)
        assert converted.dtype == converted.orig_dtype == converted.dequantize().dtype == dtype
        assert_same(converted.to(torch.bfloat16), tensor)
    module = linear(tensor).half()
    assert module.weight.dtype == module.bias.dtype == torch.float16
    assert module(inputs().half()).dtype == torch.float16
    assert_same(module.to(torch.bfloat16).weight.data, tensor)
    with pytest.raises(ValueError, match="cannot become torch.int8"):
        tensor.to(torch.int8)


def test_devices_and_empty_copies(tensor):
    meta = linear(tensor).to("meta")
    assert meta.weight.qdata.is_meta and meta.weight.shape == (N, K)
    real = meta.to_empty(device="cpu")
    real.load_state_dict({"weight": tensor, "bias": BIAS})
    assert_same(real.weight.data, tensor)
    assert torch.empty_like(tensor, dtype=torch.float32).dtype == torch.float32
    assert not torch.zeros_like(tensor).dequantize().any()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trips(tensor, assign, tmp_path):
    """torch.save with weights_only=True, load_state_dict either way, deepcopy."""
    module = linear(tensor)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_same(state["weight"], tensor)
    other = linear(torch.zeros_like(tensor))
    other.load_state_dict(state, assign=assign)
    assert_same(other.weight.data, tensor)
    assert_same(copy.deepcopy(module).weight.data, tensor)
    assert torch.equal(other(inputs()), module(inputs()))


def test_what_flatten_returns_is_kept_until_an_attribute_is_set(tensor):
    """Guards ask for it before every call; files know nothing of it."""
    names, attributes = kept = tensor.__tensor_flatten__()
    assert tensor.__tensor_flatten__() is kept
    state = tensor.__getstate__()
    assert set(names) | set(attributes) <= set(state)
    assert set(state) == {*ARCTensor.tensor_attribute_names, *ARCTensor.tensor_data_names} | set(
        ARCTensor.optional_tensor_data_names
    )
    tensor.act_outer_scale, tensor.input_plan = torch.tensor([0.5]), "other"
    names, attributes = tensor.__tensor_flatten__()
    assert "act_outer_scale" in names and attributes["input_plan"] == "other"
    assert "act_outer_scale" in copy.deepcopy(tensor).__tensor_flatten__()[0]


def test_a_compiled_linear_follows_its_weight():
    """Other values need no compilation; other blocks, settings or layouts do."""
    torch._dynamo.reset()
    module, x = linear(quantized(make_weight())).requires_grad_(False), inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, dynamic=False)

    def compilations(weight: Tensor | None = None) -> int:
        before = counter.frame_count
        if weight is not None:
            module.weight = nn.Parameter(weight, requires_grad=False)
        assert torch.equal(compiled(x), module(x))
        return counter.frame_count - before

    assert compilations() == 1 and compilations() == 0
    assert compilations(quantized(make_weight() * 2)) == 0
    blocks = [{"act_blocks": (0, 3)}, {"act_blocks": (1,)}, {"weight_blocks": (3,)}]
    for other in (*blocks, VARIANTS["static"]):
        assert compilations(quantized(make_weight(), **other)) == 1, other
    assert compilations(quantized(make_weight()).to_layout("panels")) == 1
    module.weight.activation_block_scale = "mse"
    assert compilations() == 1


def test_safetensors_round_trip(tensor, tmp_path):
    """Through torchao's flattened form, which transformers reads and writes."""
    data, metadata = safetensors_support.flatten_tensor_state_dict({"layer.weight": tensor})
    save_file(data, tmp_path / "model.safetensors", metadata=metadata)
    loaded = load_file(tmp_path / "model.safetensors")
    state, left = safetensors_support.unflatten_tensor_state_dict(loaded, metadata)
    assert_same(state["layer.weight"], tensor)
    assert not left


@pytest.mark.parametrize("old, method", [(True, "four_over_six"), (False, "amax")])
def test_tensors_from_before_activation_block_scale_load(tensor, tmp_path, old, method):
    """Safetensors metadata and pickles that hold `four_over_six` instead."""
    tensor.activation_block_scale = method
    tensor = tensor.with_input_plan()
    data, metadata = safetensors_support.flatten_tensor_state_dict({"layer.weight": tensor})
    described = json.loads(metadata["layer.weight"])
    del described["_data"]["activation_block_scale"]
    described["_data"]["four_over_six"] = old
    metadata["layer.weight"] = json.dumps(described)
    state, _ = safetensors_support.unflatten_tensor_state_dict(data, metadata)
    assert_same(state["layer.weight"], tensor)
    expected = tensor.clone()
    del tensor.__dict__["activation_block_scale"]
    tensor.__dict__["four_over_six"] = old
    torch.save(tensor, tmp_path / "old.pt")
    loaded = torch.load(tmp_path / "old.pt")
    assert_same(loaded, expected)
    assert not hasattr(loaded, "four_over_six")


def test_sizes_and_repr_by_hand():
    """24 rows of (4 + 2) blocks at 8 + 1 bytes, outer scale 4, four block ids at 4 bytes."""
    tensor = quantized(make_weight())
    assert tensor.nbytes_stored == 24 * 6 * 9 + 4 + 16 == 1316
    assert tensor.bits_per_weight == 8 * 1316 / (24 * 64)
    assert tensor.extra_channels == tensor.num_act_channels + tensor.num_weight_channels == 64
    text = "torch.bfloat16, act_channels=32, weight_channels=32, bits_per_weight=6.85"
    assert repr(tensor) == f"ARCTensor([24, 64], {text})"


def test_misuse_is_refused(tensor):
    with pytest.raises(ValueError, match="x has 32 channels, the weight has in_features 64"):
        F.linear(inputs()[:, :32], tensor)
    with pytest.raises(NotImplementedError, match="only weights are quantized"):
        F.linear(tensor, torch.zeros(8, K))
    with pytest.raises(ValueError, match="takes 0 only, got 1"):
        tensor.fill_(1)
    assert not tensor.fill_(0).dequantize().any()
