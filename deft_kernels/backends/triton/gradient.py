"""The gradient's pass over a row: e_j (A + B e_j + C x_j) + PEAK_GRAD [z_j is the max], then the target."""

import triton
import triton.language as tl

from .arithmetic import cap_slope, exp2, fma, narrowed, softcapped, widened
from .edges import edge_column, whole_loads


@triton.jit
def tile_gradient(
    raw, columns, inside, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr,
    LOGS: tl.constexpr, PEAKS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits in fp32; exponent, square and logarithm terms only where asked for."""
    # With logarithms, -inf times C would be NaN.
    wide = widened(raw, LOGS, MODE)
    z = softcapped(wide, softcap, SOFTCAP)
    x = fma(z, k, -offset, MODE)
    e = exp2(x, MODE)
    factor = a
    if SQUARES:
        factor = fma(e, b, factor, MODE)
    if LOGS:
        factor = fma(x, c, factor, MODE)
    d = e * factor
    if PEAKS:
        d += tl.where(z == peak, peak_grad, 0.0)
    if SMOOTHED:
        if WEIGHTED:
            d -= spread * tl.load(class_weight + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            d -= spread
    if SOFTCAP:
        d *= cap_slope(wide, softcap)
    return d


@triton.jit
def write_masked(
    in_ptr, out_ptr, columns, stop, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr,
    LOGS: tl.constexpr, PEAKS: tl.constexpr, EVICT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of those of the columns that lie below `stop`: the edges of a row, and its last tiles."""
    inside = columns < stop
    raw = tl.load(in_ptr + columns, mask=inside, other=0.0, eviction_policy=EVICT)
    d = tile_gradient(
        raw, columns, inside, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
        SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
    )  # fmt: skip
    tl.store(out_ptr + columns, narrowed(d, out_ptr, MODE), mask=inside, eviction_policy=EVICT)


@triton.jit
def write_gradient(
    in_ptr, out_ptr, start, stop, label, class_weight, k, softcap, offset, peak,
    a, b, c, peak_grad, target, spread,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHTED: tl.constexpr, SQUARES: tl.constexpr, LOGS: tl.constexpr, PEAKS: tl.constexpr,
    PEEL: tl.constexpr, NEAR: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of the columns [start, stop) of a row; `in_ptr` and `out_ptr` may be the same.

    The target's element is written last, over what the loop wrote, instead of being compared everywhere.

    NEAR: this is the last use of the logits, and the gradient is not needed soon: the L2 cache may drop both.
    """
    TILE: tl.constexpr = LANES * WIDTH
    EVICT: tl.constexpr = "evict_first" if NEAR else ""
    lane = tl.arange(0, LANES)
    tile = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    first, last = whole_loads(start, stop, WIDTH, PEEL)
    if PEEL:
        edges = edge_column(lane, start, stop, first, last, WIDTH)
        write_masked(
            in_ptr, out_ptr, edges, stop, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
            SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, EVICT, MODE,
        )  # fmt: skip
    while first + 2 * TILE <= last:
        columns = first + tile
        raw0 = tl.load(in_ptr + columns, eviction_policy=EVICT)
        raw1 = tl.load(in_ptr + TILE + columns, eviction_policy=EVICT)
        d0 = tile_gradient(
            raw0, columns, columns >= 0, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
            SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
        )  # fmt: skip
        d1 = tile_gradient(
            raw1, TILE + columns, columns >= 0, class_weight, k, softcap, offset, peak, a, b, c, peak_grad,
            spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
        )  # fmt: skip
        tl.store(out_ptr + columns, narrowed(d0, out_ptr, MODE), eviction_policy=EVICT)
        tl.store(out_ptr + TILE + columns, narrowed(d1, out_ptr, MODE), eviction_policy=EVICT)
        first += 2 * TILE
    while first < last:
        write_masked(
            in_ptr, out_ptr, first + tile, last, class_weight, k, softcap, offset, peak, a, b, c, peak_grad,
            spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, EVICT, MODE,
        )  # fmt: skip
        first += TILE
    # Other threads wrote this element in the loop; they must be done before it is written again.
    tl.debug_barrier()
    if (label >= start) & (label < stop):
        tl.store(out_ptr + label, narrowed(target, out_ptr, MODE))


@triton.jit
def write_zeros(out_ptr, start, stop, LANES: tl.constexpr, WIDTH: tl.constexpr, PEEL: tl.constexpr):
    """Zeros into the columns [start, stop): a row that is not kept, whose logits are not even read."""
    TILE: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)
    tile = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    first, last = whole_loads(start, stop, WIDTH, PEEL)
    if PEEL:
        edges = edge_column(lane, start, stop, first, last, WIDTH)
        tl.store(out_ptr + edges, tl.zeros((LANES,), out_ptr.dtype.element_ty), mask=edges < stop)
    while first < last:
        columns = first + tile
        tl.store(out_ptr + columns, tl.zeros((LANES, WIDTH), out_ptr.dtype.element_ty), mask=columns < last)
        first += TILE
