"""The tasks: what a step trains on, and what is measured, each kind of data alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import art
import torch
from art import Sample
from texts import CONTEXT, DEVICE, Text, splits
from torch import Tensor

TEXTS = ("strong-0", "strong-10", "strong-30", "intermediate", "cipher")
ART = ("cells", "ascii")
MIXED = {"strong-30": 4, "cells": 26}  # windows and samples a step: 512 labels and 546
TASKS = (*TEXTS, *ART, "mixed")
# (steps, windows or samples a step), at the default size
BUDGETS = {"cells": (300, 16), "ascii": (500, 8), "mixed": (400, 0)} | dict.fromkeys(TEXTS, (600, 8))


class Rows(NamedTuple):
    """Windows of one length; labels of -100 do not count."""

    inputs: Tensor  # [n, length]
    labels: Tensor  # [n, length]
    ink: Tensor | None = None  # [n, length], of art: which labels are neither blank nor line feed


class Measured(NamedTuple):
    rows: list[Rows]
    kind: str = ""  # of art
    samples: tuple[Sample, ...] = ()  # of art that the model is to write


def parts(task: str) -> tuple[str, ...]:
    return tuple(MIXED) if task == "mixed" else (task,)


def windows(text: Text, number: int) -> list[Rows]:
    """Evenly spaced ones, so that every objective is measured on the same."""
    starts = torch.linspace(0, len(text.inputs) - CONTEXT, number).long()
    return [Rows(*text.windows(some)[:2]) for some in starts.split(32)]


def of_samples(kind: str, which: list[Sample], number: int) -> list[Rows]:
    # A stride without a factor in common with the number of fonts takes words and fonts alike.
    some = which[:: max(1, len(which) // number)] if len(which) > number else which
    inputs, labels = art.encoded(some)
    whole = zip(inputs.split(64), labels.split(64), art.ink(kind, some).split(64), strict=True)
    return [Rows(*x) for x in whole]


def random_windows(text: Text, number: int, generator: torch.Generator) -> Rows:
    starts = torch.randint(len(text.inputs) - CONTEXT + 1, (number,), generator=generator)
    return Rows(*text.windows(starts)[:2])


class Task:
    """One task with the wrong labels of one seed."""

    def __init__(self, name: str, seed: int):
        self.name = name
        self.texts = {part: splits(part, seed) for part in parts(name) if part not in ART}
        self.art = {part: art.encoded(art.samples(part, "train")) for part in parts(name) if part in ART}

    def batch(self, size: int, generator: torch.Generator) -> list[Rows]:
        """What one step trains on; several shapes where the task is mixed."""
        found = []
        for part in parts(self.name):
            number = MIXED[part] if self.name == "mixed" else size
            if part in self.art:
                inputs, labels = self.art[part]
                chosen = torch.randint(len(inputs), (number,), generator=generator).to(DEVICE)
                found.append(Rows(inputs[chosen], labels[chosen]))
            else:
                found.append(random_windows(self.texts[part].train, number, generator))
        return found

    def measured(self, split: str, number: int, written: int) -> dict[str, Measured]:
        """The parts of the task by name; of the art as characters also fonts that were held out."""
        found = {}
        for part in parts(self.name):
            if part in ART:
                which = art.samples(part, split)
                found[part] = Measured(of_samples(part, which, number), part, tuple(which[:written]))
            else:
                found[part] = Measured(windows(getattr(self.texts[part], split), number))
        if self.name == "ascii" and split == "test":
            which = art.samples("ascii", "fonts")
            found["ascii, other fonts"] = Measured(
                of_samples("ascii", which, number), "ascii", tuple(which[:written])
            )
        return found


@lru_cache(maxsize=8)
def task(name: str, seed: int) -> Task:
    return Task(name, seed)
