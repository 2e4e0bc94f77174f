"""Where rows lie, and what programs do with one of them outside of the loops."""

import triton
import triton.language as tl

from .predicted import count_ties, numbered
from .records import Reduced, Row
from .state import reduce_row


@triton.jit
def row_offset(row, strides):
    """Element offset of a row, int64: N V passes 2^31 in an ordinary batch."""
    outer = row // strides.inner
    return outer.to(tl.int64) * strides.outer + (row - outer * strides.inner).to(tl.int64) * strides.stride


@triton.jit
def aligned(offset, PLAN):
    """(offset rounded down to a full load, columns rounded away); the hint keeps loads 16 bytes wide."""
    if PLAN.peel:
        lead = (offset % PLAN.width).to(tl.int32)
        return tl.multiple_of(offset - lead, PLAN.width), lead
    else:
        return offset, 0


@triton.jit
def place_of(row, strides, PLAN):
    """(offset from which the columns of a row count, its first column)."""
    return aligned(row_offset(row, strides), PLAN)


@triton.jit
def place_beside(row, lead, strides, PLAN):
    """The offset from which the columns of a row's gradient count as those of its logits do."""
    to = row_offset(row, strides) - lead
    if PLAN.peel:
        to = tl.multiple_of(to, PLAN.width)
    return to


@triton.jit
def columns_of(ptr, class_weight, lead, start, stop, OPTIONS):
    """Columns of a row that begins at column `lead`."""
    weights = class_weight
    if OPTIONS.weighted:
        weights = class_weight - lead
    return Row(ptr, weights, start, stop)


@triton.jit
def target_of(first, label, vocabulary):
    """The target's logit as it stands, of a row from its first column on; NaN and no read for a label out of
    range."""
    known = (label >= 0) & (label < vocabulary)
    return tl.load(first + label, mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def reduced_row(row, lead, z_target, numbers, OPTIONS, PLAN):
    """All that is kept of a row's columns, which count from `lead`."""
    state, taken = reduce_row(row, numbers, OPTIONS, PLAN)
    ties = 0.0
    if OPTIONS.ties:
        ties = count_ties(row, state.peak, numbers, OPTIONS, PLAN)
    predicted = 0.0
    if OPTIONS.predicted:
        predicted = numbered(taken, lead, row.stop)
    return Reduced(state, z_target, ties, predicted)
