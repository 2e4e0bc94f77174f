"""The launch's memory: the tensors' own bytes, seen through their addresses.

Every access has to lie inside the elements of the tensor that its address was made from (`provenance`), not
just inside its storage: a view's gaps belong to others. Accesses are aligned to their width."""

from __future__ import annotations

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


GAP = 1 << 20  # bytes between rows from where on they are looked after apart, to keep tables small


class Piece:
    """Elements in a run of bytes, from the first to one past the last, perhaps with gaps."""

    def __init__(self, first: int, size: int, shape: tuple[int, ...], strides: tuple[int, ...], granule: int):
        """size: bytes of an element."""
        extent = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        self.first, self.end, self.granule = first, first + extent * size, granule
        steps = [s for n, s in zip(shape, strides, strict=True) if n > 1]
        self._gaps = 0 in steps or extent != int(np.prod(shape))
        self._layout = (size, shape, strides)
        self._filled: Array = None

    @property
    def filled(self) -> Array:
        """Which granules from the first byte on belong to elements."""
        if self._filled is None:
            size, shape, strides = self._layout
            per = size // self.granule
            self._filled = np.zeros((self.end - self.first) // self.granule, np.bool_)
            places = tuple(s * per for s in strides)
            np.lib.stride_tricks.as_strided(self._filled, (*shape, per), (*places, 1))[...] = True
        return self._filled

    def outside(self, at: Array, size: int) -> Array:
        """Which accesses of `size` bytes are not wholly inside elements."""
        bad = np.zeros(at.shape, np.bool_)
        if int(at.min()) < self.first or int(at.max()) + size > self.end:
            bad = (at < U8(self.first)) | (at + U8(size) > U8(self.end))
        if self._gaps:
            start = (at.astype(I8) - self.first) // self.granule
            granules = start[:, None] + np.arange(max(1, size // self.granule))
            bad = bad | ~self.filled[np.clip(granules, 0, len(self.filled) - 1)].all(1)
        return bad


def pieces_of(
    first: int, size: int, shape: tuple[int, ...], strides: tuple[int, ...], granule: int
) -> list[Piece]:
    """A tensor's elements; rows far from each other apart."""
    if shape:
        widest = max(range(len(shape)), key=lambda d: strides[d])
        rest = [(n, s) for d, (n, s) in enumerate(zip(shape, strides, strict=True)) if d != widest]
        extent = sum((n - 1) * s for n, s in rest) + 1
        if shape[widest] > 1 and (strides[widest] - extent) * size > GAP:
            inner = tuple(n for n, _ in rest), tuple(s for _, s in rest)
            return [
                piece
                for n in range(shape[widest])
                for piece in pieces_of(first + n * strides[widest] * size, size, *inner, granule)
            ]
    return [Piece(first, size, shape, strides, granule)]


class Elements:
    """The bytes that a tensor's elements fill."""

    def __init__(self, tensor: TensorLike, granule: int):
        self.first, self.size = tensor.data_ptr(), tensor.element_size()
        self.pieces: list[Piece] = []
        if tensor.numel():
            shape, strides = tuple(tensor.shape), tuple(tensor.stride())
            self.pieces = pieces_of(self.first, self.size, shape, strides, granule)
        self.starts = np.array([p.first for p in self.pieces], U8)
        self.end = self.pieces[-1].end if self.pieces else self.first

    def outside(self, at: Array, size: int) -> Array:
        """Which accesses of `size` bytes are not wholly inside elements; None where all are."""
        if not self.pieces:
            return np.ones(at.shape, np.bool_)
        if len(self.pieces) == 1:
            bad = self.pieces[0].outside(at, size)
        else:
            bad = np.zeros(at.shape, np.bool_)
            own = np.maximum(np.searchsorted(self.starts, at, "right") - 1, 0)
            for n in np.unique(own):
                bad[own == n] = self.pieces[n].outside(at[own == n], size)
        return bad if bad.any() else None


class Global:
    """The tensors of a launch as one array of bytes, which lets NumPy index them by address."""

    def __init__(self, tensors: Mapping[int, TensorLike], granule: int):
        """tensors: by the position of their parameter."""
        self.granule = min([granule, *(t.element_size() for t in tensors.values())])
        self.elements = {n: Elements(t, self.granule) for n, t in tensors.items()}
        regions: list[tuple[int, int]] = []  # what tensors cover together, overlaps joined
        for first, end in sorted((p.first, p.end) for e in self.elements.values() for p in e.pieces):
            if regions and first < regions[-1][1]:
                regions[-1] = (regions[-1][0], max(end, regions[-1][1]))
            else:
                regions.append((first, end))
        lengths = [(end - first) // self.granule + 1 for first, end in regions]
        self.granules = sum(lengths)
        self.starts = np.array([first for first, _ in regions], U8)
        self.offsets = np.cumsum([0, *lengths])[:-1]
        self.base, self.bytes = 0, {n: np.zeros(0, unit) for n, unit in UNITS.items()}
        if regions:
            self.base = regions[0][0] & ~63
            span = (regions[-1][1] - self.base + 63) & ~63
            whole: Array = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.base))
            self.bytes = {n: whole.view(unit) for n, unit in UNITS.items()}

    def granule_of(self, at: Array) -> Array:
        """Index of each address in the shadow."""
        region: Array = np.searchsorted(self.starts, at[:1], "right") - 1
        if int(at.min()) < self.starts[region[0]] or self._leaves(int(at.max()), int(region[0])):
            region = np.searchsorted(self.starts, at, "right") - 1
        return ((at - self.starts[region]) // U8(self.granule)).astype(I8) + self.offsets[region]

    def _leaves(self, address: int, region: int) -> bool:
        return region + 1 < len(self.starts) and address >= self.starts[region + 1]


class Shared:
    """The shared memory of the CTAs that run together, one after another; all bits 1 (NaN) until written."""

    def __init__(self, ctas: int, size: int):
        self.size = size
        raw = np.full(((ctas * size + 63) & ~63) + 64, 0xFF, U1)
        self.bytes = {n: raw.view(unit) for n, unit in UNITS.items()}
