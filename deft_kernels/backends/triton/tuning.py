"""Launch parameters, one table; every entry says what it rests on.

Measured on one H200 (Triton 3.6, torch 2.11), bf16, by `benchmarks/sweep.py`, whose records are under
`benchmarks/results/nvidia-h200`: times there are over that of a copy of the logits (4.29 TB/s). Other GPUs,
fp32 and fp16 take the same entries, by the bytes of a row; they were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Launch:
    """num_warps: warps a program.  width: columns of a thread's load.  warp: threads of a warp.
    tail: a row's last columns as one masked turn, see `state.reduce_row`.
    near: hints to the L2 cache about a row that is read twice, see there and `gradient.write_gradient`.
    deep: twice as many tiles in flight a lane, see the same.
    registers: of a thread, at most; 0: as many as ptxas takes by itself.
    """

    num_warps: int
    width: int
    warp: int = 32
    tail: bool = False
    near: bool = False
    deep: bool = False
    registers: int = 0

    def __post_init__(self) -> None:
        if self.lanes < 2 * self.width:
            raise ValueError(f"{self}: a row's edges take 2 width lanes, of {self.lanes}")

    @property
    def lanes(self) -> int:
        return self.num_warps * self.warp

    @property
    def tile(self) -> int:
        return self.lanes * self.width


# Bytes of a row from which one program has a multiprocessor to itself in `fused`: between 50,257 and 128,256
# bf16 logits, where the order of the candidates changes.
WIDE_ROW = 150_000
# Up to which four programs of 8 warps share it: between 32,000 and 50,257.
NARROW_ROW = 80_000
# A turn of 8 warps with eight tiles of 16 bytes a lane.
DEEP_TURN = 32_768


def _warps(vocabulary: int, width: int, warp: int, most: int) -> int:
    """The most warps with which a row still fills one turn of four tiles."""
    warps = 1
    while warps < most and vocabulary >= 2 * warps * warp * width * 4:
        warps *= 2
    return warps


@lru_cache(maxsize=256)
def statistics(vocabulary: int, itemsize: int, entropy: bool, warp: int = 32) -> Launch:
    """4,096 x 32,000: 0.64 copies with 4 warps, 0.72 with 8; 8,192 x 128,256: 0.507 and 0.508;
    4,096 x 262,144: 0.529 and 0.497. With the entropy, at 90 registers a thread, 4 warps: 0.55 to 0.72, where
    8 take 0.60 to 1.05. The tail as one turn: 0.64 for 0.68 at V = 32,000, no difference where V is large.
    """
    width = 16 // itemsize
    most = 8 if vocabulary * itemsize >= WIDE_ROW and not entropy else 4
    return Launch(_warps(vocabulary, width, warp, most), width, warp, tail=True)


@lru_cache(maxsize=256)
def gradient(vocabulary: int, itemsize: int, warp: int = 32) -> Launch:
    """1.08 copies at V = 32,000, 128,256 and 262,144, 1.17 at 50,257, where 8 warps take 1.15. Between 1 and
    8 warps, and 4 and 16 turns a program, nothing differs by more than 0.03."""
    width = 16 // itemsize
    return Launch(_warps(vocabulary, width, warp, 4), width, warp)


@lru_cache(maxsize=256)
def fused(vocabulary: int, itemsize: int, lean: bool, warp: int = 32) -> Launch:
    """Wide programs, so that few rows are in flight and the second read of a row finds it in L2, which holds
    about 34 MB of rows: 132 rows of 256 KB, one a multiprocessor, are read 1.06 times from memory with the
    hints, 1.21 without, and twice once two rows share a multiprocessor (counted by Nsight Compute).

    Between its two passes a program loads nothing, and all its warps compute the row's formulas: so fewer
    warps, each with more in flight (`deep`), where their registers still let as many rows in.

    lean: see `launch.lean`; 32 warps then have registers enough. Copies, in place, not deep and deep, by
    warps, H200: V = 32,000: 1.35 (16), 1.23 (8); 50,257: 1.35 (16), 1.38 (8); 128,256: 1.27 (32), 1.32 (32);
    262,144: 1.40 (32), whose rows no longer fit, 1.39 (32). With the entropy: 1.49, 1.43 (8); 1.56, 1.42 (8);
    1.48, 1.40 (16); 1.67, 1.46 (16). H100: 1.11, 1.09 (8); 1.14, 1.18 (8), 1.11 (16); 1.09, 1.06 (32); 1.34,
    1.37 (32). With the entropy: 1.23, 1.15 (8); 1.28, 1.20 (8); 1.24, 1.16 (16); 1.46, 1.34 (16).
    80 registers: three programs of 8 warps share a multiprocessor (72, measured: 1.09; 64, four: 1.14).
    """
    width, row = 16 // itemsize, vocabulary * itemsize
    wide = row >= WIDE_ROW
    if not lean:
        most, deep, registers = 16 if wide else 8, row >= DEEP_TURN, 128
    elif wide:
        most, deep, registers = 32, False, 64
    elif row >= NARROW_ROW or row < DEEP_TURN:
        most, deep, registers = 16, False, 0
    else:
        most, deep, registers = 8, True, 80
    # 512 threads on wavefronts of 64: with 1024, gfx942 has 128 registers a thread and spills.
    most = most if warp == 32 else min(most, 8)
    warps = _warps(vocabulary, width, warp, most)
    return Launch(warps, width, warp, tail=True, near=True, deep=deep, registers=registers)


def splits(rows: int, vocabulary: int, tile: int, processors: int) -> int:
    """Programs a row: 1 when the rows fill the device twice over, else enough to, each with a turn at least.
    8 x 128,256: 7.4 us with 32 programs of 4 warps, 7.5 with 16 of 8; 10.7 with 3, of four turns at least."""
    if rows >= 2 * processors:
        return 1
    wanted = -(-2 * processors // max(1, rows))
    longest = max(1, vocabulary // (4 * tile))
    return max(1, min(wanted, longest, 64))
