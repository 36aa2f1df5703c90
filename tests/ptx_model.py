"""The few PTX instructions that the kernels write by hand, on a CPU: what NVIDIA's manual says of
them, for 32-bit registers held as int64 tensors 0..2^32 - 1. Triton's interpreter runs none."""

import re

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
HALVES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


def run(assembly: str, *inputs: Tensor, outputs: int) -> list[Tensor]:
    """Registers $0 .. $(outputs - 1) after `assembly`, where the inputs are the registers behind.

    Raises:
        KeyError: an instruction that is not modelled, or a register that nothing was written to.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    registers["%lanemask_lt"] = torch.tensor((1 << 31) - 1)  # of the last lane, which has most
    for line in re.split(r"[;\n]", re.sub(r"^\{|\}$", "", assembly.strip())):
        operation, *operands = re.findall(r"\{[^}]*\}|[^\s,]+", line) or [""]
        if operation in ("", ".reg"):
            continue
        target, values = operands[0], [_value(registers, name) for name in operands[1:]]
        if target.startswith("{"):
            low, high = re.findall(r"[^\s,{}]+", target)
            registers[low], registers[high] = values[0] & 0xFFFF, values[0] >> 16
        else:
            registers[target] = INSTRUCTIONS[operation](*values) & WORD
    return [registers[f"${i}"] for i in range(outputs)]


def _value(registers: dict[str, Tensor], name: str) -> Tensor:
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", name):
        return torch.tensor(int(name, 0) & WORD)
    return registers[name]


def signed(word: Tensor, bits: int = 32) -> Tensor:
    """The low `bits` as a signed integer."""
    word = word & ((1 << bits) - 1)
    return word - ((word >> bits - 1) << bits)


def prmt(low: Tensor, high: Tensor, selector: Tensor) -> Tensor:
    """Bytes of low and high by the selector's nibbles; bit 3 of one spreads its byte's sign."""
    result = torch.zeros(())
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (low | high << 32) >> 8 * (nibble & 7) & 0xFF
        byte = torch.where(nibble >= 8, 0xFF * (byte >> 7), byte)
        result = result.long() | byte << 8 * i
    return result


def dp4a(unsigned: Tensor, other: Tensor, total: Tensor) -> Tensor:
    """total and four products of bytes."""
    pairs = ((unsigned >> 8 * i & 0xFF) * signed(other >> 8 * i, 8) for i in range(4))
    return total + sum(pairs)


def halves(dtype: torch.dtype, word: Tensor) -> Tensor:
    """Both numbers of a pair, [..., 2]."""
    pair = torch.stack([word & 0xFFFF, word >> 16], -1)
    return signed(pair, 16).to(torch.int16).view(dtype)


def joined(pair: Tensor) -> Tensor:
    """The register of a pair [..., 2]."""
    bits = pair.view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z, rounded once: float64 holds the product of two halves, and here the sum."""
    return (x.double() * y.double() + z.double()).to(x.dtype)


def _float(word: Tensor) -> Tensor:
    return signed(word).to(torch.int32).view(torch.float32)


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "dp4a.u32.s32": dp4a,
    "shl.b32": lambda x, by: x << by,
    "shr.u32": lambda x, by: x >> by,
    "shr.s32": lambda x, by: signed(x) >> by,
    "and.b32": lambda x, y: x & y,
    "or.b32": lambda x, y: x | y,
    "mov.u32": lambda x: x,
    "mov.b32": lambda x: x,
}
for _name, _dtype in HALVES.items():
    INSTRUCTIONS[f"cvt.rn.{_name}.f32"] = lambda high, low, d=_dtype: joined(
        torch.stack([_float(low), _float(high)], -1).to(d)
    )
    INSTRUCTIONS[f"fma.rn.{_name}"] = lambda *abc, d=_dtype: joined(
        fma(*(halves(d, x) for x in abc))
    )
