"""Memory traffic of launches, in sectors of 32 bytes.

asked     sectors that the load or store instructions of a CTA ask for: those that several of its warps ask
          for in the same execution of an instruction count once, as the SM's first cache joins them. To be
          compared with streams: a kernel that reads [N, V] once asks for its sectors once.
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
    from .parser import Instruction

SECTOR = 32


@dataclass
class Access:
    """One load or store instruction, over all its executions."""

    instruction: Instruction
    parameter: int
    write: bool
    bytes_a_thread: int
    threads: int = 0
    warps: int = 0  # with a thread in it
    sectors: int = 0  # asked for, a CTA
    warp_sectors: int = 0  # asked for, a warp

    @property
    def full_width(self) -> bool:
        return self.bytes_a_thread == 16

    @property
    def coalesced(self) -> bool:
        """All 32 lanes of each warp, in a run of bytes: no more sectors than a run off a boundary covers."""
        run = 32 * self.bytes_a_thread // SECTOR
        return self.threads == 32 * self.warps and self.warp_sectors <= self.warps * (run + 1)


@dataclass
class Traffic:
    """Of the launches since it was made."""

    accesses: dict[tuple[str, int], Access] = field(default_factory=dict)
    _touched: dict[tuple[int, bool], list[Array]] = field(default_factory=dict)

    def add(
        self, group: Group, number: int, parameter: int, at: Array, threads: Array, size: int, write: bool
    ) -> None:
        kernel = group.kernel
        access = self.accesses.setdefault(
            (kernel.text, number), Access(kernel.instructions[number], parameter, write, size)
        )
        numbers = group.number if threads is None else threads
        # A thread's bytes never cross a sector, as they are aligned and at most 16.
        sectors = at // U8(SECTOR)
        access.threads += len(numbers)
        access.warps += len(np.unique(numbers >> 5))
        # Sectors of different warps or CTAs apart: addresses have 48 bits.
        access.warp_sectors += len(np.unique(sectors | ((numbers >> 5).astype(U8) << U8(44))))
        access.sectors += len(np.unique(sectors | (group.own_cta[numbers].astype(U8) << U8(44))))
        self._touched.setdefault((parameter, write), []).append(np.unique(sectors))

    def asked(self, parameter: int, write: bool) -> int:
        """Bytes of a parameter's tensor that are asked for."""
        found = (a for a in self.accesses.values() if a.parameter == parameter and a.write == write)
        return SECTOR * sum(a.sectors for a in found)

    def touched(self, parameter: int, write: bool) -> int:
        """Bytes of the different sectors of a parameter's tensor."""
        found = self._touched.get((parameter, write), [])
        return SECTOR * len(np.unique(np.concatenate(found))) if found else 0
