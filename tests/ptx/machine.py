"""A launch: its memory, its schedule, its checks.

Divergence: every thread waits at a basic block; the lowest block in the text that threads wait for runs
next, for all of them, which brings branches together again where the compiler laid them out to meet.
Nothing passes a barrier before all threads of the group stand at it. Between two barriers the order is one
of

    lockstep   all warps of many CTAs together
    warps      one warp after the other, another random order each interval
    ctas       one CTA after the other, in random order

A result that depends on the order is a race, whether or not it was reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .approximations import Noise
from .arithmetic import Array
from .codegen import Kernel
from .group import Group
from .memory import Global, TensorLike
from .races import Shadow
from .reports import Reports
from .traffic import Traffic

ORDERS = ("lockstep", "warps", "ctas")
TOGETHER = 32768  # threads of a group in lockstep: more, and NumPy's arrays leave the cache


@dataclass(frozen=True)
class Settings:
    """How launches run. noise: of the approximated instructions, see `approximations`."""

    order: str = "lockstep"
    seed: int = 0
    noise: str = "exact"
    check: bool = True  # look for races and unwritten shared memory

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: unknown name {self.order!r}; known: {', '.join(ORDERS)}")
        Noise(self.noise)


class Launch:
    """parameters: in the kernel's order, NumPy scalars; tensors: those of them that are pointers, by
    position. shared: bytes a CTA."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], shared: int, parameters: list[Any],
        tensors: Mapping[int, TensorLike], reports: Reports, settings: Settings,
        traffic: Traffic | None = None,
    ):  # fmt: skip
        self.kernel, self.grid, self.shared, self.parameters = kernel, grid, shared, parameters
        self.reports, self.traffic, self.check, self.order = reports, traffic, settings.check, settings.order
        self.random = np.random.default_rng(settings.seed)
        self.noise = Noise(settings.noise, settings.seed)
        self.granule = kernel.granule
        self.memory = Global(tensors, self.granule)
        self.shadow = Shadow(self.memory.granules + 1 if self.check else 0, kernel.threads)
        if traffic is not None:
            traffic.begin()
        self.interval = 1
        self.barriers = 0

    def place(self, number: int) -> str:
        return self.kernel.instructions[number].where

    def run(self) -> None:
        count, per = self.grid[0] * self.grid[1] * self.grid[2], self.kernel.threads
        if per % 32:
            raise ValueError(f"{self.kernel.name}: {per} threads a CTA, which are no whole warps")
        order, step = np.arange(count), max(1, TOGETHER // per)
        if self.order == "ctas":
            order, step = self.random.permutation(count), 1
        with np.errstate(all="ignore"):
            for first in range(0, count, step):
                self._run_group(Group(self, order[first : first + step], self.interval))

    def _run_group(self, group: Group) -> None:
        registers = self.kernel.initial()
        warp = group.number % self.kernel.threads // 32
        waiting = {0: group.live.copy()}
        while waiting:
            runnable, waiting = waiting, {}
            if self.order == "warps":
                for w in self.random.permutation(self.kernel.threads // 32):
                    mine = {b: m & (warp == w) for b, m in runnable.items()}
                    self._until_barrier(group, registers, {b: m for b, m in mine.items() if m.any()}, waiting)
            else:
                self._until_barrier(group, registers, runnable, waiting)
            self.interval += 1
            self.barriers += 1
            if waiting:
                self._check_barrier(group, waiting)
                group.begin(self.interval)

    def _check_barrier(self, group: Group, waiting: dict[int, Array]) -> None:
        """Every thread of a CTA that still lives has to stand at one and the same barrier."""
        if len(waiting) == 1 and group.live.all():
            return
        at: Array = np.full(group.count, -1)
        for block, m in waiting.items():
            at[m] = block
        at, live = at.reshape(len(group.ctas), -1), group.live.reshape(len(group.ctas), -1)
        lines = " / ".join(
            self.place(self.kernel.blocks[block - 1].instructions[-1].number) for block in sorted(waiting)
        )
        some = live.any(1) & ~live.all(1)
        if some.any():
            self.reports.add("barrier that threads which ended never reach", self.kernel.name, lines)
        if ((at.min(1) != at.max(1)) & ~some).any():
            self.reports.add("threads of a CTA at different barriers", self.kernel.name, lines)

    def _until_barrier(
        self, group: Group, registers: list[Any], runnable: dict[int, Array], waiting: dict[int, Array]
    ) -> None:
        def arrive(table: dict[int, Array], block: int, m: Array) -> None:
            table[block] = table[block] | m if block in table else m

        while runnable:
            index = min(runnable)
            m = runnable.pop(index)
            block = self.kernel.blocks[index]
            here = int(np.count_nonzero(m))
            sel = None if here == group.count else np.flatnonzero(m)
            self.kernel.hits[index] += 1
            full = here == int(np.count_nonzero(group.live))
            condition = self.kernel.code[index](group, registers, m, sel, full)
            if block.kind == "exit":
                group.live = group.live & ~m
            elif block.kind == "barrier":
                arrive(waiting, block.following, m)
            elif block.kind == "jump":
                arrive(runnable, block.target, m)
            else:
                taken = m & condition
                passed = int(np.count_nonzero(taken))
                if passed:
                    arrive(runnable, block.target, taken)
                if passed < here:
                    arrive(runnable, block.following, m & ~taken)
