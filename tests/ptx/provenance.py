"""Which tensor an address was made from: so that an access has to stay inside that tensor, not inside any.

Pointers are parameters; what is computed from one points into the same tensor. A number that was loaded
from memory is an index, whatever it was loaded through, and a comparison is no pointer."""

from __future__ import annotations

from collections.abc import Callable

from .parser import Function, Instruction

Registers = Callable[[Instruction], tuple[list[str], list[str]]]
BARRED = ("setp.", "ld.global", "ld.shared", "shfl.", "redux.")


def pointers(function: Function, registers: Registers) -> dict[int, frozenset[int]]:
    """Instruction number -> parameters from which the address of a load or store of global memory comes.

    A register that several instructions write has the sources of all of them.
    """
    names = {p.name: n for n, p in enumerate(function.parameters)}
    made: dict[str, set[int]] = {}
    edges: dict[str, set[str]] = {}
    accesses: list[tuple[int, str]] = []
    for block in function.blocks:
        for i in block.instructions:
            written, read = registers(i)
            if i.opcode.startswith(("ld.global", "st.global")):
                address = i.operands[0] if i.opcode.startswith("st") else i.operands[1]
                accesses.append((i.number, address.strip("[] ").split("+")[0].strip()))
            if (
                i.opcode.startswith("ld.param")
                and function.parameters[names[i.operands[1][1:-1]]].kind == "u64"
            ):
                made.setdefault(written[0], set()).add(names[i.operands[1][1:-1]])
            elif not i.opcode.startswith(BARRED):
                for target in written:
                    edges.setdefault(target, set()).update(read)
    changed = True
    while changed:
        changed = False
        for target, sources in edges.items():
            have = made.setdefault(target, set())
            size = len(have)
            for source in sources:
                have |= made.get(source, set())
            changed |= len(have) > size
    return {number: frozenset(made.get(register, ())) for number, register in accesses}
