"""Launch parameters, one table; every entry says what it rests on.

No entry has been measured on a GPU yet: they follow from compiled code and from a count of bytes in flight,
as each comment says. `benchmarks/sweep.py` measures what will replace them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """num_warps: warps a program.  width: columns of a thread's load.  warp: threads of a warp.
    tail: a row's last columns as one masked turn, see `state.reduce_row`.
    near: hints to the L2 cache about a row that is read twice, see there and `sweep.write_gradient`.
    """

    num_warps: int
    width: int
    warp: int = 32
    tail: bool = False
    near: bool = False

    @property
    def lanes(self) -> int:
        return self.num_warps * self.warp

    @property
    def tile(self) -> int:
        return self.lanes * self.width


def _warps(vocabulary: int, width: int, warp: int, most: int) -> int:
    """The most warps with which a row still fills the head tile and one turn of four."""
    warps = 1
    while warps < most and vocabulary >= 2 * warps * warp * width * 5:
        warps *= 2
    return warps


def statistics(vocabulary: int, itemsize: int, warp: int = 32) -> Launch:
    """16-byte loads; up to 8 warps: 55 registers a thread (compiled, sm_90) then leave 4 rows an SM and four
    loads each, 64 KB in flight, above the 40 KB that latency times bandwidth asks of an H200's SM. With the
    entropy 88 registers leave 2 rows and 32 KB: fewer warps are the sweep's first question there."""
    width = 16 // itemsize
    return Launch(_warps(vocabulary, width, warp, 8), width, warp)


def gradient(vocabulary: int, itemsize: int, warp: int = 32) -> Launch:
    """As `statistics`: the loop is lighter, and four warps with two loads a turn fill an SM with 16 rows."""
    width = 16 // itemsize
    return Launch(_warps(vocabulary, width, warp, 4), width, warp)


def fused(vocabulary: int, itemsize: int, warp: int = 32) -> Launch:
    """Wide programs, few rows an SM, so that a row's second read finds it in L2: 132 rows of 256 KB in 60 MB
    only just fit, two of them an SM do not."""
    width = 16 // itemsize
    # 512 threads on either warp size: with 1024, gfx942 has 128 registers a thread and spills.
    return Launch(_warps(vocabulary, width, warp, 512 // warp), width, warp)


def splits(rows: int, vocabulary: int, tile: int, processors: int) -> int:
    """Programs a row: 1 when the rows fill the device twice over, else enough to, of four turns at least."""
    if rows >= 2 * processors:
        return 1
    wanted = -(-2 * processors // max(1, rows))
    longest = max(1, vocabulary // (16 * tile))
    return max(1, min(wanted, longest, 64))
