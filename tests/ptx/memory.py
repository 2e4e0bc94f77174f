"""The launch's memory: the tensors' own bytes, seen through their addresses.

Every access has to lie inside the elements of the tensor that its address was made from (`provenance`), not
just inside its storage: a view's gaps belong to others. Accesses are aligned to their width."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from .arithmetic import I8, U1, U2, U4, U8, Array

UNITS = {1: U1, 2: U2, 4: U4, 8: U8}


class TensorLike(Protocol):
    """What the emulator asks of a tensor; PyTorch's have it."""

    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...
    def numel(self) -> int: ...
    def stride(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> Sequence[int]: ...


class Elements:
    """The bytes that a tensor's elements fill, from the first to one past the last."""

    def __init__(self, tensor: TensorLike, granule: int):
        size = tensor.element_size()
        self.first = tensor.data_ptr()
        extent = 0
        if tensor.numel():
            extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.end = self.first + extent * size
        self.granule = granule
        steps = [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
        self.dense = extent == tensor.numel() and 0 not in steps
        self._tensor = tensor
        self._filled: Array = None

    @property
    def filled(self) -> Array:
        """Which granules from the first byte on belong to elements."""
        if self._filled is None:
            per = self._tensor.element_size() // self.granule
            self._filled = np.zeros((self.end - self.first) // self.granule, np.bool_)
            shape, strides = tuple(self._tensor.shape), tuple(s * per for s in self._tensor.stride())
            np.lib.stride_tricks.as_strided(self._filled, (*shape, per), (*strides, 1))[...] = True
        return self._filled

    def outside(self, at: Array, size: int) -> Array:
        """Which accesses of `size` bytes are not wholly inside elements; None where none is."""
        if at.size == 0:
            return None
        low, high = int(at.min()), int(at.max())
        bad = None
        if low < self.first or high + size > self.end:
            bad = (at < U8(self.first)) | (at + U8(size) > U8(self.end))
        if not self.dense:
            granules = len(self.filled)
            start = (at.astype(I8) - self.first) // self.granule
            steps = np.arange(max(1, size // self.granule))
            inside = self.filled[np.clip(start[:, None] + steps, 0, max(granules - 1, 0))].all(1)
            bad = ~inside if bad is None else bad | ~inside
        return bad if bad is not None and bad.any() else None


class Global:
    """The tensors of a launch as one array of bytes, which lets NumPy index them by address."""

    def __init__(self, tensors: Mapping[int, TensorLike], granule: int):
        """tensors: by the position of their parameter."""
        self.granule = min([granule, *(t.element_size() for t in tensors.values())])
        self.elements = {n: Elements(t, self.granule) for n, t in tensors.items()}
        spans = sorted((e.first, e.end) for e in self.elements.values() if e.end > e.first)
        self.regions: list[tuple[int, int]] = []  # what tensors cover together, overlaps joined
        for first, end in spans:
            if self.regions and first < self.regions[-1][1]:
                self.regions[-1] = (self.regions[-1][0], max(end, self.regions[-1][1]))
            else:
                self.regions.append((first, end))
        self.offsets, self.granules = [], 0
        for first, end in self.regions:
            self.offsets.append(self.granules)
            self.granules += (end - first) // self.granule + 1
        self.starts = [first for first, _ in self.regions]
        self.base, self.bytes = 0, {n: np.zeros(0, unit) for n, unit in UNITS.items()}
        if self.regions:
            self.base = self.starts[0] & ~63
            span = (self.regions[-1][1] - self.base + 63) & ~63
            whole: Array = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base))
            self.bytes = {n: whole.view(unit) for n, unit in UNITS.items()}

    def granule_of(self, at: Array) -> Array:
        """Index of each address in the shadow; all lie in one region, as they were made from one tensor."""
        n = bisect.bisect_right(self.starts, int(at[0])) - 1
        return ((at - U8(self.starts[n])) // U8(self.granule)).astype(I8) + self.offsets[n]


class Shared:
    """The shared memory of the CTAs that run together, one after another; all bits 1 (NaN) until written."""

    def __init__(self, ctas: int, size: int):
        self.size = size
        raw = np.full(((ctas * size + 63) & ~63) + 64, 0xFF, U1)
        self.bytes = {n: raw.view(unit) for n, unit in UNITS.items()}
