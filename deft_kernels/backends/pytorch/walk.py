"""The rows in blocks: views of the tensors, the labels of a block, and the results of each block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.checks import all_count
from ...core.statistics import Field, Fields, pack


def matrices(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Tensors [..., V] of one shape as [rows, V] views in row order, never a copy, whatever their strides."""
    try:
        views = [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    except RuntimeError:
        for parts in zip(*tensors, strict=True):
            yield from matrices(*parts)
    else:
        yield views


def blocks(elements: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Row ranges of about `elements` with the block of each tensor; all have the same shape."""
    start = 0
    for views in matrices(*tensors):
        count, width = views[0].shape
        step = max(1, elements // width)
        for first in range(0, count, step):
            last = min(count, first + step)
            yield slice(start + first, start + last), [view[first:last] for view in views]
        start += count


class Labels:
    """What the passes need of the labels, computed once a call: [N] each, None where it would change
    nothing."""

    def __init__(self, labels: Tensor, vocabulary: int, ignore_index: int):
        self.host = labels.device.type == "cpu"
        self.valid: Tensor | None = None
        self.known: Tensor | None = None
        if self.host and all_count(labels, vocabulary, ignore_index):
            self.index = labels.unsqueeze(1)
            return
        inside = (labels >= 0) & (labels < vocabulary)
        self.valid = labels != ignore_index
        # Only on an accelerator a label out of range comes here: NaN, as documented.
        self.known = inside | ~self.valid
        self.index = labels.where(inside, 0).unsqueeze(1)
        if self.host:
            self.known = None if bool(self.known.all()) else self.known
            self.valid = None if bool(self.valid.all()) else self.valid

    def valid_in(self, span: slice) -> Tensor | None:
        valid = None if self.valid is None else self.valid[span]
        return None if valid is None or self.host and bool(valid.all()) else valid

    def known_in(self, span: slice) -> Tensor | None:
        return None if self.known is None else self.known[span]

    def none_in(self, span: slice) -> bool:
        """Whether a block has nothing to count, where the host sees that without waiting for a device."""
        return self.host and self.valid is not None and not self.valid[span].any()


class Results:
    """Losses [N] and packed rows [len(Field), N] as blocks come; a block of all rows is not copied."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device):
        self.count, self.dtype, self.device = count, dtype, device
        self._loss: Tensor | None = None
        self._rows: Tensor | None = None

    def put(self, span: slice, loss: Tensor | None, fields: Fields) -> None:
        rows = pack(fields)
        if span.stop - span.start == self.count:
            self._loss = None if loss is None else loss.to(self.dtype)
            self._rows = rows.to(self.dtype)
            return
        self._loss, self._rows = self.loss(), self.rows()
        self._rows[:, span] = rows
        if loss is not None:
            self._loss[span] = loss

    def loss(self) -> Tensor:
        """0 where no block came."""
        if self._loss is None:
            return torch.zeros(self.count, dtype=self.dtype, device=self.device)
        return self._loss

    def rows(self) -> Tensor:
        if self._rows is None:
            return torch.zeros(len(Field), self.count, dtype=self.dtype, device=self.device)
        return self._rows
