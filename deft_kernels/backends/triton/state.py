"""The state of a row's softmax and its reduction over the vocabulary.

State, in the log2 domain with x_j = k z_j - offset, k = log2(e) / temperature:

    peak = max z_j    s = sum 2^x_j    u = sum 2^(2 x_j)    t = sum 2^x_j x_j    zsum = sum w_j z_j

where s, u and t run over all columns but one: the largest, which `peak` stands for. Its 2^x is about 1, and a
sum that holds it has lost the digits of a confident row's remainder, which is what that row's loss is made
of. `offset` is any number near the largest k z_j; it is the same rounded number everywhere, so its rounding
cancels. States with different offsets combine, which serves programs and ranks alike; the identity has peak
-inf, offset LOWEST and zero sums.

Every lane (one thread) first keeps sums of its own over its columns, the largest included, 16 bytes of
logits a load, and lanes meet once a row: no barrier and no shuffle in the loop.
"""

import triton
import triton.language as tl

from .arithmetic import finite
from .edges import edge_column, whole_loads
from .lanes import (
    absorb,
    absorb_four,
    columns_of_lane,
    load_four,
    load_four_of_tail,
    load_masked,
    moved,
    nothing,
    offset_of,
    tile_sums,
)
from .predicted import first_of_row
from .records import Row, State


@triton.jit
def add_pairs(s, u, other_s, other_u):
    return s + other_s, u + other_u


@triton.jit
def both_sums(s, u, MODE: tl.constexpr):
    """Sums of two vectors over the lanes, in one meeting of the warps instead of two."""
    if MODE == "interpreted":
        return tl.sum(s, 0), tl.sum(u, 0)
    else:
        return tl.reduce((s, u), 0, add_pairs)


@triton.jit
def reduce_row(row, numbers, OPTIONS, PLAN):
    """The state of a row's columns, as scalars, and a column.

    With `predicted` that is the first one with the largest logit; `stop` where no column has it, in a row of
    NaN or of masks alone.

    The columns at the edges go first (see `edges`), then four tiles a turn are in flight, and the lanes'
    offsets move once a turn; what is left after the last full turn is masked.

    tail: those last columns are loaded at once, as one more turn, instead of tile by tile: fewer loads wait
    for each other.
    near: the row will be read again soon, and the L2 cache is asked to keep it.
    deep: eight tiles a turn.
    """
    LANES: tl.constexpr = PLAN.lanes
    WIDTH: tl.constexpr = PLAN.width
    TILE: tl.constexpr = LANES * WIDTH
    TURN: tl.constexpr = 8 if PLAN.deep else 4
    EVICT: tl.constexpr = "evict_last" if PLAN.near else ""
    lane = tl.arange(0, LANES)
    tile = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    state = nothing(LANES)

    begin, last = whole_loads(row, PLAN)
    body = Row(row.ptr, row.class_weight, row.start, last)
    if PLAN.peel:
        state = absorb(state, row, edge_column(lane, row, begin, last, PLAN)[:, None], numbers, OPTIONS)

    first = tl.multiple_of(begin + 0, WIDTH)
    if not (OPTIONS.softcap or OPTIONS.smoothed):
        while first + TURN * TILE <= last:
            z0, z1, z2, z3 = load_four(row.ptr + first, tile, TILE, EVICT)
            if PLAN.deep:
                z4, z5, z6, z7 = load_four(row.ptr + first + 4 * TILE, tile, TILE, EVICT)
            state = absorb_four(state, z0, z1, z2, z3, numbers, OPTIONS)
            if PLAN.deep:
                state = absorb_four(state, z4, z5, z6, z7, numbers, OPTIONS)
            first += TURN * TILE
    if PLAN.tail and not (OPTIONS.softcap or OPTIONS.smoothed):
        if first < last:
            z0, z1, z2, z3 = load_four_of_tail(row, first + tile, last, TILE, EVICT)
            if PLAN.deep:
                z4, z5, z6, z7 = load_four_of_tail(row, first + 4 * TILE + tile, last, TILE, EVICT)
            state = absorb_four(state, z0, z1, z2, z3, numbers, OPTIONS)
            if PLAN.deep:
                if first + 4 * TILE < last:
                    state = absorb_four(state, z4, z5, z6, z7, numbers, OPTIONS)
    else:
        while first < last:
            state = absorb(state, body, first + tile, numbers, OPTIONS)
            first += TILE
    return join_lanes(state, row, body, begin, numbers, OPTIONS, PLAN)


@triton.jit
def join_lanes(state, row, body, begin, numbers, OPTIONS, PLAN):
    """Lanes into one, and the lane that holds the row's largest logit summed again without it: without one of
    them, should several be equally large, which is the first."""
    LANES: tl.constexpr = PLAN.lanes
    WIDTH: tl.constexpr = PLAN.width
    lane = tl.arange(0, LANES)
    highest, winner = tl.max(state.peak, 0, return_indices=True)
    # The largest of the lanes' offsets: a product with k > 0 keeps the order of the peaks.
    joint = offset_of(highest, numbers.k)
    state = moved(state, joint, OPTIONS)
    taken = row.stop + 0
    at_edge = row.stop + 0
    z_edge = highest
    if PLAN.peel:
        at_edge = edge_column(winner, row, begin, body.stop, PLAN)
        z_edge = load_masked(row, at_edge, numbers, OPTIONS)
        taken = tl.where((z_edge == highest) & (at_edge < begin), at_edge, row.stop)
    s0 = tl.zeros((LANES,), tl.float32)
    u0 = tl.zeros((LANES,), tl.float32)
    t0 = tl.zeros((LANES,), tl.float32)
    first = tl.multiple_of(begin + 0, WIDTH)
    while first < body.stop:
        columns = columns_of_lane(lane, first, winner, PLAN)
        z = load_masked(body, columns, numbers, OPTIONS)
        taken = tl.minimum(taken, tl.min(tl.min(tl.where(z == highest, columns, row.stop), 1), 0))
        z = tl.where(columns == taken, float("-inf"), z)
        if OPTIONS.entropy:
            z = finite(z)
        e, x = tile_sums(z, joint, numbers.k, OPTIONS)
        s0 += tl.sum(e, 1)
        u0 += tl.sum(e * e, 1)
        if OPTIONS.entropy:
            t0 += tl.sum(e * x, 1)
        first += LANES * LANES * WIDTH
    if PLAN.peel:
        taken = tl.where(z_edge == highest, tl.minimum(taken, at_edge), taken)
        z_edge = tl.where(at_edge == taken, float("-inf"), z_edge)
        if OPTIONS.entropy:
            z_edge = finite(z_edge)
        e, x = tile_sums(z_edge, joint, numbers.k, OPTIONS)
        s0 += tl.where(lane == 0, e, 0.0)
        u0 += tl.where(lane == 0, e * e, 0.0)
        if OPTIONS.entropy:
            t0 += tl.where(lane == 0, e * x, 0.0)
    s = tl.where(lane == winner, 0.0, state.s) + s0
    u = tl.where(lane == winner, 0.0, state.u) + u0
    t = 0.0
    if OPTIONS.entropy:
        t = tl.sum(tl.where(lane == winner, 0.0, state.t) + t0, 0)
    zsum = 0.0
    if OPTIONS.smoothed:
        zsum = tl.sum(state.zsum, 0)
    s, u = both_sums(s, u, OPTIONS.mode)
    if OPTIONS.predicted:
        taken = first_of_row(row, body, begin, state.peak, highest, winner, taken, numbers, OPTIONS, PLAN)
    return State(highest, joint, s, u, t, zsum), taken


@triton.jit
def combine(states, k, PARTS: tl.constexpr, OPTIONS):
    """States along axis 0 into one: all but one give up the column that their peak stands for."""
    joint = tl.max(states.offset, 0)
    rescaled = moved(states, joint, OPTIONS)
    highest, winner = tl.max(states.peak, 0, return_indices=True)
    e, x = tile_sums(states.peak, joint, k, OPTIONS)
    other = tl.arange(0, PARTS) != winner
    s = rescaled.s + tl.where(other, e, 0.0)
    u = rescaled.u + tl.where(other, e * e, 0.0)
    t = rescaled.t
    if OPTIONS.entropy:
        t += tl.where(other & (e > 0.0), e * x, 0.0)
    return State(highest, joint, tl.sum(s, 0), tl.sum(u, 0), tl.sum(t, 0), tl.sum(states.zsum, 0))
