"""The columns of a row that loads of 16 bytes do not cover: a few at either end, where rows do not begin and
end at a 16-byte boundary. They are handled one to a lane, so that all between them moves in full width: a
masked tile at an odd offset would take eight loads of 2 bytes a lane for bf16.
"""

import triton
import triton.language as tl


@triton.jit
def whole_loads(row, PLAN):
    """(first, last): full loads cover the columns [first, last) of a row, none if last <= first."""
    WIDTH: tl.constexpr = PLAN.width
    if PLAN.peel:
        first = tl.multiple_of((row.start + WIDTH - 1) // WIDTH * WIDTH, WIDTH)
        return first, tl.multiple_of(row.stop // WIDTH * WIDTH, WIDTH)
    else:
        return tl.multiple_of(row.start, WIDTH), row.stop


@triton.jit
def edge_column(lane, row, first, last, PLAN):
    """The column at an edge that a lane handles, or one that is not below `stop`: nothing.

    The first WIDTH lanes take the columns before `first`, the next WIDTH those from `last` on.
    """
    WIDTH: tl.constexpr = PLAN.width
    head = tl.where(row.start + lane < first, row.start + lane, row.stop)
    tail = tl.maximum(first, last) + lane - WIDTH
    return tl.where(lane < WIDTH, head, tl.where(lane < 2 * WIDTH, tail, row.stop))
