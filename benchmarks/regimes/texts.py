"""Bytes to fine-tune on, to choose a learning rate on, and to test on. No file is in two of them.

strong-N: packages of the standard library, not seen in pre-training; N % of the training labels replaced.
intermediate: C headers of the interpreter, near to what was seen in signs, far in words (FIGlet art is not:
its blanks look familiar and its ink does not). cipher: the packages again, with printable bytes permuted;
every byte has been seen in pre-training, but none where the model expects it, so the task is weak.
"""

from __future__ import annotations

import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "examples"))
from finetune import CONTEXT, DEVICE, ByteModel, Text, read, standard_library

__all__ = ["CONTEXT", "DEVICE", "ByteModel", "Splits", "Text", "pretraining", "splits"]


class Splits(NamedTuple):
    train: Text
    validation: Text
    test: Text


def pretraining() -> Text:
    return read(standard_library()[0])


def _headers() -> list[Path]:
    root = Path(sysconfig.get_path("include"))
    files = sorted(f for f in root.rglob("*.h") if f.stat().st_size and not f.is_symlink())
    if len(files) < 20:
        raise SystemExit(f"intermediate: the C headers of Python are needed (python3-dev): too few in {root}")
    return files


def _enciphered(text: Text) -> Text:
    table = torch.arange(256, dtype=torch.uint8)
    order = torch.randperm(95, generator=torch.Generator().manual_seed(0))
    table[32:127] = (32 + order).to(torch.uint8)
    return Text(table[text.inputs.long()], table[text.labels.long()], text.wrong)


@lru_cache(maxsize=8)
def splits(task: str, seed: int) -> Splits:
    """Every fourth file is for the test, every fifth of the rest for validation; both clean."""
    if task == "intermediate":
        files = _headers()
        rest, test = [f for i, f in enumerate(files) if i % 4], files[::4]
    else:
        _, rest, test = standard_library()
    noise = float(task.split("-")[1]) / 100 if task.startswith("strong-") else 0.0
    train = [f for i, f in enumerate(rest) if i % 5]
    made: tuple[Any, ...] = (read(train, noise, seed), read(rest[::5]), read(test))
    return Splits(*map(_enciphered, made) if task == "cipher" else made)
