"""Functions that read a quantized weight get its values; those that would change it are refused."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.multiprocessing
from test_tensor import VARIANTS, K, N, assert_same, inputs, linear, make_weight, quantized
from tiny_models import tiny_llama
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from arc_ao import ARCConfig, ARCTensor, NVFP4Config, quantize_

READS = {
    "isnan": lambda w: w.isnan(),
    "norm": lambda w: w.norm(),
    "sum over rows": lambda w: w.sum(1),
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "view": lambda w: w.view(-1),
    "row": lambda w: w[3],
    "element": lambda w: w[3, 5],
    "rows by index": lambda w: w[[1, 4]],
    "comparison": lambda w: w > 0,
    "arithmetic": lambda w: 2 * w - 1,
    "product": lambda w: inputs() @ w.t(),
    "norms": lambda w: torch._foreach_norm([w, w])[1],
    "total norm": lambda w: nn.utils.get_total_norm([w]),
    "vector": lambda w: nn.utils.parameters_to_vector([w]),
    "bool": lambda w: torch.tensor(torch.equal(w, w)),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def weight(request) -> ARCTensor:
    return quantized(make_weight(), **request.param)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_a_weight_reads_its_values(read):
    parameter = linear(quantized(make_weight())).weight
    found, expected = read(parameter), read(parameter.dequantize())
    assert type(found) is Tensor and torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(read(parameter), expected)


def test_equal_compares_values(weight):
    assert torch.equal(weight, weight.clone()) and torch.equal(weight, weight.dequantize())
    assert torch.equal(weight, weight.to_layout("panels"))
    assert not torch.equal(weight, torch.zeros_like(weight))


def test_averages_over_parameters_keep_equal_weights(weight):
    """Stochastic weight averaging and an exponential moving average over a frozen model."""
    module = linear(weight)
    for average in (None, get_ema_multi_avg_fn(0.9)):
        averaged = AveragedModel(module, multi_avg_fn=average)
        for _ in range(3):
            averaged.update_parameters(module)
        assert_same(averaged.module.weight.data, weight)
    weight.lerp_(weight.clone(), 0.25).copy_(weight.dequantize())
    assert_same(weight, module.weight.data)


CHANGES = {
    "mul_": lambda w: w.mul_(2),
    "add_": lambda w: w.data.add_(torch.ones(N, K)),
    "normal_": lambda w: nn.init.normal_(w),
    "lerp_": lambda w: torch._foreach_lerp_([w], [torch.zeros(N, K).bfloat16()], 0.5),
    "__setitem__": lambda w: w.data.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_a_weight_is_refused_and_leaves_it(name):
    parameter = linear(quantized(make_weight())).weight
    before = parameter.detach().clone()
    with pytest.raises(ValueError, match=f"{name}.*expected to leave ARCTensor.*is frozen"):
        CHANGES[name](parameter)
    assert_same(parameter.data, before)


def test_a_quantized_state_dict_fills_a_float_model(weight):
    """With its values; a float state dict does not fill a quantized model."""
    module, plain = linear(weight), nn.Linear(K, N)
    plain.load_state_dict(module.state_dict())
    assert type(plain.weight) is nn.Parameter
    assert torch.equal(plain.weight, weight.dequantize(torch.float32))
    with pytest.raises(RuntimeError, match="expected a weight quantized alike, got"):
        module.load_state_dict(nn.Linear(K, N).state_dict())


def test_data_can_be_replaced_by_another_quantized_weight(weight):
    """With all that it consists of, as trainers cast and move parameters."""
    module = linear(weight.clone())
    module.weight.data = module.weight.data.to(torch.float32)
    assert module.weight.dtype == module.weight.orig_dtype == torch.float32
    other = quantized(make_weight() * 2, act_blocks=(2,))
    module.weight.data = other
    assert_same(module.weight.data, other)
    with pytest.raises(ValueError, match="expected a quantized weight, got Tensor"):
        module.weight.data = weight.dequantize()


def test_double_is_computed_in_single(weight):
    """And no dtype without a linear is taken for one."""
    module, x = linear(weight).float(), inputs().float()
    double = copy.deepcopy(module).double()
    assert double.weight.dtype == torch.float64
    assert torch.equal(double(x.double()), module(x).double())
    with pytest.raises(ValueError, match="cannot become torch.float8_e4m3fn"):
        weight.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_multiplied_part_by_part(weight, layout):
    module, x = linear(weight), inputs(5)
    nested = torch.nested.as_nested_tensor([x[:2], x[2:]], layout=layout)
    y = torch.cat(module(nested).unbind())
    assert torch.equal(y, torch.cat([module(x[:2]), module(x[2:])]))
    (gradient,) = torch.autograd.grad(module(asking := x.clone().requires_grad_()).sum(), asking)
    parts = [x[:2].clone().requires_grad_(), x[2:].clone().requires_grad_()]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    torch.cat(module(nested).unbind()).sum().backward()
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), gradient)


def test_a_transformer_encoder_takes_a_padding_mask():
    """In evaluation mode PyTorch's encoder drops padding by nesting its input."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 8, 64), torch.arange(8).expand(2, 8) >= torch.tensor([[8], [5]])
    quantize_(encoder, NVFP4Config(), progress=False)
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask)
        alone = encoder(x[1:, :5])
    torch.testing.assert_close(y[1:, :5], alone)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_linears_without_weights_are_left_alone(shape):
    outputs, channels = shape
    empty = nn.Linear(1, 1)
    empty.weight = nn.Parameter(torch.empty(shape))
    empty.in_features, empty.out_features, empty.bias = channels, outputs, None
    model = nn.ModuleList([nn.Linear(64, 64), empty])
    summary = quantize_(model, NVFP4Config(), progress=False)
    assert list(summary.layers) == ["0"] and summary.skipped == {"1": "it has no weights"}
    assert empty(torch.randn(3, channels)).shape == (3, outputs)


def test_no_rows_of_weight_or_input(weight):
    module = linear(weight)
    assert nn.functional.linear(inputs(), module.weight[:0]).shape == (5, 0)
    x = inputs(0).requires_grad_()
    module(x).sum().backward()
    assert x.grad.shape == (0, K) and not module.bias.grad.any()


# The module that holds a quantized weight.


def test_a_quantized_model_is_freed_with_its_last_reference():
    """By reference counting alone."""
    gc.collect()
    gc.disable()
    try:
        model, ids = tiny_llama(), torch.arange(64).view(2, 32)
        quantize_(model, ARCConfig(recipe="balanced"), calibration_data=[ids], progress=False)
        gc.collect()
        linear = weakref.ref(model.model.layers[1].mlp.up_proj)
        codes = weakref.ref(linear().weight.qdata)
        del model
        assert linear() is None and codes() is None
    finally:
        gc.enable()


def test_copies_and_pickles_print_their_own_weight():
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, NVFP4Config(), progress=False)
    text, file = repr(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    assert "weight=ARCTensor([32, 64], torch.float32" in text
    for other in copies:
        assert repr(other) == text
        other[0].weight = nn.Parameter(other[0].weight[:16])
        assert "weight=ARCTensor([16, 64]" in repr(other) and repr(model) == text
    model = None
    assert all("weight=ARCTensor([16, 64]" in repr(other) for other in copies)


def _answer(modules: list[nn.Module], x: Tensor, answers) -> None:
    assert all(module.weight.is_shared() for module in modules)
    answers.put([module(x).tolist() for module in modules])


def test_shared_memory_serves_another_process():
    """Spawned: a forked process inherits OpenMP's pool without its threads, and waits for them."""
    weights, x = [quantized(make_weight(), **variant) for variant in VARIANTS.values()], inputs()
    modules = [linear(weight).requires_grad_(False) for weight in weights]
    for module in modules:
        assert not module.weight.is_shared()
        assert module.share_memory() is module and module.weight.is_shared()
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(modules, x, answers))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    assert answers.get() == [module(x).tolist() for module in modules]


def test_accelerate_offloads_to_memory_and_refuses_the_disk(weight, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(linear(weight)).requires_grad_(False), inputs()
    expected, device = model(x), torch.device("cpu")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=device)
    for _ in range(2):
        assert torch.equal(offloaded(x), expected)
        assert offloaded[0].weight.is_meta and type(offloaded[0].weight) is ARCTensor
    with pytest.raises(ValueError, match="offload it to CPU memory, not to disk"):
        accelerate.disk_offload(model, tmp_path, execution_device=device)
    assert torch.equal(model(x), expected)
