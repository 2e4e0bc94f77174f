"""The loss from hidden states, in chunks of rows: one buffer of logits, three matrix products around it.

    logits = hidden W^T + bias     dhidden = dlogits W     dW = dlogits^T hidden     dbias = sum_i dlogits_i

Nothing else reads the buffer, so each chunk's gradient overwrites its logits. Plain functions of plain
tensors, without autograd; `backend` is one of `backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import Backend
from ..core.groups import Shard, batch_mean
from ..core.spec import Spec
from ..core.statistics import Field, loss_dtype
from ..objectives import nll
from .chunk_gradients import BiasGradient, HiddenGradient, WeightGradient

Gradients = tuple[Tensor, Tensor, Tensor]


class Head(NamedTuple):
    """What the logits are made of, and how: hidden [N, D], weight [V, D], bias [V] or None.

    product: the dtype of the matrix products and so of the logits; not the tensors' own under autocast.
    budget: bytes of the buffer of logits.
    shard: which rows of a head these are, if it is split between ranks; every rank has all of hidden.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    product: torch.dtype
    budget: int
    shard: Shard | None = None

    @property
    def columns(self) -> int:
        """Columns of the logits, to plan chunks by: the same number on ranks with uneven shards, so that all
        ranks have the same rows in a chunk."""
        return self.weight.shape[0] if self.shard is None else -(-self.shard.size // self.shard.ranks)


class Chunk(NamedTuple):
    """Some rows: which ones of all, and their logits in the buffer, valid until the next chunk."""

    rows: slice | Tensor
    hidden: Tensor
    logits: Tensor


def chunk_rows(count: int, vocabulary: int, itemsize: int, budget: int) -> int:
    """Rows of a chunk: within the budget, and all chunks alike, as a short last one is slow for its size."""
    most = max(1, budget // (vocabulary * itemsize))
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Chunks:
    """The rows to be worked on, chunk by chunk.

    Rows that are not `kept` are left out before the first product. Their number has to be known to the host,
    which on a GPU waits for it once a call; while a CUDA graph is captured, or without `skip`, every row is
    worked on instead, those that are not `kept` with a hidden state of 0: whatever they hold, the weight's
    gradient is not to meet it.
    """

    def __init__(self, head: Head, kept: Tensor, skip: bool):
        hidden, weight, product = head.hidden, head.weight, head.product
        self.head, self.index = head, None
        self.count, self.dropped = hidden.shape[0], None
        if skip and not _capturing(hidden.device):
            index = kept.nonzero().squeeze(1)
            if index.numel() < self.count:
                self.index, self.count = index, index.numel()
        else:
            self.dropped = ~kept.unsqueeze(1)
        self.size = chunk_rows(self.count, head.columns, product.itemsize, head.budget)
        self.weight = weight.to(product)
        self.bias = None if head.bias is None else head.bias.to(product)
        self.buffer = torch.empty(0, dtype=product, device=hidden.device)

    @property
    def single(self) -> bool:
        return self.count <= self.size

    def __iter__(self) -> Iterator[Chunk]:
        if self.count and not self.buffer.numel():
            self.buffer = self.buffer.new_empty(self.size, self.weight.shape[0])
        for first in range(0, self.count, self.size):
            rows: slice | Tensor = slice(first, min(first + self.size, self.count))
            if self.index is not None:
                rows = self.index[rows]
            hidden = self.head.hidden[rows].to(self.head.product)
            if self.dropped is not None:
                hidden = hidden.masked_fill(self.dropped[rows], 0.0)
            logits = self.buffer[: hidden.shape[0]]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield Chunk(rows, hidden, logits)


class Results:
    """Losses and rows of the whole batch, filled by chunks; what no chunk fills stays 0."""

    def __init__(self, head: Head):
        dtype = loss_dtype(head.product)
        count = head.hidden.shape[0]
        self.loss = torch.zeros(count, dtype=dtype, device=head.hidden.device)
        self.rows = torch.zeros(len(Field), count, dtype=dtype, device=head.hidden.device)

    def put(self, chunk: Chunk, loss: Tensor, rows: Tensor) -> None:
        self.loss[chunk.rows] = loss
        self.rows[:, chunk.rows] = rows


class _Accumulators:
    """The gradients that are wanted; one that is not has no elements and costs nothing."""

    def __init__(self, chunks: Chunks, wanted: list[bool]):
        head, single = chunks.head, chunks.single
        bias = head.hidden if head.bias is None else head.bias
        self.hidden = HiddenGradient(head.hidden, chunks.weight, wanted[0], head.shard)
        self.weight = WeightGradient(head.weight, head.product, single, wanted[1])
        self.bias = BiasGradient(bias, head.product, wanted[2])

    def add(self, chunk: Chunk) -> None:
        """Take a chunk whose logits have been overwritten with their gradient."""
        self.hidden.put(chunk.rows, chunk.logits)
        self.weight.add(chunk.logits, chunk.hidden)
        self.bias.add(chunk.logits)

    def finish(self) -> Gradients:
        return self.hidden.finish(), self.weight.finish(), self.bias.finish()


def _with_batch_mean(backend: Backend, chunks: Chunks, labels: Tensor, ignore_index: int, spec: Spec) -> Spec:
    """For `cayley`, whose floor is made of the batch's mean p: read every chunk once for it.

    The mean then becomes a number of the Spec, for which on a GPU the host waits. A given `mean_prob` saves
    both.
    """
    if not spec.objective.needs_batch:
        return spec
    plain = replace(spec, objective=nll(), z_loss=0.0, label_smoothing=0.0, statistics=False)
    logp = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    for chunk in chunks:
        rows = backend.row_loss(chunk.logits, labels[chunk.rows], None, ignore_index, plain)[1]
        logp[chunk.rows] = rows[Field.LOGP].double()
    mean = float(batch_mean(logp, labels != ignore_index, spec.objective.batch_group))
    return replace(spec, objective=replace(spec.objective, mean_prob=mean, batch_group=""))


def row_loss(
    backend: Backend, head: Head, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    """(loss [N], rows [len(Field), N])."""
    chunks, results = Chunks(head, labels != ignore_index, spec.skip_ignored), Results(head)
    spec = _with_batch_mean(backend, chunks, labels, ignore_index, spec)
    for chunk in chunks:
        part = backend.row_loss(chunk.logits, labels[chunk.rows], class_weight, ignore_index, spec)
        results.put(chunk, *part)
    return results.loss, results.rows


def loss_with_gradient(
    backend: Backend,
    head: Head,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """(loss [N], rows, gradients of sum_i row_scale_i loss_i by hidden, weight and bias)."""
    chunks, results = Chunks(head, labels != ignore_index, spec.skip_ignored), Results(head)
    spec = _with_batch_mean(backend, chunks, labels, ignore_index, spec)
    gradients = _Accumulators(chunks, wanted)
    for chunk in chunks:
        scale = row_scale[chunk.rows]
        args = (labels[chunk.rows], scale, class_weight, ignore_index, spec, chunk.logits)
        results.put(chunk, *backend.row_loss_with_gradient(chunk.logits, *args))
        gradients.add(chunk)
    return results.loss, results.rows, gradients.finish()


def loss_of_terms_with_gradient(
    backend: Backend,
    head: Head,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    wanted: list[bool],
    of_rows: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Gradients]:
    """`loss_with_gradient` of rows that `of_rows(rows, loss, labels, which)` makes of the objective's."""
    chunks, results = Chunks(head, labels != ignore_index, spec.skip_ignored), Results(head)
    spec = _with_batch_mean(backend, chunks, labels, ignore_index, spec)
    gradients = _Accumulators(chunks, wanted)
    for chunk in chunks:
        own = labels[chunk.rows]
        loss, rows = backend.row_loss(chunk.logits, own, class_weight, ignore_index, spec)
        loss, rows = of_rows(rows, loss, own, chunk.rows)
        results.put(chunk, loss, rows)
        scale = row_scale[chunk.rows]
        backend.gradient(chunk.logits, own, class_weight, rows, scale, spec, chunk.logits)
        gradients.add(chunk)
    return results.loss, results.rows, gradients.finish()


def gradient(
    backend: Backend,
    head: Head,
    labels: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    dloss: Tensor,
    spec: Spec,
    wanted: list[bool],
) -> Gradients:
    """Gradients for an upstream `dloss` [N] from the rows of an earlier call; the logits are made again."""
    chunks = Chunks(head, rows[Field.KEPT] != 0, spec.skip_ignored)
    gradients = _Accumulators(chunks, wanted)
    for chunk in chunks:
        own, upstream = rows[:, chunk.rows].contiguous(), dloss[chunk.rows].contiguous()
        args = (labels[chunk.rows], class_weight, own, upstream, spec, chunk.logits)
        backend.gradient(chunk.logits, *args)
        gradients.add(chunk)
    return gradients.finish()
