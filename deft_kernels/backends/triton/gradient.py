"""The pass over a row that writes its gradient: see `records.Gradient`. The target's element comes last."""

import triton
import triton.language as tl

from .arithmetic import cap_slope, exp2, fma, narrowed, softcapped, widened
from .edges import edge_column, whole_loads
from .lanes import load_four
from .records import Gradient


@triton.jit
def scaled(g, factor):
    """For another upstream than 1."""
    a, b, c, peak_grad = g.a * factor, g.b * factor, g.c * factor, g.peak_grad * factor
    return Gradient(g.offset, g.peak, a, b, c, peak_grad, g.target * factor, g.spread * factor)


@triton.jit
def sloped(g, slope):
    """By the target's logit before the soft cap; the other columns take their own slope in the loop."""
    return Gradient(g.offset, g.peak, g.a, g.b, g.c, g.peak_grad, g.target * slope, g.spread)


@triton.jit
def tile_gradient(raw, columns, inside, row, g, numbers, OPTIONS):
    """Gradient of a tile of logits in fp32; exponent, square and logarithm terms only where asked for."""
    # With logarithms, -inf times C would be NaN.
    wide = widened(raw, OPTIONS.logs, OPTIONS.mode)
    z = softcapped(wide, numbers.softcap, OPTIONS.softcap)
    x = fma(z, numbers.k, -g.offset, OPTIONS.mode)
    e = exp2(x, OPTIONS.mode)
    factor = g.a
    if OPTIONS.squares:
        factor = fma(e, g.b, factor, OPTIONS.mode)
    if OPTIONS.logs:
        factor = fma(x, g.c, factor, OPTIONS.mode)
    d = e * factor
    if OPTIONS.peaks:
        d += tl.where(z == g.peak, g.peak_grad, 0.0)
    if OPTIONS.smoothed:
        if OPTIONS.weighted:
            d -= g.spread * tl.load(row.class_weight + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            d -= g.spread
    if OPTIONS.softcap:
        d *= cap_slope(wide, numbers.softcap)
    return d


@triton.jit
def write_masked(row, to, columns, stop, g, numbers, OPTIONS, EVICT: tl.constexpr):
    """Gradient of those of the columns that lie below `stop`: the edges of a row, and its last tiles."""
    inside = columns < stop
    raw = tl.load(row.ptr + columns, mask=inside, other=0.0, eviction_policy=EVICT)
    d = tile_gradient(raw, columns, inside, row, g, numbers, OPTIONS)
    tl.store(to + columns, narrowed(d, to, OPTIONS.mode), mask=inside, eviction_policy=EVICT)


@triton.jit
def write_two(raw0, raw1, row, to, columns, g, numbers, OPTIONS, PLAN):
    """Gradient of two tiles, the second TILE columns after the first."""
    TILE: tl.constexpr = PLAN.lanes * PLAN.width
    EVICT: tl.constexpr = "evict_first" if PLAN.near else ""
    d0 = tile_gradient(raw0, columns, columns >= 0, row, g, numbers, OPTIONS)
    d1 = tile_gradient(raw1, TILE + columns, columns >= 0, row, g, numbers, OPTIONS)
    tl.store(to + columns, narrowed(d0, to, OPTIONS.mode), eviction_policy=EVICT)
    tl.store(to + TILE + columns, narrowed(d1, to, OPTIONS.mode), eviction_policy=EVICT)


@triton.jit
def write_gradient(row, to, label, g, numbers, OPTIONS, PLAN):
    """Gradient of a row's columns; `row.ptr` and `to` may be the same. label: the target's column.

    The target's element is written last, over what the loop wrote, instead of being compared everywhere.

    near: this is the last use of the logits, and the gradient is not needed soon: the L2 cache may drop both.
    deep: four tiles are loaded before the first is written, instead of two.
    """
    WIDTH: tl.constexpr = PLAN.width
    TILE: tl.constexpr = PLAN.lanes * WIDTH
    EVICT: tl.constexpr = "evict_first" if PLAN.near else ""
    lane = tl.arange(0, PLAN.lanes)
    tile = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    first, last = whole_loads(row, PLAN)
    if PLAN.peel:
        edges = edge_column(lane, row, first, last, PLAN)
        write_masked(row, to, edges, row.stop, g, numbers, OPTIONS, EVICT)
    if PLAN.deep:
        while first + 4 * TILE <= last:
            columns = first + tile
            raw0, raw1, raw2, raw3 = load_four(row.ptr + first, tile, TILE, EVICT)
            write_two(raw0, raw1, row, to, columns, g, numbers, OPTIONS, PLAN)
            write_two(raw2, raw3, row, to, 2 * TILE + columns, g, numbers, OPTIONS, PLAN)
            first += 4 * TILE
    while first + 2 * TILE <= last:
        columns = first + tile
        raw0 = tl.load(row.ptr + columns, eviction_policy=EVICT)
        raw1 = tl.load(row.ptr + TILE + columns, eviction_policy=EVICT)
        write_two(raw0, raw1, row, to, columns, g, numbers, OPTIONS, PLAN)
        first += 2 * TILE
    while first < last:
        write_masked(row, to, first + tile, last, g, numbers, OPTIONS, EVICT)
        first += TILE
    # Other threads wrote this element in the loop; they must be done before it is written again.
    tl.debug_barrier()
    if (label >= row.start) & (label < row.stop):
        tl.store(to + label, narrowed(g.target, to, OPTIONS.mode))


@triton.jit
def write_zeros(row, PLAN):
    """Zeros into a row of the gradient: of one that is not kept, whose logits are not even read."""
    ELEMENT: tl.constexpr = row.ptr.dtype.element_ty
    TILE: tl.constexpr = PLAN.lanes * PLAN.width
    lane = tl.arange(0, PLAN.lanes)
    tile = (lane * PLAN.width)[:, None] + tl.arange(0, PLAN.width)[None, :]
    first, last = whole_loads(row, PLAN)
    if PLAN.peel:
        edges = edge_column(lane, row, first, last, PLAN)
        tl.store(row.ptr + edges, tl.zeros((PLAN.lanes,), ELEMENT), mask=edges < row.stop)
    while first < last:
        columns = first + tile
        tl.store(row.ptr + columns, tl.zeros((PLAN.lanes, PLAN.width), ELEMENT), mask=columns < last)
        first += TILE
