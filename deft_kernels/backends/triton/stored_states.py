"""A row's states in memory, one for each of its parts: slices of a split row, or ranks. The numbers of a
state are those of `backends/states.py`; its offset follows from its peak."""

import triton
import triton.language as tl

from .state import combine, offset_of


@triton.jit
def store_state(
    to, peak, s, u, t, z_target, zsum, ties, predicted,
    SMOOTHED: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    tl.store(to, peak)
    tl.store(to + 1, s)
    tl.store(to + 2, u)
    tl.store(to + 3, t)
    tl.store(to + 4, z_target)
    if SMOOTHED:
        tl.store(to + 5, zsum)
    if TIES:
        tl.store(to + (5 + SMOOTHED), ties)
    if PREDICTED:
        tl.store(to + (5 + SMOOTHED + TIES), predicted)


@triton.jit
def load_parts(
    states, parts, stride, k,
    PARTS: tl.constexpr, SMOOTHED: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr,
    ENTROPY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """(peak, offset, s, u, t, z_target, zsum, ties, predicted) of a row from its parts, `stride` apart."""
    part = tl.arange(0, PARTS)
    at = states + part.to(tl.int64) * stride
    inside = part < parts
    peak = tl.load(at, mask=inside, other=float("-inf"))
    offset = offset_of(peak, k)
    s = tl.load(at + 1, mask=inside, other=0.0)
    u = tl.load(at + 2, mask=inside, other=0.0)
    t = tl.load(at + 3, mask=inside, other=0.0)
    # -inf in every part but the target's own.
    z_target = tl.max(tl.load(at + 4, mask=inside, other=float("-inf")), 0)
    zsum = tl.zeros((PARTS,), tl.float32)
    if SMOOTHED:
        zsum = tl.load(at + 5, mask=inside, other=0.0)
    ties = tl.zeros((PARTS,), tl.float32)
    if TIES:
        ties = tl.load(at + (5 + SMOOTHED), mask=inside, other=0.0)
    highest, offset, s, u, t, total = combine(peak, offset, s, u, t, zsum, k, PARTS, ENTROPY, MODE)
    ties = tl.sum(tl.where(peak == highest, ties, 0.0), 0)
    predicted = 0.0
    if PREDICTED:
        column = tl.load(at + (5 + SMOOTHED + TIES), mask=inside, other=0.0)
        predicted = tl.min(tl.where(inside & (peak == highest), column, float("inf")), 0)
    return highest, offset, s, u, t, z_target, total, ties, predicted
