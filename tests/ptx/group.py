"""CTAs that run together: what their threads know, and what instructions do that reach past a thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import F4, F8, I4, I8, U2, U4, Array, extreme, pack
from .memory import UNITS, Shared
from .parser import Unsupported
from .races import WARP_PHASES, Shadow
from .reports import Fault

if TYPE_CHECKING:
    from .machine import Launch


def close(a: Array, b: Array) -> bool:
    """Whether 32-bit words are fp32 that differ by a few ulp at most."""
    x, y = a.view(F4).astype(F8), b.view(F4).astype(F8)
    return bool((np.abs(x - y) <= 2.0**-21 * np.abs(x)).all())


class Group:
    """The `S` of generated code."""

    def __init__(self, launch: Launch, ctas: Array, interval: int):
        self.launch, self.kernel = launch, launch.kernel
        self.parameters, self.noise = launch.parameters, launch.noise
        per, self.ctas = self.kernel.threads, ctas
        self.count = len(ctas) * per
        self.number = np.arange(self.count)
        self.own_cta = np.repeat(np.arange(len(ctas)), per)
        linear = np.repeat(ctas, per)
        self.thread = (linear * per + self.number % per + 1).astype(I4)  # in the launch, from 1
        self.tid = (self.number % per).astype(U4)
        self.lane, self.threads = self.tid & U4(31), U4(per)
        x, y, _ = launch.grid
        where = (linear % x, linear // x % y, linear // (x * y))
        # One number where all threads hold the same: cheaper.
        self.cta = [U4(w[0]) if len(ctas) == 1 else w.astype(U4) for w in where]
        self.grid = [U4(n) for n in launch.grid]
        self.shared = Shared(len(ctas), launch.shared)
        self.shared_shadow = Shadow(len(ctas) * launch.shared // launch.granule + 8, per)
        self.live = np.ones(self.count, np.bool_)
        self.begin(interval)

    def begin(self, interval: int) -> None:
        """A barrier was passed: a new interval, whose accesses come after all before."""
        self.phase = np.full(self.count, interval << WARP_PHASES, I4)

    # Memory

    def _active(self, at: Array, guard: Array, m: Array, sel: Array) -> tuple[Array, Array]:
        """(indices of the threads that access memory, None for all; their addresses)."""
        if at.shape == ():
            at = np.broadcast_to(at, (self.count,))
        if guard is None:
            return (None, at) if sel is None else (sel, at[sel])
        on = np.flatnonzero(np.broadcast_to(guard, (self.count,)) & m)
        return on, at[on]

    def _fault(self, kind: str, number: int, **example: object) -> Fault:
        report = self.launch.reports.add(kind, self.kernel.name, self.launch.place(number), **example)
        return Fault(str(report))

    def _locate(self, space: str, at: Array, size: int, threads: Array, number: int, write: bool) -> Array:
        """Byte offsets into the space's array; raises for what a GPU would not let pass."""
        off = (at & at.dtype.type(size - 1)) != 0
        if off.any():
            raise self._fault(f"misaligned {space} access", number, bytes=size, address=int(at[off][0]))
        verb = "write" if write else "read"
        if space == "shared":
            if int(at.max()) + size > self.shared.size:
                raise self._fault(f"shared {verb} out of bounds", number, address=int(at.max()), bytes=size)
            cta = self.own_cta if threads is None else self.own_cta[threads]
            return cta * self.shared.size + at.astype(I8)
        # Integers of 64 bits, strides for example, look like pointers until the launch says what they are.
        sources = [n for n in self.kernel.pointers[number] if n in self.launch.memory.elements]
        if len(sources) != 1:
            made = sorted(sources) or "no tensor"
            raise Unsupported(
                f"{self.launch.place(number)}: an address made from {made}, not from one tensor"
            )
        (source,) = sources
        elements = self.launch.memory.elements[source]
        bad = elements.outside(at, size)
        if bad is not None:
            raise self._fault(
                f"{verb} outside a tensor's elements", number, parameter=source, bytes=size,
                offset=int(at[bad][0]) - elements.first, of=elements.end - elements.first,
                threads=int(bad.sum()),
            )  # fmt: skip
        if self.launch.traffic is not None:
            self.launch.traffic.add(self, number, elements, at, threads, size, write)
        return at

    def _track(self, space: str, at: Array, size: int, threads: Array, number: int, changed: Array) -> None:
        """Look for races; `changed` None for a read."""
        launch = self.launch
        if not launch.check:
            return
        if space == "global":
            shadow, granule = launch.shadow, launch.memory.granule
            granules = launch.memory.granule_of(at)
        else:
            shadow, granule = self.shared_shadow, launch.granule
            granules = at // granule
        me = self.thread if threads is None else self.thread[threads]
        now = self.phase if threads is None else self.phase[threads]
        each = max(1, size // granule)
        if each > 1:
            granules = (granules[:, None] + np.arange(each)).ravel()
            me, now = np.repeat(me, each), np.repeat(now, each)

        def found(kind: str, bad: Array, far: Array, other: Array, who: Array) -> None:
            n = int(np.flatnonzero(bad)[0])
            scope = "between CTAs" if far[n] else "within a CTA"
            per = self.kernel.threads
            pair = [(t // per, t % per) for t in (int(who[n]) - 1, int(me[n]) - 1)]
            launch.reports.add(
                f"race ({kind}) {scope}, {space}", self.kernel.name,
                f"{launch.place(int(other[n]))} / {launch.place(number)}",
                **{"CTA and thread": pair[0], "and": pair[1]},
            )  # fmt: skip

        if changed is None:
            if space == "shared" and (shadow.writer[granules] == 0).any():
                launch.reports.add(
                    "shared memory read that nobody wrote", self.kernel.name, launch.place(number)
                )
            shadow.read(granules, me, now, number, found)
        else:
            shadow.write(granules, me, now, number, np.repeat(changed, each), found)

    def load(
        self, space: str, at: Array, guard: Array, m: Array, sel: Array, size: int, vector: int, olds: Array,
        number: int,
    ) -> list[Array]:  # fmt: skip
        """`vector` values of `size` bytes a thread; `olds` where the guard is false."""
        threads, at = self._active(at, guard, m, sel)
        got = [np.zeros(0, UNITS[size])] * vector
        if at.size:
            bytes_ = self.launch.memory.bytes if space == "global" else self.shared.bytes
            where = self._locate(space, at, size * vector, threads, number, False)
            self._track(space, where, size * vector, threads, number, None)
            first = (where - where.dtype.type(self.launch.memory.base if space == "global" else 0)) // size
            got = [bytes_[size][first + first.dtype.type(n)] for n in range(vector)]
        if threads is None:
            return got
        result = []
        for n in range(vector):
            old = (
                np.zeros(self.count, UNITS[size]) if olds is None else np.broadcast_to(olds[n], (self.count,))
            )
            x = np.array(old)
            x[threads] = got[n]
            result.append(x)
        return result

    def store(
        self, space: str, at: Array, guard: Array, m: Array, sel: Array, size: int, values: tuple[Array, ...],
        number: int,
    ) -> None:  # fmt: skip
        threads, at = self._active(at, guard, m, sel)
        if not at.size:
            return
        bytes_ = (self.launch.memory.bytes if space == "global" else self.shared.bytes)[size]
        where = self._locate(space, at, size * len(values), threads, number, True)
        first = (where - where.dtype.type(self.launch.memory.base if space == "global" else 0)) // size
        cells = [first + first.dtype.type(n) for n in range(len(values))]
        values = tuple(x if x.shape == () or threads is None else x[threads] for x in values)
        changed = np.zeros(at.size, np.bool_)
        for cell, value in zip(cells, values, strict=True):
            changed |= bytes_[cell] != value
        self._track(space, where, size * len(values), threads, number, changed)
        for cell, value in zip(cells, values, strict=True):
            bytes_[cell] = value
        for cell, value in zip(cells, values, strict=True):
            lost = bytes_[cell] != value
            if lost.any():
                kept, other = bytes_[cell][lost], np.broadcast_to(value, lost.shape)[lost]
                near = ", a few ulp apart" if size == 4 and close(kept, other) else ""
                self.launch.reports.add(
                    f"race (one instruction, several values for an address{near}), {space}",
                    self.kernel.name, self.launch.place(number),
                )  # fmt: skip

    # Matrices in shared memory: section 9.7.14.5.15 and 16. A row's address is that of another lane.

    def _matrix_address(self, at: Array, matrix: int, half: int, transposed: bool) -> Array:
        at = np.broadcast_to(at, (self.count,))
        lane = self.number & 31
        row = (lane & 3) * 2 + half if transposed else lane >> 2
        column = (lane >> 2) * 2 if transposed else (lane & 3) * 4
        return at[(self.number & ~31) | (8 * matrix + row)] + column.astype(U4)

    def store_matrix(
        self, at: Array, values: tuple[Array, ...], transposed: bool, m: Array, sel: Array, number: int
    ) -> None:
        self._converged(m, number)
        for n, x in enumerate(values):
            x = np.broadcast_to(x, (self.count,))
            if not transposed:
                self.store("shared", self._matrix_address(at, n, 0, False), None, m, sel, 4, (x,), number)
                continue
            for half in (0, 1):
                part = (x >> U4(16 * half)).astype(U2)
                self.store(
                    "shared", self._matrix_address(at, n, half, True), None, m, sel, 2, (part,), number
                )

    def load_matrix(
        self, at: Array, count: int, transposed: bool, m: Array, sel: Array, number: int
    ) -> list[Array]:
        self._converged(m, number)

        def load(matrix: int, half: int, size: int) -> Array:
            where = self._matrix_address(at, matrix, half, transposed)
            return self.load("shared", where, None, m, sel, size, 1, None, number)[0]

        if not transposed:
            return [load(n, 0, 4) for n in range(count)]
        return [pack(load(n, 0, 2), load(n, 1, 2)) for n in range(count)]

    # Between the lanes of a warp

    def _converged(self, m: Array, number: int) -> None:
        lanes = m.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            self.launch.reports.add(
                "warp operation with lanes missing", self.kernel.name, self.launch.place(number)
            )

    def warp_barrier(self, m: Array, number: int) -> None:
        self._converged(m, number)
        self.phase = np.where(m, self.phase + 1, self.phase)

    def shuffle(self, kind: str, x: Array, operand: Array, clamp: int, m: Array, number: int) -> Array:
        """shfl.sync (9.7.9.6): a lane whose source is out of its segment keeps its own value."""
        self._converged(m, number)
        lane, b = self.number & 31, np.asarray(operand).astype(I8) & 31
        segment, last = (clamp >> 8) & 31, clamp & 31
        highest = (lane & segment) | (last & ~segment)
        if kind == "up":
            source, valid = lane - b, lane - b >= highest
        elif kind == "down":
            source, valid = lane + b, lane + b <= highest
        else:
            source = lane ^ b if kind == "bfly" else (lane & segment) | (b & ~segment)
            valid = source <= highest
        source = np.where(valid, source, lane)
        return np.broadcast_to(x, (self.count,))[(self.number & ~31) | source]

    def reduce_warp(self, how: str, x: Array, members: Array, m: Array, number: int) -> Array:
        """redux.sync (9.7.13.13). Triton hands the members in a register."""
        self._converged(m, number)
        if ((members != U4(0xFFFFFFFF)) & m).any():
            raise Unsupported(f"{self.launch.place(number)}: part of a warp")
        lanes = np.broadcast_to(x, (self.count,)).reshape(-1, 32)
        if how.endswith(".f32"):
            result = lanes[:, 0]
            for n in range(1, 32):
                result = extreme(result, lanes[:, n], how.startswith("max"), ".NaN" in how)
        else:
            function = {
                "min": np.minimum, "max": np.maximum, "add": np.add,
                "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
            }[how]  # fmt: skip
            result = function.reduce(lanes, 1)
        return np.repeat(result.astype(lanes.dtype), 32)
