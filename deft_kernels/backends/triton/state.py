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

from .arithmetic import INTERPRETED, LOWEST, MASKED_LOGIT, comparable, exp2, finite, fma, softcapped, widened
from .edges import edge_column, whole_loads


@triton.jit
def rescale(offset, s, u, t, target, ENTROPY: tl.constexpr, MODE: tl.constexpr):
    """The sums of a state, as they are for the offset `target` >= `offset`."""
    d = offset - target
    r = exp2(d, MODE)
    if ENTROPY:
        t = r * (t + d * s)
    return s * r, u * (r * r), t


@triton.jit
def offset_of(peak, k):
    return tl.maximum(peak * k, LOWEST)


@triton.jit
def tile_sums(z, offset, k, ENTROPY: tl.constexpr, MODE: tl.constexpr):
    """(2^x, x) in fp32 for a tile of logits [LANES, WIDTH], `offset` [LANES, 1]."""
    x = fma(widened(z, ENTROPY, MODE), k, -offset, MODE)
    return exp2(x, MODE), x


@triton.jit
def load_masked(row_ptr, columns, start, stop, softcap, SOFTCAP: tl.constexpr):
    """A tile of transformed logits in fp32; columns outside [start, stop) are -inf and add nothing."""
    inside = (columns >= start) & (columns < stop)
    z = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    z = softcapped(z, softcap, SOFTCAP)
    if SOFTCAP:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def absorb(
    row_ptr, columns, start, stop, peak, offset, s, u, t, zsum, class_weight, k, softcap,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, ENTROPY: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """One masked tile into the lanes' sums; the loop for heads, tails and transformed logits."""
    inside = (columns >= start) & (columns < stop)
    z = load_masked(row_ptr, columns, start, stop, softcap, SOFTCAP)
    if SMOOTHED:
        if WEIGHTED:
            w = tl.load(class_weight + columns, mask=inside, other=0.0).to(tl.float32)
            # A class of weight 0 adds nothing, masked or not.
            zsum += tl.sum(tl.where(inside & (w != 0.0), z * w, 0.0), 1)
        else:
            zsum += tl.sum(tl.where(inside, z, 0.0), 1)
    if ENTROPY:
        z = finite(z, MASKED_LOGIT)
    peak = tl.maximum(peak, tl.max(z, 1))
    moved = offset_of(peak, k)
    s, u, t = rescale(offset, s, u, t, moved, ENTROPY, MODE)
    e, x = tile_sums(z, moved[:, None], k, ENTROPY, MODE)
    s += tl.sum(e, 1)
    u += tl.sum(e * e, 1)
    if ENTROPY:
        t += tl.sum(e * x, 1)
    return peak, moved, s, u, t, zsum


@triton.jit
def add_pairs(s, u, other_s, other_u):
    return s + other_s, u + other_u


@triton.jit
def both_sums(s, u, MODE: tl.constexpr):
    """Sums of two vectors over the lanes, in one meeting of the warps instead of two."""
    if MODE == INTERPRETED:
        return tl.sum(s, 0), tl.sum(u, 0)
    else:
        return tl.reduce((s, u), 0, add_pairs)


@triton.jit
def absorb_four(
    z0, z1, z2, z3, peak, offset, s, u, t, k, ENTROPY: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """Four tiles of logits, all loaded before the first is used, into the lanes' sums."""
    z0, z1 = comparable(z0, MODE), comparable(z1, MODE)
    z2, z3 = comparable(z2, MODE), comparable(z3, MODE)
    highest = tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
    peak = tl.maximum(peak, tl.max(highest, 1).to(tl.float32))
    moved = offset_of(peak, k)
    s, u, t = rescale(offset, s, u, t, moved, ENTROPY, MODE)
    e0, x0 = tile_sums(z0, moved[:, None], k, ENTROPY, MODE)
    e1, x1 = tile_sums(z1, moved[:, None], k, ENTROPY, MODE)
    e2, x2 = tile_sums(z2, moved[:, None], k, ENTROPY, MODE)
    e3, x3 = tile_sums(z3, moved[:, None], k, ENTROPY, MODE)
    s += tl.sum((e0 + e1) + (e2 + e3), 1)
    squares = fma(e3, e3, fma(e2, e2, fma(e1, e1, e0 * e0, MODE), MODE), MODE)
    u += tl.sum(squares, 1)
    if ENTROPY:
        t += tl.sum(fma(e3, x3, fma(e2, x2, fma(e1, x1, e0 * x0, MODE), MODE), MODE), 1)
    return peak, moved, s, u, t


@triton.jit
def load_tail(row_ptr, columns, last, EVICT: tl.constexpr):
    """A tile in the logits' own dtype; columns from `last` on are -inf."""
    return tl.load(row_ptr + columns, mask=columns < last, other=float("-inf"), eviction_policy=EVICT)


@triton.jit
def columns_of_lane(lane, first, one, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [LANES, WIDTH] that the loop gives to lane `one` in the LANES tiles from `first` on."""
    return first + (lane * (LANES * WIDTH))[:, None] + one * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def first_of_row(
    row_ptr, start, stop, begin, last, peak, highest, winner, taken, softcap,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The first column that holds the row's largest logit; `taken` is the first one of the winning lane.

    Lanes do not note columns in the loop. So each other lane that has met as large a logit is read once more,
    by all of them together: V / LANES columns, mostly of no lane at all. Lanes go by their number, so that
    none that follows can come before a column of the first tile.
    """
    TILE: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)
    other = tl.min(tl.where((peak == highest) & (lane > winner), lane, LANES), 0)
    if PEEL:
        if other < LANES:
            edges = edge_column(lane, start, stop, begin, last, WIDTH)
            z_edge = load_masked(row_ptr, edges, start, stop, softcap, SOFTCAP)
            taken = tl.minimum(taken, tl.min(tl.where(z_edge == highest, edges, stop), 0))
    settled = tl.minimum(begin + TILE, last)
    while (other < LANES) & (taken >= settled):
        first = tl.multiple_of(begin + 0, WIDTH)
        while first < last:
            columns = columns_of_lane(lane, first, other, LANES, WIDTH)
            z = load_masked(row_ptr, columns, start, last, softcap, SOFTCAP)
            taken = tl.minimum(taken, tl.min(tl.min(tl.where(z == highest, columns, stop), 1), 0))
            first += LANES * TILE
        other = tl.min(tl.where((peak == highest) & (lane > other), lane, LANES), 0)
    return taken


@triton.jit
def reduce_row(
    row_ptr, start, stop, class_weight, k, softcap,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHTED: tl.constexpr, ENTROPY: tl.constexpr, PREDICTED: tl.constexpr, PEEL: tl.constexpr,
    TAIL: tl.constexpr, NEAR: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """State (peak, offset, s, u, t, zsum) of the columns [start, stop) of a row, as scalars, and a column.

    With PREDICTED that is the first one with the largest logit; `stop` where no column has it, in a row of
    NaN or of masks alone.

    The columns at the edges go first (see `edges`), then four tiles a turn are in flight, and the lanes'
    offsets move once a turn; what is left after the last full turn is masked.

    TAIL: those last columns are loaded at once, as one more turn, instead of tile by tile: fewer loads wait
    for each other.
    NEAR: the row will be read again soon, and the L2 cache is asked to keep it.
    """
    TILE: tl.constexpr = LANES * WIDTH
    EVICT: tl.constexpr = "evict_last" if NEAR else ""
    lane = tl.arange(0, LANES)
    tile = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    offset = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    u = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    zsum = tl.zeros((LANES,), tl.float32)

    begin, last = whole_loads(start, stop, WIDTH, PEEL)
    if PEEL:
        edges = edge_column(lane, start, stop, begin, last, WIDTH)[:, None]
        peak, offset, s, u, t, zsum = absorb(
            row_ptr, edges, start, stop, peak, offset, s, u, t, zsum, class_weight, k, softcap,
            SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, MODE,
        )  # fmt: skip

    first = tl.multiple_of(begin + 0, WIDTH)
    if not (SOFTCAP or SMOOTHED):
        while first + 4 * TILE <= last:
            z0 = tl.load(row_ptr + first + tile, eviction_policy=EVICT)
            z1 = tl.load(row_ptr + first + TILE + tile, eviction_policy=EVICT)
            z2 = tl.load(row_ptr + first + 2 * TILE + tile, eviction_policy=EVICT)
            z3 = tl.load(row_ptr + first + 3 * TILE + tile, eviction_policy=EVICT)
            peak, offset, s, u, t = absorb_four(z0, z1, z2, z3, peak, offset, s, u, t, k, ENTROPY, MODE)
            first += 4 * TILE
    if TAIL and not (SOFTCAP or SMOOTHED):
        if first < last:
            z0 = load_tail(row_ptr, first + tile, last, EVICT)
            z1 = load_tail(row_ptr, first + TILE + tile, last, EVICT)
            z2 = load_tail(row_ptr, first + 2 * TILE + tile, last, EVICT)
            z3 = load_tail(row_ptr, first + 3 * TILE + tile, last, EVICT)
            peak, offset, s, u, t = absorb_four(z0, z1, z2, z3, peak, offset, s, u, t, k, ENTROPY, MODE)
    else:
        while first < last:
            peak, offset, s, u, t, zsum = absorb(
                row_ptr, first + tile, start, last, peak, offset, s, u, t, zsum, class_weight, k, softcap,
                SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, MODE,
            )  # fmt: skip
            first += TILE

    # Lanes into one, and the lane that holds the row's largest logit summed again without it: without one of
    # them, should several be equally large, which is the first.
    highest, winner = tl.max(peak, 0, return_indices=True)
    # The largest of the lanes' offsets: a product with k > 0 keeps the order of the peaks.
    joint = offset_of(highest, k)
    s, u, t = rescale(offset, s, u, t, joint, ENTROPY, MODE)
    taken = stop + 0
    at_edge = stop + 0
    z_edge = highest
    if PEEL:
        at_edge = edge_column(winner, start, stop, begin, last, WIDTH)
        z_edge = load_masked(row_ptr, at_edge, start, stop, softcap, SOFTCAP)
        taken = tl.where((z_edge == highest) & (at_edge < begin), at_edge, stop)
    s0 = tl.zeros((LANES,), tl.float32)
    u0 = tl.zeros((LANES,), tl.float32)
    t0 = tl.zeros((LANES,), tl.float32)
    first = tl.multiple_of(begin + 0, WIDTH)
    while first < last:
        columns = columns_of_lane(lane, first, winner, LANES, WIDTH)
        z = load_masked(row_ptr, columns, start, last, softcap, SOFTCAP)
        taken = tl.minimum(taken, tl.min(tl.min(tl.where(z == highest, columns, stop), 1), 0))
        z = tl.where(columns == taken, float("-inf"), z)
        if ENTROPY:
            z = finite(z, MASKED_LOGIT)
        e, x = tile_sums(z, joint, k, ENTROPY, MODE)
        s0 += tl.sum(e, 1)
        u0 += tl.sum(e * e, 1)
        if ENTROPY:
            t0 += tl.sum(e * x, 1)
        first += LANES * TILE
    if PEEL:
        taken = tl.where(z_edge == highest, tl.minimum(taken, at_edge), taken)
        z_edge = tl.where(at_edge == taken, float("-inf"), z_edge)
        if ENTROPY:
            z_edge = finite(z_edge, MASKED_LOGIT)
        e, x = tile_sums(z_edge, joint, k, ENTROPY, MODE)
        s0 += tl.where(lane == 0, e, 0.0)
        u0 += tl.where(lane == 0, e * e, 0.0)
        if ENTROPY:
            t0 += tl.where(lane == 0, e * x, 0.0)
    s = tl.where(lane == winner, 0.0, s) + s0
    u = tl.where(lane == winner, 0.0, u) + u0
    if ENTROPY:
        t = tl.sum(tl.where(lane == winner, 0.0, t) + t0, 0)
    else:
        t = 0.0
    if SMOOTHED:
        zsum = tl.sum(zsum, 0)
    else:
        zsum = 0.0
    s, u = both_sums(s, u, MODE)
    if PREDICTED:
        taken = first_of_row(
            row_ptr, start, stop, begin, last, peak, highest, winner, taken, softcap,
            LANES, WIDTH, SOFTCAP, PEEL,
        )  # fmt: skip
    return highest, joint, s, u, t, zsum, taken


@triton.jit
def numbered(column, lead, stop):
    """1 + the column of a row that begins at `lead`, which fp32 holds up to 2^24; 0 for none."""
    return tl.where(column < stop, column - lead + 1, 0).to(tl.float32)


@triton.jit
def combine(peak, offset, s, u, t, zsum, k, SPLITS: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr):
    """States along axis 0 into one: all but one give up the column that their peak stands for."""
    joint = tl.max(offset, 0)
    s, u, t = rescale(offset, s, u, t, joint, ENTROPY, MODE)
    highest, winner = tl.max(peak, 0, return_indices=True)
    e, x = tile_sums(peak, joint, k, ENTROPY, MODE)
    other = tl.arange(0, SPLITS) != winner
    s += tl.where(other, e, 0.0)
    u += tl.where(other, e * e, 0.0)
    if ENTROPY:
        t += tl.where(other & (e > 0.0), e * x, 0.0)
    return highest, joint, tl.sum(s, 0), tl.sum(u, 0), tl.sum(t, 0), tl.sum(zsum, 0)


@triton.jit
def count_ties(
    row_ptr, start, stop, peak, softcap, LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr
):
    """How many columns hold the largest logit; a second pass, for the gradient through max p alone."""
    TILE: tl.constexpr = LANES * WIDTH
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    count = tl.zeros((LANES,), tl.float32)
    first = start + 0
    while first < stop:
        z = load_masked(row_ptr, first + tile, start, stop, softcap, SOFTCAP)
        count += tl.sum(tl.where((first + tile < stop) & (z == peak), 1.0, 0.0), 1)
        first += TILE
    return tl.sum(count, 0)
