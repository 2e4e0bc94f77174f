"""Which source lines and which basic blocks of the kernels ran.

A kernel has many specialisations, each with blocks of its own. Lines are counted over all of them; blocks
twice: each by itself, and by place, where a place is a kernel and the source line that a block begins with:
a place ran when it ran in one specialisation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .codegen import Kernel

# Lines of Triton's own library, and those that the compiler could not attribute (line 0).
FOREIGN = ("standard.py:", "__init__.py:")


@dataclass
class Coverage:
    """specialisations: by a hash of the PTX, (kernel, lines of each block, hits of each block)."""

    specialisations: dict[str, tuple[str, list[list[str]], list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Coverage:
        found = cls()
        for kernel in kernels:
            key = hashlib.sha256(kernel.text.encode()).hexdigest()
            lines = [[i.line for i in block.instructions] for block in kernel.blocks]
            found.specialisations[key] = (kernel.name, lines, list(kernel.hits))
        return found

    def merge(self, specialisations: dict[str, Any]) -> None:
        for key, (name, lines, hits) in specialisations.items():
            if key in self.specialisations:
                hits = [a + b for a, b in zip(self.specialisations[key][2], hits, strict=True)]
            self.specialisations[key] = (name, lines, hits)

    def lines(self) -> tuple[set[str], set[str]]:
        """(source lines that ran, all of them)."""
        ran, known = set(), set()
        for _, blocks, hits in self.specialisations.values():
            for lines, count in zip(blocks, hits, strict=True):
                own = {x for x in lines if not x.startswith(FOREIGN) and not x.endswith(":0") and x != "?"}
                known |= own
                if count:
                    ran |= own
        return ran, known

    def blocks(self) -> tuple[int, int]:
        """(blocks that ran, all of them), those of each specialisation by itself."""
        counts = [
            count
            for _, blocks, hits in self.specialisations.values()
            for lines, count in zip(blocks, hits, strict=True)
            if lines
        ]
        return sum(1 for c in counts if c), len(counts)

    def places(self) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """((kernel, line) of blocks that ran, of all). A block without a line of its own has no place."""
        ran, known = set(), set()
        for name, blocks, hits in self.specialisations.values():
            for lines, count in zip(blocks, hits, strict=True):
                place = next((x for x in lines if x != "?" and not x.endswith(":0")), None)
                if place is not None:
                    known.add((name, place))
                    if count:
                        ran.add((name, place))
        return ran, known
