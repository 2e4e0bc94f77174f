"""Tokens to record: rows of every kind, and a small run, a table of bigrams that learns a text."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deft_kernels import deft_loss, row_statistics
from deft_kernels.diagnostics import Recorder, Recording

V, STEPS = 64, 40


class Run(NamedTuple):
    before: Recording  # of the held-out text
    training: Recording
    after: Recording
    logits: Tensor  # of the held-out text, at the end
    labels: Tensor


def text() -> Tensor:
    """This file, its letters folded into 64 classes."""
    return torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long() % V


@cache
def run(seed: int = 0) -> Run:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, V, generator=generator).requires_grad_()
    letters = text()
    held, learned = letters[:600], letters[600:]

    def look() -> tuple[Recording, Tensor]:
        recorder = Recorder(channels=("even", "odd"), tokens=256)
        logits = table.detach()[held[:-1]]
        recorder.add(row_statistics(logits, held[1:]), held[1:], channel=torch.arange(599) % 2)
        return recorder.recording(), logits

    before, _ = look()
    training, optimizer = Recorder(), torch.optim.Adam([table], 0.1)
    for _ in range(STEPS):
        places = torch.randint(len(learned) - 1, (200,), generator=generator)
        loss, stats = deft_loss(table[learned[places]], learned[places + 1], return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.add(stats, learned[places + 1])
    after, logits = look()
    return Run(before, training.recording(), after, logits, held[1:])


CLASSES = 37


def rows(n: int = 240, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Peaked, uniform, masked and ordinary rows, some ignored: every part of the tables has tokens."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.tensor([0.0, 1.0, 4.0, 12.0]).repeat(n // 4).unsqueeze(-1)
    logits = (torch.randn(n, CLASSES, generator=generator) * scale).to(dtype)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.5, logits.argmax(-1), torch.arange(n) % CLASSES
    )
    logits[7::20, :5] = -math.inf
    labels[7::20] = 9  # not one of the masked classes
    labels[3::17] = -100
    return logits, labels
