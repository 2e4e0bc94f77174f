"""GPUs by the numbers that bound a row kernel, and the bounds that follow.

Compute capability 8.0, 9.0 and 10.0 alike: a multiprocessor issues four warp instructions and 16 special
functions a clock (CUDA C++ programming guide, arithmetic throughput) and holds 64 warps, 32 programs and
65,536 registers (the same, technical specifications).
"""

from __future__ import annotations

from dataclasses import dataclass

LANES_ISSUED = 4 * 32
SPECIAL_FUNCTIONS = 16
WARPS, PROGRAMS, REGISTERS = 64, 32, 65536
# A warp gets registers in units of 256; every program takes 1 KB of shared memory for the system.
REGISTER_UNIT, SYSTEM_SHARED = 256, 1024
SHARED = {"80": 164 * 1024, "90": 228 * 1024, "100": 228 * 1024}


@dataclass(frozen=True)
class GPU:
    """processors: multiprocessors.  clock: GHz, highest.  bandwidth: TB/s, reads plus writes."""

    name: str
    arch: str
    processors: int
    clock: float
    bandwidth: float
    source: str

    @property
    def issue(self) -> float:
        """Lane instructions a second, 1e12."""
        return self.processors * LANES_ISSUED * self.clock / 1e3

    @property
    def special(self) -> float:
        """Special functions a second, 1e12."""
        return self.processors * SPECIAL_FUNCTIONS * self.clock / 1e3


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", "80", 108, 1.41, 2.04, "A100 80GB SXM datasheet"),
        GPU("H100", "90", 132, 1.98, 3.35, "H100 SXM datasheet"),
        GPU("H200", "90", 132, 1.98, 4.3, "device properties and a copy in PyTorch, read plus written bytes"),
        GPU(
            "B200", "100", 148, 1.98, 8.0, "HGX B200 datasheet; clock and processors from published listings"
        ),
    )
}
DEFAULT = {"80": "A100", "90": "H200", "100": "B200"}


@dataclass(frozen=True)
class Rates:
    """1e12 logits a second that each resource alone would allow."""

    issue: float
    special: float
    bandwidth: float

    @property
    def bound(self) -> str:
        return min(("issue", "special", "bandwidth"), key=lambda name: getattr(self, name))


def rates(gpu: GPU, instructions: float, mufu: float, bytes_moved: float) -> Rates:
    """instructions, mufu, bytes_moved: for one logit."""
    special = gpu.special / mufu if mufu else float("inf")
    return Rates(gpu.issue / instructions, special, gpu.bandwidth / bytes_moved)


def programs(arch: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that a multiprocessor holds at a time."""
    a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (a_warp * num_warps)
    by_shared = SHARED[arch] // (shared_bytes + SYSTEM_SHARED)
    return min(PROGRAMS, WARPS // num_warps, by_registers, by_shared)


def occupancy(arch: str, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps as a fraction of the most that a multiprocessor holds."""
    return programs(arch, registers, shared_bytes, num_warps) * num_warps / WARPS
