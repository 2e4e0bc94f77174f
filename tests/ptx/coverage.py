"""Which source lines and which basic blocks of the kernels ran.

A kernel has many specialisations, each with blocks of its own. Lines are counted over all of them; blocks
twice: each by itself, and by place, where a place is a kernel and the source line that a block begins with:
a place ran when it ran in one specialisation. A block that did not run is behind a branch that did, and
never went that way: `one_way` names those branches, so that each can be given a reason."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .codegen import Kernel
from .parser import Block

# Lines of Triton's own library, and those that the compiler could not attribute (line 0).
FOREIGN = ("standard.py:", "__init__.py:")


def _ends(blocks: list[Block]) -> Iterator[tuple[str, list[int]]]:
    """Where each block ends: the line of its branch, or of what comes before it where the compiler gives it
    none, and the blocks that may follow."""
    last = "?"
    for block in blocks:
        for line in [*(i.line for i in block.instructions), block.line]:
            if line != "?" and not line.endswith(":0"):
                last = line
        yield last, block.successors


@dataclass
class Coverage:
    """specialisations: by a hash of the PTX, (kernel, lines of each block, hits of each block, and where each
    ends: the line of its branch, the blocks that may follow)."""

    specialisations: dict[str, tuple[str, list[list[str]], list[int], list[tuple[str, list[int]]]]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, kernels: Iterable[Kernel]) -> Coverage:
        found = cls()
        for kernel in kernels:
            key = hashlib.sha256(kernel.text.encode()).hexdigest()
            lines = [[i.line for i in block.instructions] for block in kernel.blocks]
            ends = list(_ends(kernel.blocks))
            found.specialisations[key] = (kernel.name, lines, list(kernel.hits), ends)
        return found

    def merge(self, specialisations: dict[str, Any]) -> None:
        for key, (name, lines, hits, ends) in specialisations.items():
            if key in self.specialisations:
                hits = [a + b for a, b in zip(self.specialisations[key][2], hits, strict=True)]
            self.specialisations[key] = (name, lines, hits, ends)

    def lines(self) -> tuple[set[str], set[str]]:
        """(source lines that ran, all of them)."""
        ran, known = set(), set()
        for _, blocks, hits, _ in self.specialisations.values():
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
            for _, blocks, hits, _ in self.specialisations.values()
            for lines, count in zip(blocks, hits, strict=True)
            if lines
        ]
        return sum(1 for c in counts if c), len(counts)

    def places(self) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        """((kernel, line) of blocks that ran, of all). A block without a line of its own has no place."""
        ran, known = set(), set()
        for name, blocks, hits, _ in self.specialisations.values():
            for lines, count in zip(blocks, hits, strict=True):
                place = next((x for x in lines if x != "?" and not x.endswith(":0")), None)
                if place is not None:
                    known.add((name, place))
                    if count:
                        ran.add((name, place))
        return ran, known

    def one_way(self) -> Counter[tuple[str, str]]:
        """(kernel, line of a branch that never went one of its ways): how many blocks did not run for it, in
        all specialisations. A block behind several counts for each; one that nothing leads to, for "?"."""
        found: Counter[tuple[str, str]] = Counter()
        for name, blocks, hits, ends in self.specialisations.values():
            reached: set[int] = set()
            for (line, following), count in zip(ends, hits, strict=True):
                for first in following:
                    if count and first < len(hits) and not hits[first]:
                        behind = self._behind(first, hits, ends)
                        reached |= behind
                        found[name, line] += sum(1 for n in behind if blocks[n])
            lost = {n for n, count in enumerate(hits) if blocks[n] and not count} - reached
            if lost:
                found[name, "?"] += len(lost)
        return found

    def both_ways(self) -> set[str]:
        """Lines of branches that went either way, each in some specialisation."""
        return {
            line
            for _, _, hits, ends in self.specialisations.values()
            for line, following in ends
            if len(following) == 2 and all(hits[n : n + 1] and hits[n] for n in following)
        }

    @staticmethod
    def _behind(first: int, hits: list[int], ends: list[tuple[str, list[int]]]) -> set[int]:
        """Blocks that did not run, from one of them on."""
        behind, waiting = set(), [first]
        while waiting:
            n = waiting.pop()
            if n not in behind and n < len(hits) and not hits[n]:
                behind.add(n)
                waiting += ends[n][1]
        return behind
