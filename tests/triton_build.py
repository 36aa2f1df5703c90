"""Compile Triton kernels ahead of time, for architectures that this machine does not have."""

import re
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CONSTEXPR = "constexpr"
WARP_SIZE = 32


class Machine(NamedTuple):
    """What a kernel became: opcodes by name, loads and stores of spilled registers, PTX, registers
    of a thread, instructions in the longest loop, and outside of loops before the first exit."""

    opcodes: Counter
    spills: int
    ptx: str
    registers: int
    loop: int
    straight: int
    shared: int  # bytes


def build(
    kernel: Any,
    capability: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    **options: Any,
) -> Machine:
    """Compile `kernel` for sm_{capability}, with pointers aligned to 16 bytes.

    Args:
        arguments: name -> triton type such as "*bf16" or "i32", or what a launch would find out of
            an integer: "16" for a multiple of 16, "1" for 1.
        constants: the constexpr parameters.
        options: num_warps, enable_fp_fusion and the like.
    """
    names = kernel.arg_names
    ones = {name: 1 for name, kind in arguments.items() if kind == "1"}
    known = constants | ones
    signature = {name: CONSTEXPR if name in known else arguments[name] for name in names}
    multiples = [i for i, name in enumerate(names) if signature[name] == "16"]
    pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in (*multiples, *pointers)}
    signature |= {names[i]: "i32" for i in multiples}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in known.items()},
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability, WARP_SIZE)
    compiled = triton.compile(source, target=target, options=options)
    sass = compiled.asm["sass"]
    loops = loops_of(sass)
    return Machine(
        opcodes_of(sass),
        spills_of(sass),
        compiled.asm["ptx"],
        registers_of(sass),
        max(map(len, loops), default=0),
        len(before_exit(sass) - set().union(*loops)),
        compiled.metadata.shared,
    )


def opcodes_of(sass: str) -> Counter:
    """Opcode, up to its first dot, -> how often it stands in the listing."""
    return Counter(re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))


def spills_of(sass: str) -> int:
    """Loads and stores of thread-local memory: what did not fit into registers."""
    opcodes = opcodes_of(sass)
    return opcodes["LDL"] + opcodes["STL"]


def instructions_of(sass: str) -> list[int]:
    """Lines of the listing that hold an instruction."""
    pattern = re.compile(r"^\S+\t")
    return [i for i, line in enumerate(sass.splitlines()) if pattern.match(line)]


def before_exit(sass: str) -> set[int]:
    """Lines with instructions up to the first exit; behind it are rare ways of a division."""
    lines, where = sass.splitlines(), instructions_of(sass)
    first = next((i for i in where if re.search(r"\bEXIT\b", lines[i])), where[-1])
    return {i for i in where if i <= first}


def loops_of(sass: str) -> list[set[int]]:
    """Lines with instructions from each label to the last branch back to it."""
    lines, labels, ends = sass.splitlines(), {}, {}
    for i, line in enumerate(lines):
        if label := re.match(r"^(\w+):\s*$", line):
            labels[label[1]] = i
        branch = re.search(r"\bBRA(?:\.\S+)? (?:!?U?P\w+, )?(\w+)", line)
        if branch and branch[1] in labels and not _is_trap(lines[i - 1 : i + 1], branch[1]):
            ends[branch[1]] = i
    where = instructions_of(sass)
    return [{i for i in where if labels[name] < i <= end} for name, end in ends.items()]


def _is_trap(lines: list[str], label: str) -> bool:
    """Whether a branch is the one to itself behind the last instruction."""
    return lines[0].startswith(f"{label}:")


def registers_of(sass: str) -> int:
    """One more than the highest register that is named."""
    return 1 + max(map(int, re.findall(r"\bR(\d+)", sass)), default=-1)
