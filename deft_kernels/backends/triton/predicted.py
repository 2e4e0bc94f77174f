"""Which columns hold a row's largest logit: the first of them, and how many there are."""

import triton
import triton.language as tl

from .edges import edge_column
from .lanes import columns_of_lane, load_masked


@triton.jit
def first_of_row(row, body, begin, peak, highest, winner, taken, numbers, OPTIONS, PLAN):
    """The first column that holds the row's largest logit; `taken` is the first one of the winning lane.

    body: the row's columns but for those at its end that whole loads do not cover.  peak: of each lane.

    Lanes do not note columns in the loop. So each other lane that has met as large a logit is read once more,
    by all of them together: V / LANES columns, mostly of no lane at all. Lanes go by their number, so that
    none that follows can come before a column of the first tile.
    """
    LANES: tl.constexpr = PLAN.lanes
    TILE: tl.constexpr = LANES * PLAN.width
    lane = tl.arange(0, LANES)
    other = tl.min(tl.where((peak == highest) & (lane > winner), lane, LANES), 0)
    if PLAN.peel:
        if other < LANES:
            edges = edge_column(lane, row, begin, body.stop, PLAN)
            z_edge = load_masked(row, edges, numbers, OPTIONS)
            taken = tl.minimum(taken, tl.min(tl.where(z_edge == highest, edges, row.stop), 0))
    settled = tl.minimum(begin + TILE, body.stop)
    while (other < LANES) & (taken >= settled):
        first = tl.multiple_of(begin + 0, PLAN.width)
        while first < body.stop:
            columns = columns_of_lane(lane, first, other, PLAN)
            z = load_masked(body, columns, numbers, OPTIONS)
            taken = tl.minimum(taken, tl.min(tl.min(tl.where(z == highest, columns, row.stop), 1), 0))
            first += LANES * TILE
        other = tl.min(tl.where((peak == highest) & (lane > other), lane, LANES), 0)
    return taken


@triton.jit
def numbered(column, lead, stop):
    """1 + the column of a row that begins at `lead`, which fp32 holds up to 2^24; 0 for none."""
    return tl.where(column < stop, column - lead + 1, 0).to(tl.float32)


@triton.jit
def count_ties(row, peak, numbers, OPTIONS, PLAN):
    """How many columns hold the largest logit; a second pass, for the gradient through max p alone."""
    LANES: tl.constexpr = PLAN.lanes
    WIDTH: tl.constexpr = PLAN.width
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    count = tl.zeros((LANES,), tl.float32)
    first = row.start + 0
    while first < row.stop:
        z = load_masked(row, first + tile, numbers, OPTIONS)
        count += tl.sum(tl.where((first + tile < row.stop) & (z == peak), 1.0, 0.0), 1)
        first += LANES * WIDTH
    return tl.sum(count, 0)
