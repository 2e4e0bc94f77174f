"""npz files without pickle: written beside and then renamed, and errors that name the file and the field."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def write(path: Path, fields: Mapping[str, np.ndarray]) -> None:
    """Raises: OSError naming the file and the field; then nothing of this writing is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
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
def read(path: Path) -> Iterator[Callable[[str], np.ndarray]]:
    """A function from a field's name to its array. Raises: ValueError naming the file and the field."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: every field: not an npz file, or cut short ({error})") from error
    with archive:

        def field(name: str) -> np.ndarray:
            try:
                with archive.open(f"{name}.npy") as member:
                    return np.lib.format.read_array(member, allow_pickle=False)  # type: ignore[arg-type]
            except KeyError as error:
                raise ValueError(f"{path}: {name}: there is no such field") from error
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
                raise ValueError(f"{path}: {name}: cannot be read ({error})") from error

        yield field
