"""npz files without pickle: written beside and then renamed, and errors that name the file and the field."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def write(path: Path, fields: Mapping[str, np.ndarray]) -> None:
    """Raises: OSError naming the file and the field; then nothing of this writing is left."""
    beside = path.parent / f".{path.name}.{os.getpid()}"
    name = "the file"
    try:
        try:
            with open(beside, "wb") as file:
                with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                    for name, value in fields.items():
                        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                            np.lib.format.write_array(member, value, allow_pickle=False)
                    name = "the end"
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{path}: {name}: {error.strerror or error}") from error


@contextmanager
def archive_of(path: Path, expected: str = "an npz file") -> Iterator[zipfile.ZipFile]:
    """Raises: OSError where the file cannot be opened, ValueError naming it where it is no archive."""
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        # A damaged directory sends zipfile to places before the file, or to versions it does not know.
        except Exception as error:
            raise ValueError(f"{path}: every field: not {expected}, or cut short ({error})") from error
        with archive:
            yield archive


@contextmanager
def read(path: Path) -> Iterator[Callable[[str], np.ndarray]]:
    """A function from a field's name to its array. Raises: ValueError naming the file and the field."""
    with archive_of(path) as archive:

        def field(name: str) -> np.ndarray:
            if f"{name}.npy" not in archive.NameToInfo:
                raise ValueError(f"{path}: {name}: there is no such field")
            try:
                # Whole, so that its checksum is compared before NumPy reads a header out of it.
                member = io.BytesIO(archive.read(f"{name}.npy"))
                return np.lib.format.read_array(member, allow_pickle=False)
            # Of zipfile, its decompressors, and NumPy, which tokenises the header as Python's own text.
            except Exception as error:
                raise ValueError(f"{path}: {name}: cannot be read ({error})") from error

        yield field
