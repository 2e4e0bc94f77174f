"""What is known of a row: the public record, and the layout of the packed buffer the backends share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import kind_of


class RowStatistics(NamedTuple):
    """Statistics of each row; every tensor has the labels' shape, fp32 (fp64 for fp64 logits), in nats.

    logp: log-probability of the target.  lse: log-sum-exp of the (soft-capped, tempered) logits.
    collision: S = sum p^2 = exp(-H_2).  entropy: Shannon H.  max_prob: max p.
    correct: bool, whether the target's logit is at least every other (top-1).
    alpha, gate: focus index and trust gate of the objective; None from `row_statistics`, which has none.
        alpha is 0 for `eaft`, a weighted NLL without a focus index.
    predicted: int64, the first class with the largest (soft-capped) logit, as torch.argmax gives it; -1 where
        max_prob is NaN, as a NaN among the logits makes it. None for more than 2^24 classes, which fp32
        cannot count.
    Ignored rows hold 0, False and a predicted -1; rows that a band on p drops keep their statistics and have
    gate 0.
    """

    logp: Tensor
    lse: Tensor
    collision: Tensor
    entropy: Tensor
    max_prob: Tensor
    correct: Tensor
    alpha: Tensor | None = None
    gate: Tensor | None = None
    predicted: Tensor | None = None


def check_statistics(stats: object) -> None:
    if not isinstance(stats, RowStatistics):
        raise TypeError(f"stats: expected RowStatistics, got {kind_of(stats)}")


# An objective of the caller's own: each row's loss from differentiable statistics.
RowLoss = Callable[[RowStatistics], Tensor]


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of losses and statistics of logits of that dtype: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Classes that every fp32 number can tell apart, 1 to 2^24.
COUNTABLE = 2**24


def predicted_classes(rows: Tensor, shape: torch.Size, vocabulary: int) -> Tensor | None:
    """`RowStatistics.predicted` from the packed rows of a call that asked for statistics."""
    if rows.dtype == torch.float32 and vocabulary > COUNTABLE:
        return None
    return (rows[Field.PREDICTED].reshape(shape) - 1).long()


def detached(stats: RowStatistics) -> RowStatistics:
    return RowStatistics(*(None if s is None else s.detach() for s in stats))  # type: ignore[arg-type]


def with_stand_ins(stats: RowStatistics, valid: Tensor) -> RowStatistics:
    """The statistics for a function that differentiates them: an ignored row gets those of a plain row.

    With its zeros a log, a division or a power would be infinite, and 0 times that is a NaN in the gradient
    of the function's parameters. The stand-in is a row of probabilities 1/2, 1/4 and 1/4 whose label has a
    quarter: no statistic is 0 or 1, and no two are equal.
    """
    log2 = math.log(2.0)
    return RowStatistics(
        stats.logp.where(valid, -2.0 * log2),
        stats.lse.where(valid, log2),
        stats.collision.where(valid, 0.375),
        stats.entropy.where(valid, 1.5 * log2),
        stats.max_prob.where(valid, 0.5),
        stats.correct,
        predicted=stats.predicted,
    )


class Field(IntEnum):
    """Rows of the packed buffer [len(Field), N] between forward and backward.

    OFFSET and SUM are the state of the softmax in the log2 domain: p_j = 2^(k z_j - OFFSET) / SUM with
    k = log2(e) / temperature rounded to the buffer's dtype. OFFSET need only be near the maximum, so that its
    own rounding cancels: unlike lse it costs no precision at |z| = 300. PREDICTED is 1 + the first column
    with the largest logit, so that 0 means none: every field of an ignored row is 0. A, B, C,
    PEAK_GRAD and TARGET are the coefficients of the gradient for an upstream of 1 (`coefficients`).
    """

    LOGP = 0
    LSE = 1
    COLLISION = 2
    ENTROPY = 3
    MAX_PROB = 4
    CORRECT = 5
    ALPHA = 6
    GATE = 7
    KEPT = 8
    OFFSET = 9
    SUM = 10
    PEAK = 11
    TIES = 12
    PREDICTED = 13
    A = 14
    B = 15
    C = 16
    PEAK_GRAD = 17
    TARGET = 18


# The fields of some rows while they are computed, each [R]; a field that is absent is zero.
Fields = dict[Field, Tensor]


def unpack(rows: Tensor) -> Fields:
    return dict(zip(Field, rows.unbind(), strict=True))


def pack(fields: Fields) -> Tensor:
    """[len(Field), R], in one operator instead of a store for each field."""
    zero = torch.zeros_like(fields[Field.LOGP])
    return torch.stack([fields.get(field, zero) for field in Field])


def differentiable_record(outputs: Sequence[Tensor], shape: torch.Size, vocabulary: int) -> RowStatistics:
    """The public record of what an operator of statistics returns: the five differentiable ones, and rows."""
    *vectors, rows = outputs
    logp, lse, collision, entropy, max_prob = (vector.reshape(shape) for vector in vectors)
    correct, predicted = rows[Field.CORRECT].reshape(shape) != 0, predicted_classes(rows, shape, vocabulary)
    return RowStatistics(logp, lse, collision, entropy, max_prob, correct, predicted=predicted)


def statistics_record(rows: Tensor, shape: torch.Size, vocabulary: int) -> RowStatistics:
    """The public record of packed rows, detached."""

    def field(index: Field) -> Tensor:
        return rows[index].reshape(shape)

    return RowStatistics(
        field(Field.LOGP),
        field(Field.LSE),
        field(Field.COLLISION),
        field(Field.ENTROPY),
        field(Field.MAX_PROB),
        field(Field.CORRECT) != 0,
        field(Field.ALPHA),
        field(Field.GATE),
        predicted_classes(rows, shape, vocabulary),
    )
