"""arc::quant_augment against its formula, recomputed row by row from the NVFP4 functions."""

import pytest
import torch
from torch import Tensor

from arc_ao.formats import nvfp4
from arc_ao.ops import nvfp4_gemm, quant_augment

EMPTY = torch.zeros(0, dtype=torch.int32)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def activations(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of different size with a few outlier channels."""
    generator = torch.Generator().manual_seed(rows + channels)
    x = torch.randn(rows, channels, generator=generator)
    x[:, ::11] *= 20
    return (x * torch.logspace(-2, 2, rows).unsqueeze(1)).to(dtype)


ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(1)).int()
EXTRA = {"weight_blocks": ids(2), "act_channels": ids(*range(3, 64, 4), *range(16))}
CONFIGS = {
    "plain": {},
    "blocks": {"act_blocks": ids(1, 3), "weight_blocks": ids(0, 1, 2)},
    "channels": EXTRA,
    "sorted": {"act_blocks": ids(0), "channel_order": ORDER, "block_scale": "four_over_six"},
    "searched": {**EXTRA, "block_scale": "mse"},
    "tensor": {"act_blocks": ids(2), "scale_mode": "tensor"},
    "static": {"act_blocks": ids(2), "scale_mode": "static", "outer_scale": torch.tensor([0.01])},
}


def augment(x: Tensor, **changes) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {"act_blocks": EMPTY, "weight_blocks": EMPTY, "outer_scale": None}
    return quant_augment(x, **{**arguments, "scale_mode": "token", **changes})


def by_the_formula(x: Tensor, **config) -> tuple[Tensor, Tensor, Tensor]:
    """[Q(x) | Q(R)[:, act_blocks] | Q'(R[:, act_channels]) | Q(x)[:, weight_blocks]] by rows."""
    method = config.get("block_scale", "amax")
    x = x.float()[:, config.get("channel_order", torch.arange(x.shape[1])).long()]
    mode = config.get("scale_mode", "token")
    codes, scales, outers = [], [], []
    for row in x:
        amax = row.abs().max() if mode == "token" else x.abs().max()
        outer = config["outer_scale"][0] if mode == "static" else amax / torch.tensor(2688.0)
        inverse = torch.ones(()) / outer if mode == "static" else torch.tensor(2688.0) / amax
        blocks = nvfp4.to_blocks(row * inverse)
        q, s = nvfp4.quantize_blocks(blocks, method=method)
        residual = blocks - nvfp4.decode_blocks(q, s)
        parts = [(q, s)]
        picked = [residual[b] for b in config.get("act_blocks", EMPTY).tolist()]
        picked += residual.flatten()[config.get("act_channels", EMPTY).long()].split(16)
        parts += [nvfp4.quantize_blocks(r[None], method=method) for r in picked if r.numel()]
        parts += [(q[b : b + 1], s[b : b + 1]) for b in config.get("weight_blocks", EMPTY).tolist()]
        codes.append(torch.cat([q for q, _ in parts]).flatten())
        scales.append(torch.cat([s for _, s in parts]))
        outers.append(outer)
    outers = outers if mode == "token" else outers[:1]
    return (
        nvfp4.pack(torch.stack(codes)),
        nvfp4.encode_e4m3(torch.stack(scales)),
        torch.tensor(outers),
    )


def assert_equal(left: tuple, right: tuple) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_follow_the_formula(config, dtype):
    """Base, residual blocks, gathered channels, repeated blocks: the same bytes."""
    x = activations(7, 64, dtype)
    assert_equal(augment(x, **config), by_the_formula(x, **config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(config, rows):
    arguments = {"outer_scale": None, "scale_mode": "token", **config}
    positional = [arguments.pop(n, EMPTY) for n in ("act_blocks", "weight_blocks")]
    positional += [arguments.pop(n) for n in ("outer_scale", "scale_mode")]
    torch.library.opcheck(quant_augment, (activations(rows, 64), *positional), arguments)


def test_schema_is_stable():
    """Exported programs are stored with this signature."""
    assert str(torch.ops.arc.quant_augment.default._schema) == (
        "arc::quant_augment(Tensor x, Tensor act_blocks, Tensor weight_blocks, Tensor? "
        "outer_scale, str scale_mode, Tensor? channel_order=None, Tensor? act_channels=None, "
        'str block_scale="amax", str plan="", str scale_layout="plain") -> '
        "(Tensor, Tensor, Tensor)"
    )


@pytest.mark.parametrize("block_scale", nvfp4.BLOCK_SCALES)
def test_token_scales_do_not_depend_on_the_batch(block_scale):
    """Each row alone, and among rows 10^4 times larger, has the same bytes."""
    x = activations(6, 64)
    config = {**CONFIGS["blocks"], "block_scale": block_scale}
    whole = augment(x, **config)
    for row in range(6):
        assert_equal(augment(x[row], **config), tuple(t[row : row + 1] for t in whole))


def test_ragged_in_features_are_padded_with_zeros():
    """172 = 10 blocks and 12 channels; the last block may be kept as a residual."""
    x = activations(3, 172)
    config = {"act_blocks": ids(10), "weight_blocks": ids(0)}
    padded = torch.nn.functional.pad(x, (0, 4))
    assert_equal(augment(x, **config), augment(padded, **config))
    assert augment(x, **config)[0].shape == (3, 13 * 8)


def test_empty_batches_leading_dimensions_and_strides():
    """M is the product of the leading dimensions, 0 and 1 included; strides do not matter."""
    for mode, outers in (("token", 0), ("tensor", 1)):
        q, s, outer = augment(torch.zeros(2, 0, 64), scale_mode=mode, act_blocks=ids(1))
        assert (q.shape, s.shape, outer.tolist()) == ((0, 40), (0, 5), [0.0] * outers)
    x = activations(6, 64)
    assert_equal(augment(x.view(2, 3, 64)), augment(x))
    assert_equal(augment(x.t().contiguous().t()), augment(x))
    assert_equal(augment(x.repeat(1, 2)[:, 64:]), augment(x))


def test_zero_tokens_are_zero_and_leave_their_neighbours_alone():
    x = activations(3, 64)
    x[1] = 0
    q, s, outer = augment(x, **CONFIGS["blocks"])
    assert outer[1] == 0 and not q[1].any() and (s[1] == 1).all()
    assert_equal(augment(x[2], **CONFIGS["blocks"]), (q[2:], s[2:], outer[2:]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_non_finite_token_gives_nan_output(mode, bad):
    """Never silently finite; with token and static scales the other tokens are bit-equal."""
    x, weight = activations(4, 64), activations(24, 64)
    config = {"act_blocks": ids(1), "weight_blocks": EMPTY, "scale_mode": mode}
    config["outer_scale"] = torch.tensor([0.05]) if mode == "static" else None
    b, b_scale, b_outer = nvfp4.quantize(weight)

    def linear(x: Tensor) -> Tensor:
        a = augment(x, **config)
        last = (None, torch.float32, ids(1), 4)
        return nvfp4_gemm(*a, b, b_scale, b_outer.reshape(1), *last)

    clean, others = linear(x), [0, 1, 3]
    x[2, 37] = bad  # outside of the residual block
    y = linear(x)
    assert y[2].isnan().all()
    if mode != "tensor":
        assert torch.equal(y[others], clean[others]) and clean.isfinite().all()


@pytest.mark.parametrize("config", ["blocks", "channels", "sorted", "static"])
def test_a_residual_never_increases_the_error_of_an_element(config):
    """0 is on the grid, so every corrected element moves towards x (up to fp32 rounding)."""
    x = activations(16, 64)
    config = {**CONFIGS[config], "weight_blocks": EMPTY}
    q, s, outer = augment(x, **config)
    values = nvfp4.decode(q, s).double() * outer.double().unsqueeze(-1)  # [16, K_aug]
    ordered = x.double()[:, config.get("channel_order", torch.arange(64)).long()]
    error = (ordered - values[:, :64]).abs()
    columns = [16 * b + i for b in config.get("act_blocks", EMPTY).tolist() for i in range(16)]
    columns += config.get("act_channels", EMPTY).tolist()
    corrected = (ordered[:, columns] - values[:, columns] - values[:, 64:]).abs()
    assert (corrected <= error[:, columns] + 1e-6 * ordered[:, columns].abs()).all()
    if "outer_scale" not in config:  # a static scale clips the rows beyond its range
        assert corrected.sum() < 0.3 * error[:, columns].sum()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale_mode": "row"}, r"scale_mode must be one of .*'token'.*got 'row'"),
        ({"x": torch.zeros(2, 16, dtype=torch.int32)}, "bf16, fp16 or fp32"),
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "bf16, fp16 or fp32"),
        ({"x": torch.tensor(1.0)}, "at least one dimension"),
        ({"scale_mode": "static"}, "scale_mode 'static' without outer_scale"),
        ({"outer_scale": torch.ones(1)}, "scale_mode 'token' with outer_scale"),
        ({"scale_mode": "static", "outer_scale": torch.ones(2)}, r"fp32 \[1\], got .*\[2\]"),
        ({"act_channels": ids(1, 2, 3)}, "multiple of 16 channels, got 3"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_what_was_expected_and_found(changes, message, device):
    """The fake refuses what the operator refuses."""
    changes = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    x = changes.pop("x", torch.zeros(2, 64, device=device))
    blocks = {"act_blocks": EMPTY.to(device), "weight_blocks": EMPTY.to(device)}
    with pytest.raises(RuntimeError, match=message):
        augment(x, **blocks, **changes)
