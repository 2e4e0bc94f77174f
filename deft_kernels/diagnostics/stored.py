"""Tensors in npz and safetensors files, mapped into memory: only the rows that are asked for are read."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .npz import archive_of

NAMES = ("logits", "labels", "hidden", "weight", "bias")
# Names that safetensors writes in its header.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
# NumPy's names of those that it has, without the byte order.
NUMPY = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. field: its name there; offset: of its first byte."""

    path: Path
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: {self.field}"

    @property
    def rows(self) -> int:
        """Of the tensor with all dimensions but the last in one."""
        return math.prod(self.shape[:-1])

    def read(self, begin: int, end: int) -> Tensor:
        """Rows of the tensor as [rows, last dimension]."""
        row = self.shape[-1] * self.dtype.itemsize
        return self._bytes(begin * row, (end - begin) * row).view(self.dtype).view(-1, self.shape[-1])

    def whole(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return self._bytes(0, size).view(self.dtype).view(self.shape)

    def _bytes(self, begin: int, size: int) -> Tensor:
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        mapped = np.memmap(self.path, np.uint8, "r", self.offset + begin, (size,))
        # A copy, as what lies in a file need not begin where a number may.
        return torch.from_numpy(np.array(mapped))


def find(paths: Iterable[Path], renamed: Mapping[str, str] | None = None) -> dict[str, Stored]:
    """The tensors called logits, labels, hidden, weight and bias, over all the files.

    renamed: from one of these names to that in the files.
    Raises: ValueError naming the file and the field, OSError for a file that cannot be opened.
    """
    wanted = {name: name for name in NAMES} | dict(renamed or {})
    found: dict[str, Stored] = {}
    for path in paths:
        fields = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
        for name, called in wanted.items():
            if called not in fields:
                continue
            if name in found:
                raise ValueError(f"{path}: {called}: {found[name].path} has {name} already")
            found[name] = fields[called]()
    for name, called in (renamed or {}).items():
        if name not in found:
            raise ValueError(f"{', '.join(map(str, paths))}: {called}: no file has a tensor of this name")
    return found


def _stored(
    path: Path, field: str, kind: str | None, shape: tuple[int, ...], offset: int, end: int
) -> Stored:
    if kind not in DTYPES:
        raise ValueError(f"{path}: {field}: holds {kind}; known: {', '.join(DTYPES)}")
    if any(n < 0 for n in shape):
        raise ValueError(f"{path}: {field}: has shape {shape}")
    size = math.prod(shape) * DTYPES[kind].itemsize
    if offset + size != end or end > path.stat().st_size:
        raise ValueError(
            f"{path}: {field}: {size} bytes expected from {offset} on, the file is cut short or wrong"
        )
    if not shape:
        raise ValueError(f"{path}: {field}: is one number, expected a tensor with rows")
    return Stored(path, field, DTYPES[kind], shape, offset)


def _safetensors(path: Path) -> dict[str, _Lazy]:
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        whole = path.stat().st_size
        if not 2 <= size <= whole - 8:
            raise ValueError(f"{path}: header: not a safetensors file, or cut short")
        try:
            header = json.loads(file.read(size))
            return {
                name: _entry(path, name, entry, 8 + size)
                for name, entry in header.items()
                if name != "__metadata__"
            }
        # The last for brackets in brackets in brackets.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: header: not a safetensors file ({error})") from error


def _entry(path: Path, name: str, entry: dict[str, Any], start: int) -> _Lazy:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: {entry}")
    return _Lazy(path, name, kind, shape, start + begin, start + end)


def _npz(path: Path) -> dict[str, _Lazy]:
    with archive_of(path, "a safetensors or npz file") as archive:
        return {
            entry.filename.removesuffix(".npy"): _Lazy(
                path, entry.filename.removesuffix(".npy"), member=entry
            )
            for entry in archive.infolist()
        }


@dataclass(frozen=True)
class _Lazy:
    """A field of a file's directory, checked when it turns out to be wanted."""

    path: Path
    field: str
    kind: str | None = None
    shape: tuple[int, ...] = ()
    offset: int = 0
    end: int = 0
    member: zipfile.ZipInfo | None = None

    def __call__(self) -> Stored:
        if self.member is not None:
            return _in_npz(self.path, self.field, self.member)
        return _stored(self.path, self.field, self.kind, self.shape, self.offset, self.end)


def _in_npz(path: Path, field: str, member: zipfile.ZipInfo) -> Stored:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {field}: is compressed and cannot be mapped; write it with np.savez")
    try:
        with open(path, "rb") as file:
            # The local header: its own length, the name and an extra field, whose lengths stand in it.
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            begin = member.header_offset + 30 + name + extra
            file.seek(begin)
            version = np.lib.format.read_magic(file)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = header[version](file)
            offset = file.tell()
    # NumPy tokenises and evaluates the header as Python's own text, with that one's errors.
    except Exception as error:
        raise ValueError(f"{path}: {field}: no array of NumPy's, or cut short ({error})") from error
    if fortran and len(shape) > 1:
        raise ValueError(f"{path}: {field}: is in Fortran's order; write np.ascontiguousarray of it")
    kind = NUMPY.get(dtype.str[1:]) if dtype.isnative or dtype.itemsize == 1 else None
    if kind is None:
        raise ValueError(f"{path}: {field}: holds {dtype.str}; known: {', '.join(NUMPY)}")
    return _stored(path, field, kind, tuple(shape), offset, begin + member.file_size)
