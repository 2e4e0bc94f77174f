"""Machine code for NVIDIA GPUs, read: the loops of a kernel and what one turn of each costs.

Triton's wheel ships the tools (cuobjdump, nvdisasm), so neither a GPU nor a CUDA toolkit is needed. Counts
are static: every instruction between a loop's label and the branch back to it, under a predicate or not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import triton


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor: registers a thread, bytes of the rest."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Loop:
    """One turn of a loop, as one thread sees it."""

    instructions: int
    logits: float
    load_bits: int  # the widest load
    mufu: int  # special functions: exponentials, reciprocals
    barriers: int
    shuffles: int
    stores: int

    @property
    def kind(self) -> str:
        """A loop that writes to global memory makes the gradient; one that only reads, the statistics."""
        return "gradient" if self.stores else "statistics"


def _run(tool: str, *options: str, cubin: bytes) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin=cubin)


def _bits(text: str) -> int:
    """Width of a load or store; 32 where the mnemonic names none."""
    named = re.search(r"\.[US]?(8|16|64|128|256)\b", text.split()[0] if text[0] != "@" else text.split()[1])
    return int(named[1]) if named else 32


def usage(cubin: bytes, sass: str, shared_bytes: int) -> Usage:
    """shared_bytes: as the launch asks for them; the file itself names only what the system takes."""
    printed = _run("cuobjdump", "-res-usage", cubin=cubin)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    spilled = sum(_bits(text) // 8 for _, text in instructions(sass) if re.search(r"\b(?:LDL|STL)\b", text))
    return Usage(numbers["REG"], spilled + numbers.get("LOCAL", 0), numbers["STACK"], shared_bytes)


def instructions(sass: str) -> list[tuple[str, str]]:
    """(label, "") and ("", instruction), in order."""
    found: list[tuple[str, str]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            found.append((label[1], ""))
            continue
        text = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if text:
            found.append(("", text[1].strip()))
    return found


def innermost(sass: str) -> list[list[str]]:
    """Bodies of the innermost loops: from a label to the branch back to it, with no loop inside."""
    code = instructions(sass)
    position = {label: index for index, (label, _) in enumerate(code) if label}
    spans = []
    for index, (_, text) in enumerate(code):
        branch = re.search(r"BRA(?:\.\S+)?\s.*?\(?`?\(?(\.L_x_\d+)", text) if "BRA" in text else None
        if branch and position.get(branch[1], index) < index:
            spans.append((position[branch[1]], index))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for _, text in code[start : stop + 1] if text] for start, stop in inner]


def count(body: list[str], bytes_per_logit: float) -> Loop:
    """bytes_per_logit: what the loop reads from global memory for one logit."""
    loads = [_bits(text) for text in body if re.search(r"\bLDG(?:STS)?\.", text)]
    return Loop(
        instructions=len(body),
        logits=sum(loads) / 8 / bytes_per_logit,
        load_bits=max(loads, default=0),
        mufu=sum("MUFU" in text for text in body),
        barriers=sum("BAR." in text for text in body),
        shuffles=sum("SHFL" in text for text in body),
        stores=sum(bool(re.search(r"\bSTG\.", text)) for text in body),
    )


def whole(sass: str, bytes_per_logit: float) -> Loop:
    """A kernel without a loop, whose program is its one turn, up to the last exit. Its widest loads are the
    logits'; the narrower ones fetch numbers of the row."""
    code = [text for _, text in instructions(sass) if text]
    last = max(index for index, text in enumerate(code) if "EXIT" in text)
    turn = count(code[: last + 1], bytes_per_logit)
    wide = sum(bool(re.search(r"\bLDG\.", text)) and _bits(text) == turn.load_bits for text in code)
    return replace(turn, logits=wide * turn.load_bits / 8 / bytes_per_logit)


def main_loops(sass: str, bytes_per_logit: float) -> list[Loop]:
    """The loop over the vocabulary that only reads and the one that also writes, where a kernel has them.

    A kernel also has loops for the masked ends of a row. They are told by what a turn handles: the main loop
    of a kind reads the most logits a turn and, among equals, does the most with them.
    """
    found: dict[str, Loop] = {}
    for body in innermost(sass):
        loop = count(body, bytes_per_logit)
        if loop.logits == 0 or 2 * loop.mufu < loop.logits:
            continue  # zeros for ignored rows, a count of ties: no exponential of every logit or pair
        best = found.get(loop.kind)
        if best is None or (loop.logits, loop.instructions) > (best.logits, best.instructions):
            found[loop.kind] = loop
    return [found[kind] for kind in ("statistics", "gradient") if kind in found]
