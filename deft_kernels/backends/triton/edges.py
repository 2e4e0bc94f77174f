"""The columns of a row that loads of 16 bytes do not cover: a few at either end, where rows do not begin and
end at a 16-byte boundary. They are handled one to a lane, so that all between them moves in full width: a
masked tile at an odd offset would take eight loads of 2 bytes a lane for bf16.
"""

import triton
import triton.language as tl


@triton.jit
def whole_loads(start, stop, WIDTH: tl.constexpr, PEEL: tl.constexpr):
    """(first, last): full loads cover the columns [first, last) of [start, stop), none if last <= first."""
    if PEEL:
        first = tl.multiple_of((start + WIDTH - 1) // WIDTH * WIDTH, WIDTH)
        return first, tl.multiple_of(stop // WIDTH * WIDTH, WIDTH)
    else:
        return tl.multiple_of(start, WIDTH), stop


@triton.jit
def edge_column(lane, start, stop, first, last, WIDTH: tl.constexpr):
    """The column at an edge that a lane handles, or one that is not below `stop`: nothing.

    The first WIDTH lanes take the columns before `first`, the next WIDTH those from `last` on.
    """
    head = tl.where(start + lane < first, start + lane, stop)
    tail = tl.maximum(first, last) + lane - WIDTH
    return tl.where(lane < WIDTH, head, tl.where(lane < 2 * WIDTH, tail, stop))
