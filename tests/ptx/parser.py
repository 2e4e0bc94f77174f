"""PTX text to basic blocks. Triton writes one entry function a module; anything else raises."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """PTX that the emulator does not know; it never guesses."""


@dataclass(frozen=True)
class Parameter:
    kind: str  # "u64", "f32", ...
    name: str


@dataclass
class Instruction:
    text: str
    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False
    line: str = "?"  # file.py:line of the Triton source
    number: int = 0  # position in the kernel

    @property
    def where(self) -> str:
        return f"{self.line} [{self.opcode}]"


@dataclass
class Block:
    """Instructions that run one after another, and where control goes then."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    kind: str = "jump"  # "jump", "branch" (to `target` or on), "exit", "barrier" (of the CTA)
    target: int = -1
    following: int = -1
    condition: tuple[str, bool] = ("", False)  # of a branch: predicate, negated
    line: str = "?"  # file.py:line of the branch

    @property
    def successors(self) -> list[int]:
        ends = {"exit": [], "jump": [self.target], "barrier": [self.following]}
        return ends.get(self.kind, [self.target, self.following])


@dataclass
class Function:
    name: str
    parameters: list[Parameter]
    threads: int  # a CTA
    registers: dict[str, str]  # prefix or name -> declared type
    blocks: list[Block]

    def declared(self, register: str) -> str:
        """The declared type of a register, "pred", "b32", ..."""
        found = self.registers.get(register) or self.registers.get(re.sub(r"\d+$", "", register))
        if found is None:
            raise Unsupported(f"register {register} is not declared")
        return found


def split_operands(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    found, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        found.append(current.strip())
    return found


def parts(operand: str) -> list[str]:
    """The elements of a vector operand {a, b}; a scalar is its only element."""
    return [x.strip() for x in operand.strip().strip("{}").split(",")]


def parse(ptx: str) -> Function:
    text = _without_comments(ptx)
    heads = list(re.finditer(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S))
    if len(heads) != 1 or re.search(r"^\s*(\.visible\s+|\.weak\s+)?\.func\b", text, re.M):
        raise Unsupported(
            f"a module of {len(heads)} entries, or with functions; one entry is what Triton writes"
        )
    head = heads[0]
    parameters = [
        Parameter(m[1], m[2])
        for m in re.finditer(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*(?:,|$)", head[2].strip())
    ]
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*$|\.reqntid\s+(\d+)", head[3])
    if threads is None:
        raise Unsupported("an entry without .reqntid")
    body = _Body(text[head.end() :])
    return Function(head[1], parameters, int(threads[1] or threads[2]), body.registers, body.blocks)


def _without_comments(ptx: str) -> str:
    """Comments gone, but the source position kept that Triton writes into that of each .loc."""
    lines = []
    for line in ptx.splitlines():
        position = re.match(r"\s*\.loc\s+.*//\s*(\S+:\d+):", line)
        if position:
            lines.append(f"@loc {position[1]};")
        elif not re.match(r"\s*\.(loc|file|section|pragma)\b", line):
            lines.append(line.split("//")[0])
    return "\n".join(lines)


class _Body:
    """One pass over a function's statements. Scopes in braces rename the registers that they declare."""

    def __init__(self, text: str):
        self.registers: dict[str, str] = {}
        self.blocks = [Block(0)]
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[Block, str]] = []
        self.line, self.count, self.scopes = "?", 0, 0
        scopes: list[tuple[int, list[str]]] = []
        for token in self._tokens(text):
            if token == "{":
                self.scopes += 1
                scopes.append((self.scopes, []))
            elif token == "}":
                scopes.pop()
            elif token.endswith(":"):
                self._fresh()
                self.labels[token[:-1]] = len(self.blocks) - 1
            elif token.startswith("@loc"):
                self.line = token.split()[1]
            elif token.startswith(".reg"):
                self._declare(token, scopes)
            elif token.startswith("."):
                raise Unsupported(f"{self.line}: {token} (unknown directive)")
            else:
                self._statement(self._renamed(token, scopes))
        for block in self.blocks:
            block.following = block.index + 1
            if block.kind == "jump":
                block.target = block.following
        for block, label in self.jumps:
            block.target = self.labels[label]
            block.kind = "branch" if block.condition[0] else "jump"

    @staticmethod
    def _tokens(text: str) -> list[str]:
        """Braces of scopes, labels with their colon, statements without their semicolon."""
        found, at, depth = [], 0, 0
        label = re.compile(r"([$\w]+:)(?!:)")
        while at < len(text):
            if text[at].isspace():
                at += 1
            elif text[at] == "{":
                depth += 1
                found.append("{")
                at += 1
            elif text[at] == "}":
                if depth == 0:
                    break
                depth -= 1
                found.append("}")
                at += 1
            elif m := label.match(text, at):
                found.append(m[1])
                at = m.end()
            else:
                end = text.index(";", at)
                found.append(text[at:end].strip())
                at = end + 1
        return found

    def _declare(self, token: str, scopes: list[tuple[int, list[str]]]) -> None:
        m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", token, re.S)
        if m is None:
            raise Unsupported(token)
        for name in m[2].split(","):
            name = name.strip()
            ranged = re.match(r"(%?\w+)<\d+>$", name)
            if ranged:
                self.registers[ranged[1]] = m[1]
            elif scopes:
                scopes[-1][1].append(name)
                self.registers[self._scoped(scopes[-1][0], name)] = m[1]
            else:
                self.registers[name] = m[1]

    @staticmethod
    def _scoped(scope: int, name: str) -> str:
        return f"%scope{scope}_{name.lstrip('%')}_"

    def _renamed(self, token: str, scopes: list[tuple[int, list[str]]]) -> str:
        for scope, names in reversed(scopes):
            for name in names:
                token = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?!\w)", self._scoped(scope, name), token)
        return token

    def _fresh(self) -> None:
        if self.blocks[-1].instructions or self.blocks[-1].kind != "jump":
            self.blocks.append(Block(len(self.blocks)))

    def _statement(self, text: str) -> None:
        text = " ".join(text.split())
        m = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if m is None:
            raise Unsupported(f"{self.line}: {text}")
        guard, negated, opcode, rest = m[2], bool(m[1]), m[3], m[4]
        block = self.blocks[-1]
        base = opcode.split(".")[0]
        instruction = Instruction(text, opcode, split_operands(rest), guard, negated, self.line, self.count)
        self.count += 1
        if base == "bra":
            if opcode not in ("bra", "bra.uni"):
                raise Unsupported(f"{self.line}: {text}")
            self.jumps.append((block, rest))
            block.kind, block.condition, block.line = "branch", (guard or "", negated), self.line
        elif opcode in ("ret", "exit"):
            if guard:
                raise Unsupported(f"{self.line}: {text}")
            block.kind = "exit"
        elif opcode in ("bar.sync", "barrier.sync", "barrier.cta.sync"):
            if guard or instruction.operands != ["0"]:
                raise Unsupported(f"{self.line}: {text} (barriers: 0, of all threads, unguarded)")
            block.kind = "barrier"
            block.instructions.append(instruction)
        else:
            block.instructions.append(instruction)
            return
        self.blocks.append(Block(len(self.blocks)))
