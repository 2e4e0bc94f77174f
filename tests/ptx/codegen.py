"""A parsed function to Python: one function a basic block, over arrays of one value a thread.

    b7(S, R, m, sel, full)

S: the group of CTAs that runs (`machine.Group`); R: the registers that more than one block uses; m: which
threads are in the block; sel: their indices, None for all; full: whether those are all threads that still
live. The function returns the branch's condition. Registers of one block are its local variables: computed
for every thread, as nobody sees those of the threads that are not here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic
from .opcodes import SIZE, TYPES, find
from .parser import Block, Function, Instruction, Unsupported, parse, parts
from .provenance import pointers

KINDS: dict[str, Any] = {name: getattr(arithmetic, name) for name in SIZE} | {"P": np.bool_}
REGISTER = re.compile(r"%(?!tid|ntid|ctaid|nctaid|laneid)[A-Za-z_]\w*")
SPECIAL = {
    "%tid.x": "S.tid", "%tid.y": "U4(0)", "%tid.z": "U4(0)", "%ntid.x": "S.threads", "%laneid": "S.lane",
    "%ctaid.x": "S.cta[0]", "%ctaid.y": "S.cta[1]", "%ctaid.z": "S.cta[2]",
    "%nctaid.x": "S.grid[0]", "%nctaid.y": "S.grid[1]", "%nctaid.z": "S.grid[2]",
}  # fmt: skip
# Cache hints say where data is kept, not what it is; a policy for L2 is a third operand.
ACCESS = re.compile(
    r"(ld|st)\.(global|shared)(?:\.L1::(?:evict_\w+|no_allocate))?(?:\.L2::(?:evict_\w+|cache_hint))?"
    r"(?:\.v([24]))?\.([bus](?:8|16|32|64)|f32)"
)
NO_DESTINATION = ("st.", "bar.", "barrier.", "stmatrix.")


def written_and_read(i: Instruction) -> tuple[list[str], list[str]]:
    """Registers of an instruction; a guarded one reads what it may leave as it is."""
    if i.opcode.startswith(NO_DESTINATION):
        written, read = [], REGISTER.findall(" ".join(i.operands))
    else:
        written = REGISTER.findall(i.operands[0]) if i.operands else []
        read = REGISTER.findall(" ".join(i.operands[1:]))
    if i.guard:
        read = [*read, i.guard, *written]
    return written, read


class Kernel:
    """A PTX module, checked against the whitelist and ready to run."""

    def __init__(self, ptx: str):
        self.text = ptx
        self.function: Function = parse(ptx)
        self.name, self.parameters = self.function.name, self.function.parameters
        self.threads, self.blocks = self.function.threads, self.function.blocks
        self.instructions: dict[int, Instruction] = {
            i.number: i for block in self.blocks for i in block.instructions
        }
        self.hits = [0] * len(self.blocks)
        self.shared_registers = self._shared_registers()
        self.slots = {register: n for n, register in enumerate(self.shared_registers)}
        self.pointers = pointers(self.function, written_and_read)
        self.granule = self._granule()
        self.constants: dict[str, str] = {}
        problems: list[str] = []
        sources = []
        for block in self.blocks:
            try:
                sources.append(BlockCode(self, block).source())
            except Unsupported as e:
                problems.append(str(e))
        if problems:
            raise Unsupported(f"{self.name}: " + "; ".join(problems))
        self.source = "\n".join(sources)
        environment: dict[str, Any] = {**vars(arithmetic), "where": np.where}
        for expression, name in self.constants.items():
            environment[name] = eval(expression, environment)
        exec(compile(self.source, f"<ptx {self.name}>", "exec"), environment)
        self.code: list[Callable[..., Any]] = [environment[f"b{block.index}"] for block in self.blocks]

    def storage(self, register: str) -> str:
        return TYPES[self.function.declared(register)]

    def initial(self) -> list[Any]:
        """Registers before anything is written: bits that are a NaN, a bad index, a bad address."""
        return [
            np.bool_(True) if kind == "P" else np.uint64(2**64 - 1).astype(f"u{SIZE[kind]}").view(KINDS[kind])
            for kind in map(self.storage, self.shared_registers)
        ]

    def constant(self, expression: str) -> str:
        """The name of a value that is made once."""
        return self.constants.setdefault(expression, f"K{len(self.constants)}")

    def _shared_registers(self) -> list[str]:
        """Those that several blocks use, or that are read before they are written in their only one."""
        blocks: dict[str, set[int]] = {}
        live_in: set[str] = set()
        for block in self.blocks:
            defined: set[str] = set()

            def read(register: str, index: int = block.index, defined: set[str] = defined) -> None:
                blocks.setdefault(register, set()).add(index)
                if register not in defined:
                    live_in.add(register)

            for i in block.instructions:
                written, wanted = written_and_read(i)
                for register in wanted:
                    read(register)
                for register in written:
                    blocks.setdefault(register, set()).add(block.index)
                    defined.add(register)
            if block.kind == "branch":
                read(block.condition[0])
        return sorted(r for r, where in blocks.items() if len(where) > 1 or r in live_in)

    def _granule(self) -> int:
        """Bytes of the smallest memory access: how finely races are looked for."""
        sizes = [
            2 if "matrix" in i.opcode else SIZE[TYPES[i.opcode.split(".")[-1]]]
            for i in self.instructions.values()
            if i.opcode.startswith(
                ("ld.global", "ld.shared", "st.global", "st.shared", "ldmatrix", "stmatrix")
            )
        ]
        return min([4, *sizes])


class BlockCode:
    """Writes one block's function. `variables` holds the Python names of a register, one for each type that
    it was wanted in; `kept` the type that holds its bits."""

    def __init__(self, kernel: Kernel, block: Block):
        self.kernel, self.block = kernel, block
        self.out: list[str] = []
        self.variables: dict[str, dict[str, str]] = {}
        self.kept: dict[str, str] = {}
        self.count = 0

    def source(self) -> str:
        for i in self.block.instructions:
            if self.block.kind == "barrier" and i is self.block.instructions[-1]:
                break
            try:
                self.instruction(i)
            except Unsupported as e:
                raise Unsupported(f"{i.line}: {i.text} ({e})") from None
        result = "None"
        if self.block.kind == "branch":
            predicate, negated = self.block.condition
            result = f"{'~' if negated else ''}{self.use(predicate, 'P')}"
        body = "\n    ".join([*self.out, f"return {result}"])
        return f"def b{self.block.index}(S, R, m, sel, full):\n    {body}\n"

    def instruction(self, i: Instruction) -> None:
        if i.opcode.startswith(("ld.", "st.")):
            self.memory(i)
        elif i.opcode.startswith(("ldmatrix.", "stmatrix.")):
            self.matrix(i)
        else:
            function, m = find(i)
            function(self, i, m)

    def fresh(self, expression: str) -> str:
        self.count += 1
        self.out.append(f"v{self.count} = {expression}")
        return f"v{self.count}"

    # Operands

    def uses(self, i: Instruction, kind: str) -> list[str]:
        """All sources of an instruction, in one type."""
        return [self.use(x, kind) for x in i.operands[1:]]

    def floats(self, i: Instruction, flush: object) -> list[str]:
        return [f"ftz({x})" if flush else x for x in self.uses(i, "F4")]

    def use(self, operand: str, kind: str) -> str:
        """An expression for an operand in a type: its bits, the low ones of a wider register."""
        if operand.startswith("!"):
            return f"(~{self.use(operand[1:], kind)})"
        if operand in SPECIAL:
            return SPECIAL[operand] if kind == "U4" else f"{SPECIAL[operand]}.astype(U4).view({kind})"
        if REGISTER.fullmatch(operand):
            return self._register(operand, kind)
        if operand == "global_smem":
            return f"{kind}(0)"
        return self._constant(operand, kind)

    def _register(self, register: str, kind: str) -> str:
        have = self.variables.get(register)
        if have is None:
            self.kept[register] = self.kernel.storage(register)
            have = {self.kept[register]: self.fresh(f"R[{self.kernel.slots[register]}]")}
            self.variables[register] = have
        if kind not in have:
            kept = self.kept[register]
            if "P" in (kind, kept):
                raise Unsupported(f"predicate as a number: {register}")
            bits = f"{have[kept]}.view(U{SIZE[kept]})"
            if SIZE[kept] < SIZE[kind]:
                raise Unsupported(f"{register} of {SIZE[kept]} bytes as {kind}")
            narrow = "" if SIZE[kept] == SIZE[kind] else f".astype(U{SIZE[kind]})"
            have[kind] = self.fresh(f"{bits}{narrow}.view({kind})")
        return have[kind]

    def _constant(self, text: str, kind: str) -> str:
        if kind == "P":
            if not re.fullmatch(r"-?\d+|true|false", text):
                raise Unsupported(f"operand {text}")
            return f"np.bool_({text in ('true', '-1') or text.lstrip('-') not in ('0', 'false')})"
        if m := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            value, size = int(m[1], 16), 4
        elif re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
            size = SIZE[kind]
            value = int(text, 0) & ((1 << 8 * size) - 1)
        else:
            raise Unsupported(f"operand {text}")
        if size != SIZE[kind]:
            raise Unsupported(f"operand {text} of {size} bytes as {kind}")
        return self.kernel.constant(f"U{size}({value:#x}).view({kind})")

    def guard(self, i: Instruction) -> str:
        return f"{'~' if i.negated else ''}{self.use(i.guard or '', 'P')}" if i.guard else "None"

    def define(self, i: Instruction, value: str, kind: str, register: str = "", flush: bool = False) -> None:
        """A register of the first operand becomes `value`, where the guard allows."""
        register = register or i.operands[0]
        if register == "_":
            return
        if not REGISTER.fullmatch(register):
            raise Unsupported(f"destination {register}")
        storage = self.kernel.storage(register)
        if flush:
            value = f"ftz({value})"
        if i.guard and not i.opcode.startswith("ld."):
            value = f"where({self.guard(i)}, {value}, {self.use(register, kind)})"
        name = self.fresh(value)
        if kind != "P" and SIZE[kind] != SIZE[storage]:
            if SIZE[kind] > SIZE[storage]:
                raise Unsupported("wider than its register")
            kind = f"{kind[0] if kind[0] in 'IU' else 'U'}{SIZE[storage]}"
            name = self.fresh(f"{name}.astype({kind})")
        self.variables[register] = {kind: name}
        self.kept[register] = kind
        if register in self.kernel.slots:
            stored, slot = self.use(register, storage), self.kernel.slots[register]
            self.out.append(f"R[{slot}] = {stored} if full else where(m, {stored}, R[{slot}])")

    # Memory

    def address(self, i: Instruction, operand: str, kind: str) -> str:
        m = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if m is None:
            raise Unsupported("address")
        offset = int(m[2] or 0) & ((1 << 8 * SIZE[kind]) - 1)
        base = self.use(m[1], kind)
        return f"{base} + {self.kernel.constant(f'{kind}({offset})')}" if offset else base

    def memory(self, i: Instruction) -> None:
        if m := re.fullmatch(r"ld\.param\.([bus](?:8|16|32|64)|f32)", i.opcode):
            names = [p.name for p in self.kernel.parameters]
            if i.operands[1][1:-1] not in names:
                raise Unsupported("unknown parameter")
            self.define(
                i, f"S.parameters[{names.index(i.operands[1][1:-1])}].view({TYPES[m[1]]})", TYPES[m[1]]
            )
            return
        m = ACCESS.fullmatch(i.opcode)
        if m is None or len(i.operands) != (3 if ".L2::cache_hint" in i.opcode else 2):
            raise Unsupported("unknown memory access")
        store, space, vector, kind = m[1] == "st", m[2], int(m[3] or 1), TYPES[m[4]]
        raw, target = f"U{SIZE[kind]}", i.operands[0] if m[1] == "st" else i.operands[1]
        registers = parts(i.operands[1] if store else i.operands[0])
        if len(registers) != vector:
            raise Unsupported("elements")
        at = self.address(i, target, "U8" if space == "global" else "U4")
        arguments = f"{space!r}, {at}, {self.guard(i)}, m, sel, {SIZE[kind]}"
        if store:
            values = ", ".join(self.use(r, raw) for r in registers)
            self.out.append(f"S.store({arguments}, ({values},), {i.number})")
            return
        olds = f"({', '.join(self.use(r, raw) for r in registers)},)" if i.guard else "None"
        loaded = self.fresh(f"S.load({arguments}, {vector}, {olds}, {i.number})")
        for n, register in enumerate(registers):
            self.define(i, f"{loaded}[{n}].view({kind})", kind, register)

    def matrix(self, i: Instruction) -> None:
        m = re.fullmatch(
            r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", i.opcode
        )
        if m is None or i.guard:
            raise Unsupported("unknown matrix access")
        store = m[1] == "st"
        registers = parts(i.operands[1] if store else i.operands[0])
        at = self.address(i, i.operands[0] if store else i.operands[1], "U4")
        if len(registers) != int(m[2]):
            raise Unsupported("elements")
        if store:
            values = ", ".join(self.use(r, "U4") for r in registers)
            self.out.append(f"S.store_matrix({at}, ({values},), {bool(m[3])}, m, sel, {i.number})")
            return
        loaded = self.fresh(f"S.load_matrix({at}, {m[2]}, {bool(m[3])}, m, sel, {i.number})")
        for n, register in enumerate(registers):
            self.define(i, f"{loaded}[{n}]", "U4", register)
