"""The functions of a backend for logits [..., V_r] that are this rank's columns of a vocabulary of V.

Every rank reduces its columns to states, and one all-gather gives every rank all states. From there each rank
computes the same losses, and the gradient of its own columns; the backward sends nothing. Labels and class
weights are given for the whole vocabulary; labels have to be the same on all ranks of the group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.agreement import gathered
from ..core.groups import Shard
from ..core.spec import Spec
from ..core.statistics import loss_dtype
from .states import identity

if TYPE_CHECKING:
    from .interface import PartialBackend


class Sharded:
    """`backend`: whose functions these stand for; `pytorch/backend.py` says what they do."""

    def __init__(self, backend: PartialBackend, shard: Shard):
        self.backend, self.shard = backend, shard

    def row_loss(
        self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        width = logits.shape[-1]
        # Ignored rows are not read. They get a number of their own, as ignore_index may be a column's number
        # here.
        local = self._local(labels, width).where(labels != ignore_index, -1)
        # Columns that do not fit have changed since the ranks last asked; the all-gather will notice.
        if width == 0 or self.shard.start + width > self.shard.size:
            dtype = loss_dtype(logits.dtype)
            states = identity(labels.numel(), spec, logits, dtype)
        else:
            weight = self._columns(class_weight, width)
            states = self.backend.row_states(logits, local, weight, -1, spec)
            if spec.statistics:
                # The predicted column, counted from this rank's first.
                states[:, -1] += self.shard.start
        states = gathered(states, self.shard, width, labels, ignore_index, spec)
        return self.backend.states_loss(states, labels, class_weight, self.shard.size, ignore_index, spec)

    def row_loss_with_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        spec: Spec,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, rows = self.row_loss(logits, labels, class_weight, ignore_index, spec)
        self.gradient(logits, labels, class_weight, rows, row_scale, spec, out)
        return loss, rows

    def gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        rows: Tensor,
        dloss: Tensor,
        spec: Spec,
        out: Tensor,
    ) -> None:
        if logits.shape[-1] == 0:
            return
        labels, class_weight, spec = self._own(logits, labels, class_weight, spec)
        self.backend.gradient(logits, labels, class_weight, rows, dloss, spec, out)

    def match_upstream(
        self,
        dlogits: Tensor,
        upstream: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        rows: Tensor,
        spec: Spec,
    ) -> None:
        if dlogits.shape[-1] == 0:
            return
        labels, class_weight, spec = self._own(dlogits, labels, class_weight, spec)
        args = (upstream, logits, labels, row_scale, class_weight, rows, spec)
        self.backend.match_upstream(dlogits, *args)

    def weighted_total(self, loss: Tensor, row_scale: Tensor, rows: Tensor) -> Tensor:
        return self.backend.weighted_total(loss, row_scale, rows)

    def scale(self, gradient: Tensor, upstream: Tensor, kept: Tensor | None = None) -> None:
        self.backend.scale(gradient, upstream, kept)

    def _own(
        self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, spec: Spec
    ) -> tuple[Tensor, Tensor | None, Spec]:
        """(labels, class weights, Spec) for the gradient of these columns."""
        width = logits.shape[-1]
        # Smoothing is divided by the whole vocabulary, but a backend divides by the columns that it sees.
        smoothing = spec.label_smoothing * width / self.shard.size
        spec = replace(spec, label_smoothing=smoothing, shard=None)
        return self._local(labels, width), self._columns(class_weight, width), spec

    def _local(self, labels: Tensor, width: int) -> Tensor:
        """Labels counted from this rank's first column; `width`, which is no column, for all others."""
        own = labels - self.shard.start
        return own.where((own >= 0) & (own < width), width)

    def _columns(self, class_weight: Tensor | None, width: int) -> Tensor | None:
        start = self.shard.start
        return None if class_weight is None else class_weight[start : start + width]
