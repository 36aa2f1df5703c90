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
    """What a kernel became: opcodes by name, bytes of registers spilled per thread, PTX."""

    opcodes: Counter
    spills: int
    ptx: str


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
    return Machine(opcodes_of(sass), spills_of(sass), compiled.asm["ptx"])


def opcodes_of(sass: str) -> Counter:
    """Opcode, up to its first dot, -> how often it stands in the listing."""
    return Counter(re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))


def spills_of(sass: str) -> int:
    """Loads and stores of thread-local memory: what did not fit into registers."""
    opcodes = opcodes_of(sass)
    return opcodes["LDL"] + opcodes["STL"]
