"""The CUDA library without a GPU: what its machine code holds, and what it accepts and refuses."""

import ctypes
import re

import pytest
from cuda_tools import built_library, machine_code, need, object_file

from arc_ao.ops.cuda import library

# object: the instruction that makes it worth having, and how many there must be at least
INSTRUCTIONS = {
    "gemm_sm100.o": (r"\bUTCOMMA\.\S*4X", 8),
    "gemm_sm120.o": (r"\bOMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X", 64),
    "quant_augment.o": (r"\bF2FP\.SATFINITE\.E2M1\.F32", 64),
    "dot_gemm.o": (r"\bF2FP\.F16\.E2M1\.UNPACK_B", 64),
}
CAPABILITIES = {100: "100f", 103: "100f", 120: "120f", 121: "120f"}
MULTIPROCESSORS = 148


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_objects_hold_their_instruction(name):
    """A wrong architecture suffix compiles without an error to kernels that hold none."""
    pattern, least = INSTRUCTIONS[name]
    assert len(re.findall(pattern, machine_code(name))) >= least


def test_no_kernel_spills_registers():
    """The assembler's report: every entry function, 0 bytes of spills."""
    report = object_file("ptxas.log").read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Compiling entry function", report)
    assert len(spills) >= len(kernels) >= 20
    assert set(spills) == {("0", "0")}


def test_every_family_is_in_the_library():
    built_library()
    assert library.architectures() == list(library.FAMILIES)
    assert library.description() == "built for sm_100f, sm_120f"


def test_structures_have_the_sizes_of_the_header():
    """Else every pointer behind the first difference would be another one."""
    sizes = (ctypes.c_int64 * 3)()
    built_library().arc_ao_cuda_struct_sizes(sizes)
    kinds = (library.Quantize, library.Gemm, library.Kernel)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in kinds]


def product(m: int, n: int, k: int, **changes: int) -> library.Gemm:
    """A product of that size; pointers that are never followed."""
    names = ("a", "a_scale", "a_outer", "b", "b_scale", "b_outer", "y")
    aligned = {name: 4096 * (i + 1) for i, name in enumerate(names)}
    numbers = {"bias_number": 1, "y_number": 1, "a_outer_per_row": 1}
    return library.Gemm(**{**aligned, **numbers, "m": m, "n": n, "blocks": k // 16, **changes})


def selected(g: library.Gemm, capability: int) -> tuple[str | None, library.Kernel]:
    kernel = library.Kernel()
    error = built_library().arc_ao_cuda_select(
        ctypes.byref(g), capability, MULTIPROCESSORS, ctypes.byref(kernel)
    )
    return None if error is None else error.decode(), kernel


def refusal(g: library.Gemm, kernel: library.Kernel) -> str | None:
    error = built_library().arc_ao_cuda_can_implement(ctypes.byref(g), ctypes.byref(kernel))
    return None if error is None else error.decode()


def configs(family: int) -> list[tuple[str, tuple[int, ...]]]:
    """Name and tile of every configuration of a family."""
    tile, found = (ctypes.c_int32 * 3)(), []
    while (name := built_library().arc_ao_cuda_config(family, len(found), tile)) is not None:
        found.append((name.decode(), tuple(tile)))
    return found


@pytest.mark.parametrize("family, tiles", [(100, [256, 128, 128]), (120, [128, 128])])
def test_tables_go_from_large_tiles_to_small(family, tiles):
    """The last one is for products of few tiles, which it splits along K."""
    found = configs(family)
    assert [tile[0] for _, tile in found] == tiles
    assert "stream-K" in found[-1][0]


@pytest.mark.parametrize("capability", CAPABILITIES)
# Few rows; a tile, and few of them; a device full of middle and of large tiles; the largest K.
@pytest.mark.parametrize(
    "m, n, k, place",
    [(1, 4096, 4096, "dot"), (8, 64, 32, "dot"), (9, 4096, 4352, "last"), (64, 1024, 64, "last")]
    + [(1024, 4096, 4096, "middle"), (4096, 14336, 4352, 0), (333, 28672, 2080, "any")],
)
def test_products_find_a_kernel_that_takes_them(capability, m, n, k, place):
    """K_aug of any multiple of 32, M of any size; the kernel says that it can."""
    g = product(m, n, k)
    error, kernel = selected(g, capability)
    assert error is None and refusal(g, kernel) is None
    table = configs(kernel.family)
    middle = {100: 0 if m * n >= 148 * 256 * 256 else 1, 120: 0}[kernel.family]
    expected = {"dot": -1, "last": len(table) - 1, "middle": middle, "any": kernel.config}
    assert kernel.config == expected.get(place, place)
    if place == "last":  # partial sums, where K has several tiles to be split into
        assert (kernel.workspace > 0) == (k > 256)


@pytest.mark.parametrize("change", [{"y_number": 0}, {"bias": 4096, "bias_number": 2}, {"n": 100}])
def test_what_tiles_cannot_write_goes_to_the_dot_kernel(change):
    """fp32 output, a bias of another dtype, N no multiple of 8."""
    g = product(**{"m": 512, "n": 4096, "k": 4096, **change})
    error, kernel = selected(g, 120)
    assert error is None and kernel.config == -1 and refusal(g, kernel) is None
    assert "tiles write 16-bit output" in refusal(g, library.Kernel(0, 120, 0))


@pytest.mark.parametrize("family", [100, 120])
def test_every_configuration_takes_every_size(family):
    """Not only those that the table picks: CUTLASS's own checks of shape and alignment."""
    for config in range(len(configs(family))):
        for m, n, k in ((1, 8, 32), (129, 4104, 96), (4096, 28672, 16384)):
            assert refusal(product(m, n, k), library.Kernel(config, family, 0)) is None


@pytest.mark.parametrize(
    "g, message",
    [
        (product(16, 64, 48), "expected K_aug a multiple of 32, .* got M 16, N 64, K_aug 48"),
        (product(0, 64, 64), "expected sizes of 1 to 2147483647, got M 0, N 64, K_aug 64"),
        (product(2**31, 64, 64), "got M 2147483648, N 64"),
        (product(16, 64, 64, b=4104), "operands that start at multiples of 16 bytes"),
        (product(16, 64, 64, y_number=3), "dtype out of range"),
    ],
)
def test_refusals_name_what_was_expected(g, message):
    """By the selection and by the kernels alike."""
    assert re.search(message, selected(g, 100)[0])
    assert re.search(message, refusal(g, library.Kernel(0, 100, 0)))


def test_other_devices_and_configurations_are_refused():
    """An H200 and a row that no table has."""
    error, _ = selected(product(16, 64, 64), 90)
    assert "built for 100f 120f, not for compute capability 90" in error
    for kernel in (library.Kernel(7, 100, 0), library.Kernel(0, 110, 0)):
        assert "is not in this library" in refusal(product(16, 64, 64), kernel)


def test_quantizing_refuses_before_it_asks_a_device():
    """The checks that protect memory are there even where Python's are gone around."""
    launch = built_library().arc_ao_cuda_quantize
    for changes, message in [
        ({"rows": 0}, b"expected 1 to 2147483520 rows, got 0"),
        ({"channels": 1 << 20}, b"expected 1 to 655360 channels, got 1048576"),
        ({"num_act_channels": 8}, b"act_channels must hold a multiple of 16"),
        ({"producer": len(library.PRODUCERS)}, b"producer or scale_mode out of range"),
    ]:
        q = library.Quantize(**{"rows": 1, "channels": 16, **changes})
        assert message in launch(ctypes.byref(q), 0, None)


def test_without_a_device_a_call_says_so():
    """The error of the CUDA runtime comes through; nothing crashes."""
    import torch

    need(not torch.cuda.is_available(), "this machine has a GPU")
    q = library.Quantize(rows=1, channels=16)
    error = built_library().arc_ao_cuda_quantize(ctypes.byref(q), 0, None)
    assert error is not None and error.startswith(b"quantize: ")
