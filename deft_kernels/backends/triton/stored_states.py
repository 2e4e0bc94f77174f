"""A row's states in memory, one for each of its parts: slices of a split row, or ranks. The numbers of a
state are those of `backends/states.py`; its offset follows from its peak."""

import triton
import triton.language as tl

from .lanes import offset_of
from .records import Reduced, State
from .state import combine


@triton.jit
def store_state(to, reduced, OPTIONS):
    tl.store(to, reduced.state.peak)
    tl.store(to + 1, reduced.state.s)
    tl.store(to + 2, reduced.state.u)
    tl.store(to + 3, reduced.state.t)
    tl.store(to + 4, reduced.z_target)
    if OPTIONS.smoothed:
        tl.store(to + 5, reduced.state.zsum)
    if OPTIONS.ties:
        tl.store(to + (5 + OPTIONS.smoothed), reduced.ties)
    if OPTIONS.predicted:
        tl.store(to + (5 + OPTIONS.smoothed + OPTIONS.ties), reduced.predicted)


@triton.jit
def load_parts(states, parts, stride, k, PARTS: tl.constexpr, OPTIONS):
    """All of a row from its parts, whose states lie `stride` numbers apart."""
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
    if OPTIONS.smoothed:
        zsum = tl.load(at + 5, mask=inside, other=0.0)
    ties = tl.zeros((PARTS,), tl.float32)
    if OPTIONS.ties:
        ties = tl.load(at + (5 + OPTIONS.smoothed), mask=inside, other=0.0)
    whole = combine(State(peak, offset, s, u, t, zsum), k, PARTS, OPTIONS)
    ties = tl.sum(tl.where(peak == whole.peak, ties, 0.0), 0)
    predicted = 0.0
    if OPTIONS.predicted:
        column = tl.load(at + (5 + OPTIONS.smoothed + OPTIONS.ties), mask=inside, other=0.0)
        predicted = tl.min(tl.where(inside & (peak == whole.peak), column, float("inf")), 0)
    return Reduced(whole, z_target, ties, predicted)
