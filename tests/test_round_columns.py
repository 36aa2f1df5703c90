"""arc::round_columns: its meaning against the objective that it makes small, and every level."""

import pytest
import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import round_columns
from arc_ao.ops.round_columns import TILE_ROWS, round_columns_eager

COLUMNS = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factor(size: int, seed: int, count: int = 1, upper: bool = False) -> Tensor:
    """fp32 [count, size, size]: triangular factors of correlated products."""
    mixed = torch.randn(count, size, size, generator=generator(seed))
    products = mixed @ mixed.mT / size + 0.3 * torch.eye(size)
    if not upper:
        return torch.linalg.cholesky(products)
    return torch.linalg.cholesky(products.flip(1, 2)).flip(1, 2)


def problem(rows: int, fine: bool, outputs: bool) -> list[Tensor | None]:
    values = torch.randn(COLUMNS, rows, generator=generator(1)) * 3
    feedback = torch.randn(COLUMNS, rows, generator=generator(2)) * 0.1
    scale = torch.rand(COLUMNS, rows, generator=generator(3)) + 0.5
    fine_scale = scale / 10
    fine_scale[::3] = 0  # columns without a residual
    tiles = -(-rows // TILE_ROWS)
    return [
        values,
        feedback,
        factor(COLUMNS, 4)[0],
        scale,
        fine_scale if fine else None,
        factor(TILE_ROWS, 5, tiles, upper=True) if outputs else None,
    ]


def value_of(codes: Tensor, fine_codes: Tensor, arguments: list[Tensor | None]) -> Tensor:
    *_, scale, fine, _ = arguments
    value = nvfp4.decode_e2m1(codes) * scale
    return value if fine is None else value + nvfp4.decode_e2m1(fine_codes) * fine


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 64, 100, 192])
def test_bits(level, rows, fine, outputs):
    arguments = problem(rows, fine, outputs)
    for mine, meaning in zip(
        round_columns(*arguments), round_columns_eager(*arguments), strict=True
    ):
        assert torch.equal(mine, meaning)


@pytest.mark.parametrize("special", [0.0, float("inf"), float("nan")])
def test_scales_that_say_nothing(level, special):
    arguments = problem(64, True, True)
    arguments[3][5] = special
    mine, meaning = round_columns(*arguments), round_columns_eager(*arguments)
    assert torch.equal(mine[0], meaning[0]) and torch.equal(mine[1], meaning[1])


def test_columns_without_a_residual_scale_are_rounded_once():
    arguments = problem(64, True, False)
    codes, fine_codes, _ = round_columns(*arguments)
    once = [*arguments]
    once[3], once[4] = arguments[3], None
    value = value_of(codes, fine_codes, arguments)[::3]
    assert torch.equal(value, (nvfp4.decode_e2m1(codes) * arguments[3])[::3])
    assert torch.equal(round_columns(*once)[0][-1], codes[-1])  # the first that is rounded


def loss(errors: Tensor, lower: Tensor, outputs: Tensor | None) -> float:
    """|S^T e R|^2 of errors [C, N], R = L^T reversed: sum over pairs of what the factors say."""
    through = lower.T @ errors  # [C, N]
    if outputs is not None:
        through = torch.einsum("cti,tij->ctj", through.unflatten(1, (-1, TILE_ROWS)), outputs)
    return through.square().sum().item()


@pytest.mark.parametrize("rows", [64, 192])
def test_feedback_makes_the_error_of_correlated_outputs_small(rows):
    """Against rounding to nearest, and against feedback along the inputs alone."""
    values, _, lower, scale, _, outputs = problem(rows, False, True)
    outputs = factor(TILE_ROWS, 6, outputs.shape[0], upper=True)
    nothing, far = torch.zeros_like(values), scale * 2  # a coarse grid
    found = {}
    for name, tiles in (("inputs", None), ("both", outputs)):
        codes, _, _ = round_columns(values, nothing, lower, far, None, tiles)
        left = values - nvfp4.decode_e2m1(codes) * far
        found[name] = loss(left, lower, outputs)
    nearest = nvfp4.decode_e2m1(nvfp4.encode_e2m1(values / far)) * far
    found["nearest"] = loss(values - nearest, lower, outputs)
    assert found["both"] < 0.9 * found["inputs"] < 0.9 * found["nearest"]


def test_what_goes_on_is_the_error_through_the_outputs():
    arguments = problem(64, False, True)
    codes, fine_codes, errors = round_columns(*arguments)
    left = arguments[0] - value_of(codes, fine_codes, arguments)
    expected = left @ arguments[5][0]
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (0, torch.zeros(4)),
        (1, torch.zeros(COLUMNS, 63)),
        (2, torch.eye(4)),
        (3, torch.zeros(COLUMNS, 64, dtype=torch.float64)),
        (4, torch.zeros(1, 64)),
        (5, torch.zeros(2, TILE_ROWS, TILE_ROWS)),
    ],
)
def test_refused(level, index, wrong):
    arguments = problem(64, True, True)
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match="round_columns: "):
        round_columns(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.arc.round_columns.default, tuple(problem(64, True, True)))
