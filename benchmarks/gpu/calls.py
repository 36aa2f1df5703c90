"""How the operators may be called on a GPU: in graphs, on streams and devices, on views, on nothing
and on tensors of more than 2^31 elements. Every case returns why it was skipped, or None."""

import torch
from torch import Tensor

from arc_ao.ops import nvfp4_gemm, quant_augment
from benchmarks.gpu.reference import activations, assert_same, assert_within_the_bound, operands

HUGE_BYTES = 24 << 30  # free memory that the cases beyond 2^31 elements take
HUGE_ROWS = (1 << 18) + 1


def _linear(x: Tensor, args: dict) -> Tensor:
    """Quantize x and multiply, as a layer does."""
    act_blocks = args["act_blocks"]
    a = quant_augment(x, act_blocks, act_blocks, None, "token")
    return nvfp4_gemm(*a, *list(args.values())[3:])


def empty_batch(device: torch.device) -> None:
    """M = 0 gives an empty result of the right shape, dtype and device."""
    args = operands(1, 33, 272, device)
    y = _linear(torch.empty(0, 272, dtype=torch.bfloat16, device=device), args)
    assert y.shape == (0, 33) and y.dtype == torch.bfloat16 and y.device.type == device.type


def strided(device: torch.device) -> None:
    """A transposed and a sliced input give the bits of a contiguous one."""
    args, x = operands(1, 33, 272, device), activations(6, 272, torch.bfloat16, device)
    expected = _linear(x, args)
    assert torch.equal(_linear(x.t().contiguous().t(), args), expected)
    assert torch.equal(_linear(torch.cat([x, x], 1)[:, 272:], args), expected)


def repeatable(device: torch.device) -> None:
    """K in parts is summed in a fixed order: the same bits at every call."""
    for rows in (1, 16, 300):
        args, x = operands(1, 257, 4096, device), activations(rows, 4096, torch.bfloat16, device)
        first = _linear(x, args)
        assert all(torch.equal(_linear(x, args), first) for _ in range(3))


def cuda_graph(device: torch.device) -> str | None:
    """A captured layer gives, on new input, the bits of an eager call."""
    if device.type != "cuda":
        return "needs a GPU"
    for rows in (1, 16, 300):
        args = operands(1, 515, 1040, device)
        x = activations(rows, 1040, torch.bfloat16, device)
        _linear(x, args)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = _linear(x, args)
        x.mul_(3).add_(1)
        graph.replay()
        assert torch.equal(y, _linear(x, args)), f"M = {rows}"
    return None


def other_stream(device: torch.device) -> str | None:
    """Work is put on the current stream, behind what is there."""
    if device.type != "cuda":
        return "needs a GPU"
    args, x = operands(1, 515, 4096, device), activations(64, 4096, torch.bfloat16, device)
    expected = _linear(x * 2, args)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # x * 2 is late
        y = _linear(x * 2, args)
    stream.synchronize()
    assert torch.equal(y, expected)
    return None


def second_device(device: torch.device) -> str | None:
    """Tensors of another device than the current one are worked on there."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return "needs two GPUs"
    other = torch.device("cuda", 1)
    expected = _linear(activations(5, 272, torch.bfloat16, device), operands(1, 33, 272, device))
    y = _linear(activations(5, 272, torch.bfloat16, other), operands(1, 33, 272, other))
    assert y.device == other and torch.equal(y.cpu(), expected.cpu())
    return None


def _too_small_for_huge(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    free = torch.cuda.mem_get_info(device)[0]
    if free < HUGE_BYTES:
        return f"needs {HUGE_BYTES >> 30} GiB of free memory, found {free >> 30}"
    return None


def huge_input(device: torch.device) -> str | None:
    """The last rows of x [2^18 + 1, 8208] have the codes that they have alone."""
    if reason := _too_small_for_huge(device):
        return reason
    x = torch.zeros(HUGE_ROWS, 8208, dtype=torch.bfloat16, device=device)
    x[-3:] = activations(3, 8208, torch.bfloat16, device)
    rest = (*(torch.arange(2, device=device).int(),) * 2, None, "token")
    for got, alone in zip(quant_augment(x, *rest), quant_augment(x[-3:], *rest), strict=True):
        assert_same(got[-3:], alone, "last rows")
    return None


def huge_output(device: torch.device) -> str | None:
    """The last rows of y [2^18 + 1, 8200] are what they are alone, up to the order of sums."""
    if reason := _too_small_for_huge(device):
        return reason
    args = operands(3, 8200, 64, device)
    rows = {name: args[name].repeat(HUGE_ROWS // 3 + 1, *[1] * (args[name].dim() - 1))[:HUGE_ROWS]
            for name in ("a", "a_scale", "a_outer")}  # fmt: skip
    y = nvfp4_gemm(**(args | rows))
    last = {name: value[-3:] for name, value in rows.items()}
    assert_within_the_bound(y[-3:], args | last)
    return None


CALLS = {
    "empty batch": empty_batch,
    "strided input": strided,
    "same result twice": repeatable,
    "CUDA graph": cuda_graph,
    "non-default stream": other_stream,
    "second device": second_device,
    "quantize beyond 2^31 elements": huge_input,
    "product beyond 2^31 elements": huge_output,
}
