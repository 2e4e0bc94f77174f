"""The gradient's pass over a row: e_j (A + B e_j + C x_j) + PEAK_GRAD [z_j is the max], then the target."""

import triton
import triton.language as tl

from .device import exp2, fma, narrowed, softcapped, widened


@triton.jit
def tile_gradient(
    raw, columns, inside, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr,
    LOGS: tl.constexpr, PEAKS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits in fp32; exponent, square and logarithm terms only where asked for."""
    # With logarithms, -inf times C would be NaN.
    z = softcapped(widened(raw, LOGS, MODE), softcap, SOFTCAP)
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
        ratio = z / softcap
        d *= 1.0 - ratio * ratio
    return d


@triton.jit
def write_masked(
    in_ptr, out_ptr, columns, start, stop, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr,
    LOGS: tl.constexpr, PEAKS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of the columns of a tile that lie in [start, stop): a row's head and tail."""
    inside = (columns >= start) & (columns < stop)
    raw = tl.load(in_ptr + columns, mask=inside, other=0.0)
    d = tile_gradient(
        raw, columns, inside, class_weight, k, softcap, offset, peak, a, b, c, peak_grad, spread,
        SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
    )  # fmt: skip
    tl.store(out_ptr + columns, narrowed(d, out_ptr, MODE), mask=inside)


@triton.jit
def write_pair(
    in_ptr, out_ptr, columns, TILE: tl.constexpr, class_weight, k, softcap, offset, peak, a, b, c, peak_grad,
    spread,
    SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SQUARES: tl.constexpr,
    LOGS: tl.constexpr, PEAKS: tl.constexpr, EVICT: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of two whole tiles, both loaded before the first is used."""
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


@triton.jit
def write_gradient(
    in_ptr, out_ptr, start, stop, lead, label, z_target, class_weight, k, softcap, offset, peak,
    a, b, c, peak_grad, target, spread,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHTED: tl.constexpr, SQUARES: tl.constexpr, LOGS: tl.constexpr, PEAKS: tl.constexpr,
    NEAR: tl.constexpr, BACKWARDS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of the columns [start, stop) of a row; `in_ptr` and `out_ptr` may be the same.

    The target's element is written last, over what the loop wrote, instead of being compared everywhere.

    NEAR: this is the last use of the logits, and the gradient is not needed soon: the L2 cache may drop both.
    BACKWARDS: from the row's end to its start, because the columns that were read last are still in L2 where
    whole rows no longer fit.
    """
    TILE: tl.constexpr = LANES * WIDTH
    EVICT: tl.constexpr = "evict_first" if NEAR else ""
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    first = tl.multiple_of(start - lead, WIDTH)
    if BACKWARDS:
        if lead > 0:
            first += TILE
        tail = first + (tl.maximum(stop - first, 0) // (2 * TILE)) * (2 * TILE)
        last = tail - 2 * TILE
        while tail < stop:
            write_masked(
                in_ptr, out_ptr, tail + tile, start, stop, class_weight, k, softcap, offset, peak, a, b, c,
                peak_grad, spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
            )  # fmt: skip
            tail += TILE
        while last >= first:
            write_pair(
                in_ptr, out_ptr, last + tile, TILE, class_weight, k, softcap, offset, peak, a, b, c,
                peak_grad, spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, EVICT, MODE,
            )  # fmt: skip
            last -= 2 * TILE
    if lead > 0:
        write_masked(
            in_ptr, out_ptr, tl.multiple_of(start - lead, WIDTH) + tile, start, stop, class_weight, k,
            softcap, offset, peak, a, b, c, peak_grad, spread,
            SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
        )  # fmt: skip
        if not BACKWARDS:
            first += TILE
    if not BACKWARDS:
        while first + 2 * TILE <= stop:
            write_pair(
                in_ptr, out_ptr, first + tile, TILE, class_weight, k, softcap, offset, peak, a, b, c,
                peak_grad, spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, EVICT, MODE,
            )  # fmt: skip
            first += 2 * TILE
        while first < stop:
            write_masked(
                in_ptr, out_ptr, first + tile, start, stop, class_weight, k, softcap, offset, peak, a, b, c,
                peak_grad, spread, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS, MODE,
            )  # fmt: skip
            first += TILE
    if SOFTCAP:
        ratio = z_target / softcap
        target *= 1.0 - ratio * ratio
    # Other threads wrote this element in the loop; they must be done before it is written again.
    tl.debug_barrier()
    if (label >= start) & (label < stop):
        tl.store(out_ptr + label, narrowed(target, out_ptr, MODE))


@triton.jit
def write_zeros(out_ptr, start, stop, lead, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros into the columns [start, stop): a row that is not kept, whose logits are not even read."""
    TILE: tl.constexpr = LANES * WIDTH
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    first = tl.multiple_of(start - lead, WIDTH)
    while first < stop:
        columns = first + tile
        zeros = tl.zeros((LANES, WIDTH), out_ptr.dtype.element_ty)
        tl.store(out_ptr + columns, zeros, mask=(columns >= start) & (columns < stop))
        first += TILE
