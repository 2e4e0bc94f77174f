"""Memory traffic of launches, in sectors of 32 bytes.

asked     sectors that a CTA asks for. One that it asks for again while it moves the next 16 KiB counts
          once, as the SM's first cache keeps that much: masked loads of 2 bytes ask for a sector many times
          in a row. To be compared with streams: a kernel that reads [N, V] twice asks twice.
touched   different sectors of a launch: what has to come from memory if the caches lose nothing.

Run in lockstep, where the warps of a CTA execute an instruction together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import U8, Array

if TYPE_CHECKING:
    from .group import Group
    from .memory import Elements, TensorLike
    from .parser import Instruction

SECTOR = 32
WINDOW = 16384 // SECTOR


@dataclass
class Access:
    """One load or store instruction, over all its executions."""

    instruction: Instruction
    tensor: int  # the address of its first element
    write: bool
    bytes_a_thread: int
    threads: int = 0
    warps: int = 0  # with a thread in it
    sectors: int = 0  # asked for by CTAs
    warp_sectors: int = 0  # asked for by warps

    @property
    def full_width(self) -> bool:
        return self.bytes_a_thread == 16

    @property
    def coalesced(self) -> bool:
        """All 32 lanes of each warp, in a run of bytes: no more sectors than a run off a boundary covers."""
        run = 32 * self.bytes_a_thread // SECTOR
        return self.threads == 32 * self.warps and self.warp_sectors <= self.warps * (run + 1)


class Recent:
    """When each CTA last asked for each sector of a tensor, in sectors that it has moved since it began."""

    def __init__(self, first: int, end: int, ctas: int):
        self.first, self.count = first // SECTOR, (end - 1) // SECTOR - first // SECTOR + 1
        self.last = np.full(ctas * self.count, -WINDOW - 1)
        self.moved = np.zeros(ctas, np.int64)

    def misses(self, ctas: Array, sectors: Array) -> int:
        asked = np.unique(ctas * self.count + (sectors.astype(np.int64) - self.first))
        own = asked // self.count
        new = self.moved[own] - self.last[asked] > WINDOW
        self.moved += np.bincount(own[new], minlength=len(self.moved))
        self.last[asked] = self.moved[own]
        return int(new.sum())


@dataclass
class Traffic:
    """Of the launches since it was made."""

    accesses: dict[tuple[str, int], Access] = field(default_factory=dict)
    _touched: dict[tuple[int, bool], list[Array]] = field(default_factory=dict)
    _recent: dict[tuple[int, bool], Recent] = field(default_factory=dict)

    def begin(self) -> None:
        """Another launch: its CTAs know nothing of those before."""
        self._recent = {}

    def add(
        self, group: Group, number: int, elements: Elements, at: Array, threads: Array, size: int, write: bool
    ) -> None:
        kernel, tensor = group.kernel, elements.first
        access = self.accesses.setdefault(
            (kernel.text, number), Access(kernel.instructions[number], tensor, write, size)
        )
        numbers = group.number if threads is None else threads
        # A thread's bytes never cross a sector, as they are aligned and at most 16.
        sectors = at // U8(SECTOR)
        access.threads += len(numbers)
        access.warps += len(np.unique(numbers >> 5))
        # Sectors of different warps apart: addresses have 48 bits.
        access.warp_sectors += len(np.unique(sectors | ((numbers >> 5).astype(U8) << U8(44))))
        if (tensor, write) not in self._recent:
            grid = int(np.prod(group.launch.grid))
            self._recent[tensor, write] = Recent(tensor, elements.end, grid)
        ctas = group.ctas[group.own_cta[numbers]]
        access.sectors += self._recent[tensor, write].misses(ctas, sectors)
        self._touched.setdefault((tensor, write), []).append(np.unique(sectors))

    def of(self, tensor: TensorLike, write: bool) -> list[Access]:
        """The loads from a tensor, or the stores to it."""
        first = tensor.data_ptr()
        return [a for a in self.accesses.values() if a.tensor == first and a.write == write]

    def asked(self, tensor: TensorLike, write: bool) -> int:
        """Bytes of a tensor that are asked for."""
        return SECTOR * sum(a.sectors for a in self.of(tensor, write))

    def touched(self, tensor: TensorLike, write: bool) -> int:
        """Bytes of the different sectors of a tensor."""
        found = self._touched.get((tensor.data_ptr(), write), [])
        return SECTOR * len(np.unique(np.concatenate(found))) if found else 0
