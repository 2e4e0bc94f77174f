"""What a backend is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.spec import Spec


class Backend(Protocol):
    """The functions of a backend. `pytorch/backend.py` says what each does; `triton/backend.py` has the same,
    and `Sharded` makes them out of another backend's for a vocabulary split between ranks.

    logits [..., V] in any strides; labels [N] int64, contiguous, in range where the host can see it; class
    weights [V] or None; losses, row scales and upstreams [N]; rows [len(Field), N]; states [parts, N, size].
    Outputs that can be large are given by the caller: `out` and `dlogits`, which may be the logits.
    """

    def row_loss(
        self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
    ) -> tuple[Tensor, Tensor]: ...

    def row_loss_with_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        spec: Spec,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        rows: Tensor,
        dloss: Tensor,
        spec: Spec,
        out: Tensor,
    ) -> None: ...

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
    ) -> None: ...

    def weighted_total(self, loss: Tensor, row_scale: Tensor, rows: Tensor) -> Tensor: ...

    def scale(self, gradient: Tensor, upstream: Tensor, kept: Tensor | None = None) -> None: ...


class PartialBackend(Backend, Protocol):
    """A backend that can also work on a part of the vocabulary, as `Sharded` wants it."""

    def row_states(
        self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
    ) -> Tensor: ...

    def states_loss(
        self,
        states: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        vocabulary: int,
        ignore_index: int,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]: ...
