"""Which accesses nothing puts in order.

Happens-before in a launch: a barrier of the CTA orders what its threads did before against what they do
after; a barrier of a warp (bar.warp.sync) does so for that warp; a thread's own accesses are in order;
nothing orders two CTAs. Shuffles order no memory. Two accesses to the same bytes that are not in order, one
of them a write, are a race.

A phase is the number of CTA barriers before an access, times 4096, plus the number of the warp's own since.
For each granule of memory the last write and the last read are kept; that several threads read it is kept
beside them, as only one can be the last."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import I4, U1, Array

WARP_PHASES = 12  # bits of a phase that count a warp's own barriers

# (kind, which of the accesses, whether between CTAs, number of the other instruction, other thread)
Found = Callable[[str, Array, Array, Array, Array], None]


class Shadow:
    """Who touched each granule last. Threads count from 1, over all CTAs of the launch."""

    def __init__(self, granules: int, threads: int):
        self.threads = threads
        self.writer, self.write_phase, self.write_at = (np.zeros(granules, I4) for _ in range(3))
        self.reader, self.read_phase, self.read_at = (np.zeros(granules, I4) for _ in range(3))
        # Another reader that nothing orders with the last one.
        self.other_reader, self.other_at = np.zeros(granules, I4), np.zeros(granules, I4)
        self.warp_readers = np.zeros(granules, I4)  # phase in which several threads of one warp read it
        self.cta_readers = np.zeros(granules, I4)  # CTA barriers before several warps of a CTA read it
        self.grid_readers = np.zeros(granules, U1)  # whether several CTAs read it

    def _unordered(self, who: Array, then: Array, me: Array, now: Array) -> tuple[Array, Array]:
        """(accesses of others that are not in order with mine, those of them by other CTAs)"""
        other = (who != 0) & (who != me)
        far = (who - 1) // self.threads != (me - 1) // self.threads
        same_interval = (then >> WARP_PHASES) == (now >> WARP_PHASES)
        same_warp = (who - 1) >> 5 == (me - 1) >> 5
        return other & (far | (same_interval & (~same_warp | (then == now)))), far

    def read(self, at: Array, me: Array, now: Array, number: int, found: Found) -> None:
        writer = self.writer[at]
        if writer.any():
            bad, far = self._unordered(writer, self.write_phase[at], me, now)
            if bad.any():
                found("write-read", bad, far, self.write_at[at], writer)
        self._note_readers(at, me, now)
        self.reader[at] = me
        self.read_phase[at] = now
        self.read_at[at] = number
        # Several threads in this one instruction: one of them is the last, the others are noted.
        self._note_readers(at, me, now)

    def _note_readers(self, at: Array, me: Array, now: Array) -> None:
        reader = self.reader[at]
        if not reader.any():
            return
        bad, far = self._unordered(reader, self.read_phase[at], me, now)
        if not bad.any():
            return
        self.other_reader[at[bad]] = reader[bad]
        self.other_at[at[bad]] = self.read_at[at[bad]]
        self.grid_readers[at[bad & far]] = 1
        near, same_warp = bad & ~far, (reader - 1) >> 5 == (me - 1) >> 5
        self.warp_readers[at[near & same_warp]] = now[near & same_warp]
        self.cta_readers[at[near & ~same_warp]] = now[near & ~same_warp] >> WARP_PHASES

    def write(self, at: Array, me: Array, now: Array, number: int, changed: Array, found: Found) -> None:
        """changed: whether the value is another than the one that was there; a race of equal values is
        named."""
        writer = self.writer[at]
        if writer.any():
            bad, far = self._unordered(writer, self.write_phase[at], me, now)
            if bad.any():
                same = "" if (bad & changed).any() else ", same value"
                found(f"write-write{same}", bad, far, self.write_at[at], writer)
        reader = self.reader[at]
        if reader.any():
            last, far = self._unordered(reader, self.read_phase[at], me, now)
            interval, grid = self.cta_readers[at], self.grid_readers[at] != 0
            bad = last | grid | (self.warp_readers[at] == now)
            bad = bad | ((interval == now >> WARP_PHASES) & (interval != 0))
            if bad.any():
                same = "" if (bad & changed).any() else ", same value"
                line = np.where(last, self.read_at[at], self.other_at[at])
                who = np.where(last, reader, self.other_reader[at])
                found(f"read-write{same}", bad, np.where(last, far, grid), line, who)
        self.writer[at] = me
        self.write_phase[at] = now
        self.write_at[at] = number
