"""What an error in the output of each linear costs the model: its diagonal Fisher information.

To second order, the divergence of a model's output (KL of logits, 1 - cosine of hidden states) that
an error e [M, N] in the output of one linear causes is

    1/2 sum_{m, n} E[g[m, n]^2] e[m, n]^2          g: gradient of a score of the model's output

where the score's gradient has the divergence's Hessian as its covariance (outputs/score.py): for
logits the log-likelihood of labels sampled from the model. The factors of tokens and of outputs are
kept apart, as K-FAC does (arXiv 1503.05671), here with diagonals only:

    g[m, n]^2 ~ t[m] o[n] / G        t[m] = sum_n g[m, n]^2, o[n] = sum_m g[m, n]^2, G = sum_n o[n]

so that what a channel's error costs is a product of two sums. A batch takes a forward and a
backward pass, and every block one forward more in between: memory is that of one block's
activations and of the hidden states between blocks.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from arc_ao.blocks import checkpointed, find_blocks
from arc_ao.calibration.data import Batch
from arc_ao.calibration.observer import ARCObserver, channel_errors, from_order
from arc_ao.calibration.padding import kept_tokens_of_output, watched
from arc_ao.calibration.session import CalibrationSession, observer_on
from arc_ao.inference import call_model, evaluation_mode, without_cache
from arc_ao.memory import release_memory
from arc_ao.ops.round_columns import TILE_ROWS, tiled
from arc_ao.outputs.divergence import model_output
from arc_ao.outputs.score import score_gradient
from arc_ao.progress import SILENT, Progress

FISHER_TOKENS = 4096  # calibration tokens that are differentiated, at most
SEED = 0  # of the labels: the same call gives the same plans


@dataclass(frozen=True)
class ChannelFisher:
    """What energies and errors of one linear's input channels cost, fp32, in the natural order.

    An error of energy c[n] in column k of the weight, summed with the shares `output`, costs the
    model's output `square[k] * c` nats per token; and the weight's own energy times `error[k]` is
    what quantizing the channel costs.
    """

    square: Tensor  # [K]
    error: Tensor  # [K]
    output: Tensor  # [N], sums to 1


@dataclass
class OutputFisher:
    """Sums for one linear over the tokens m of its input x, fp64; Q_i is plain NVFP4 in order i."""

    token_square: Tensor  # [K], sum of t[m] x[m, k]^2
    token_error: Tensor  # [orders, K], sum of t[m] (x - Q_i(x))[m, k]^2
    output: Tensor  # [N], sum of g[m, n]^2
    count: int = 0  # tokens of the model's output in batches whose inputs were weighed
    # For rounding by Kronecker factors alone (methods/kronecker.py). Of every batch and call in it,
    # in order, fp32 [M]: t, 0 where no gradient arrived. Of 64 outputs each, fp32 [ceil(N/64), 64,
    # 64]: the sum of g^T g. And how many of the gradients g in it are not 0.
    tokens: list[list[Tensor]] = field(default_factory=list)
    products: Tensor | None = None
    rows: int = 0

    def drop_products(self) -> None:
        """Let go what rounding is done with."""
        self.tokens, self.products = [], None

    @property
    def total(self) -> Tensor:
        """G, fp64 []."""
        return self.output.sum()

    def of_order(self, index: int) -> ChannelFisher:
        """The same for one channel order, as divergences per token."""
        per_token = 0.5 / max(1, self.count)
        share = self.output / self.total.clamp(min=torch.finfo(torch.float32).tiny)
        return ChannelFisher(
            (self.token_square * per_token).float(),
            (self.token_error[index] * per_token).float(),
            share.float(),
        )


def measure_fisher(
    model: nn.Module,
    session: CalibrationSession,
    batches: list[Batch | Tensor],
    weighing: list[int] | None = None,
    *,
    kronecker: bool = False,
    progress: Progress = SILENT,
) -> dict[str, OutputFisher] | None:
    """Fisher information at every linear of a calibrated session, by name.

    None, with a warning that says why, where the model cannot be differentiated.

    Args:
        weighing: indices of the batches whose inputs are weighed; None: all.
        kronecker: keep `tokens` and `products` of all batches, too: 4 bytes a token and 256 an
            output. Without, only the batches in `weighing` run.
    """
    for group in session.groups():
        observer = session.observer_of(group)
        observer.statistics(observer.channel_orders[0])  # refuses a layer that saw no token
    measured = {m.module: _Measured(m.module, kronecker) for m in session.members}
    weighing = list(range(len(batches))) if weighing is None else weighing
    running = range(len(batches)) if kronecker else weighing
    try:
        _run(model, measured, [(batches[i], i in weighing) for i in running], progress)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _not_measured(str(error).splitlines()[0])
    found = {m.name: measured[m.module].fisher for m in session.members}
    if not all(torch.isfinite(f.total) for f in found.values()):
        return _not_measured("gradients hold NaN or Inf; use bfloat16 or float32")
    if not any(f.total > 0 for f in found.values()):
        return _not_measured("no gradient reaches any linear")
    return found


def _not_measured(reason: str) -> None:
    warnings.warn(
        f"layers weigh the same in the choice of residuals, and weights are rounded by their "
        f"inputs alone: the model cannot be differentiated ({reason}). "
        "ARCConfig(layer_weights='equal', hessian='inputs') asks for that without this warning",
        stacklevel=4,
    )


def _run(
    model: nn.Module,
    measured: dict[nn.Linear, "_Measured"],
    batches: list[tuple[Batch | Tensor, bool]],
    progress: Progress,
) -> None:
    """Batches, and whether the inputs of each are weighed."""
    generator = torch.Generator().manual_seed(SEED)
    with evaluation_mode(model), frozen(model), without_cache(model), torch.enable_grad():
        for batch, weighing in progress.steps("weigh layers", batches):
            for one in measured.values():
                one.weighing = weighing
            with _watched(model, measured):
                with watched(model):
                    output = call_model(model, batch)
                    kept = kept_tokens_of_output(model_output(output))
                value, gradient, count = score_gradient(output, kept, generator)
                if not value.requires_grad:
                    raise RuntimeError("its output does not depend on the linears differentiably")
                torch.autograd.backward(value, gradient)
            for one in measured.values():
                one.end_batch(count)
            del output, value, gradient
            release_memory()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@dataclass
class _Frame:
    """One call of a block, whose linears' inputs and outputs' gradients meet here.

    Inputs come from the second pass through the block, which the backward pass starts, gradients
    from the backward pass; the last linear's gradient is there before its input.
    """

    inputs: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    numbers: dict[tuple[nn.Module, int], int] = field(default_factory=dict)  # of calls in the batch
    squares: dict[int, "_Squares"] = field(default_factory=dict)  # by id of an input
    recomputing: bool = False  # in the second of the two passes

    def next_call(self, module: nn.Module) -> tuple[nn.Module, int]:
        """A linear is called; which call of it in this pass that is."""
        self.calls[module] = self.calls.get(module, -1) + 1
        return module, self.calls[module]

    def meet(self, key: tuple[nn.Module, int], measured: "_Measured") -> None:
        """Add a call whose input and gradient are both there."""
        if key not in self.inputs or key not in self.gradients:
            return
        x, gradient = self.inputs.pop(key), self.gradients.pop(key)
        squares = self._squares_of(x, key[0]) if measured.weighing else None
        measured.add(squares, gradient, self.numbers[key])
        if not self.inputs:
            self.squares.clear()

    def _squares_of(self, x: Tensor, module: nn.Linear) -> "_Squares":
        squares = self.squares.get(id(x))
        if squares is None:
            squares = self.squares[id(x)] = _Squares.of(x, observer_on(module))
        return squares


@dataclass(frozen=True)
class _Squares:
    """x^2 [M, K] and squared quantization errors [M, K], each in its channel order, fp32."""

    source: Tensor  # kept alive, so that its id stays its own
    square: Tensor
    errors: list[tuple[Tensor, Tensor | None]]  # and the order

    @classmethod
    def of(cls, x: Tensor, observer: ARCObserver) -> "_Squares":
        rows = x.detach().reshape(-1, x.shape[-1])
        return cls(x, rows.float().square(), channel_errors(rows, observer.orders()))


class _Measured:
    """Sums for one linear, filled by the gradients of its outputs."""

    def __init__(self, module: nn.Linear, kronecker: bool) -> None:
        observer = observer_on(module)
        self.module, self.kronecker, self.weighing = module, kronecker, True
        self.calls: list[Tensor] = []  # token factors of the batch's calls, 0 until they arrive
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=module.weight.device)
        self.fisher = OutputFisher(
            zeros(module.in_features),
            zeros(len(observer.channel_orders), module.in_features),
            zeros(module.out_features),
        )
        if kronecker:
            tiles = -(-module.out_features // TILE_ROWS)
            self.fisher.products = zeros(tiles, TILE_ROWS, TILE_ROWS).float()

    def begin_call(self, output: Tensor) -> int:
        """The linear is called and gives output [*, N]; the number of the call in this batch."""
        rows = output.shape[:-1].numel()
        self.calls.append(torch.zeros(rows if self.kronecker else 0, device=output.device))
        return len(self.calls) - 1

    @torch.no_grad()
    def add(self, squares: _Squares | None, gradient: Tensor, call: int) -> None:
        """Add one call of the linear, with the squares of its input if that is weighed."""
        g = gradient.reshape(-1, gradient.shape[-1]).float()  # [M, N]
        g2 = g.square()
        by_token = g2.sum(1)
        self.fisher.output += g2.sum(0)
        if squares is not None:
            self.fisher.token_square += by_token @ squares.square
            for total, (error, order) in zip(self.fisher.token_error, squares.errors, strict=True):
                total += from_order(by_token @ error, order)
        if self.kronecker:
            self.calls[call] = by_token
            tiles = tiled(g).movedim(1, 0)  # [T, M, 64]
            self.fisher.products.baddbmm_(tiles.mT, tiles)

    def end_batch(self, count: int) -> None:
        """All gradients of a batch of so many tokens have arrived."""
        self.fisher.count += count if self.weighing else 0
        if self.kronecker:
            self.fisher.tokens.append(self.calls)
            self.fisher.rows += sum(int(call.count_nonzero()) for call in self.calls)
        self.calls = []


class _Begin(torch.autograd.Function):
    """A copy. Keeps a tensor of no elements, and asks for it in the backward pass: a checkpointed
    block runs again for that, even if nothing in it keeps anything (x + linear(x))."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.save_for_backward(output.new_empty(0))
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradient


@contextmanager
def _watched(model: nn.Module, measured: dict[nn.Linear, _Measured]) -> Iterator[None]:
    """Inside, blocks are checkpointed, and gradients of outputs arrive at `measured`."""
    frames = [_Frame()]  # of linears outside of the blocks; then of the block that runs

    def see(module: nn.Linear, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        frame, one = frames[-1], measured[module]
        key = frame.next_call(module)
        if not frame.recomputing:
            frame.numbers[key] = one.begin_call(output)
        if not output.requires_grad:  # the graph begins here
            output = _Begin.apply(output.detach().requires_grad_())
        if frame.recomputing or frame is frames[0]:
            frame.inputs[key] = args[0] if args else kwargs["input"]
            frame.meet(key, one)
        if not frame.recomputing:
            output.register_hook(lambda gradient: arrived(frame, key, gradient, one))
        return output

    def arrived(frame: _Frame, key: tuple, gradient: Tensor, one: _Measured) -> None:
        frame.gradients[key] = gradient
        frame.meet(key, one)

    with ExitStack() as stack:
        stack.enter_context(set_checkpoint_early_stop(False))
        for block in find_blocks(model, list(measured)):
            stack.enter_context(checkpointed(block, lambda run: _twice(run, frames)))
        for module in measured:
            handle = module.register_forward_hook(see, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _twice(original: Callable, frames: list[_Frame]) -> Callable:
    """What one call of a block runs, now and in the backward pass: its forward, in its frame."""
    frame = _Frame()

    def run(*args: Any, **kwargs: Any) -> Any:
        frame.calls.clear()
        frames.append(frame)
        try:
            return original(*args, **kwargs)
        finally:
            frames.pop()
            frame.recomputing = True

    return run
