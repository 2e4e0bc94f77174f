"""The state of a row's softmax and its reduction over the vocabulary.

State, in the log2 domain with x_j = k z_j - offset, k = log2(e) / temperature:

    s = sum 2^x_j    u = sum 2^(2 x_j)    t = sum 2^x_j x_j    z = sum w_j z_j    peak = max z_j

`offset` is any number near the largest k z_j; it is the same rounded number everywhere, so its rounding
cancels. States with different offsets combine (`rescale`), which serves lanes, programs and ranks alike;
the identity has offset LOWEST and zero sums.

Every lane (one thread) keeps a state of its own over its columns, 16 bytes of logits a load, and lanes meet
once a row: no barrier and no shuffle in the loop.
"""

import triton
import triton.language as tl

from .device import LOWEST, VANISHED, exp2, fma, softcapped


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
    """2^x, its square and 2^x x for a tile [LANES, WIDTH], `offset` [LANES, 1]; fp32."""
    x = fma(z, k, -offset, MODE)
    if ENTROPY:
        x = tl.maximum(x, VANISHED)
    e = exp2(x, MODE)
    return e, x


@triton.jit
def load_tile(
    row_ptr, columns, start, stop, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr
):
    """A tile of logits; masked columns read as -inf, which adds nothing to any sum."""
    if MASKED:
        inside = (columns >= start) & (columns < stop)
        z = tl.load(row_ptr + columns, mask=inside, other=float("-inf"))
    else:
        z = tl.load(row_ptr + columns)
    return z


@triton.jit
def absorb(
    z, columns, start, stop, peak, offset, s, u, t, zsum, class_weight, k, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One tile into the lanes' states; the loop for heads, tails and transformed logits."""
    z = softcapped(z.to(tl.float32), softcap, SOFTCAP)
    inside = (columns >= start) & (columns < stop)
    if SOFTCAP and MASKED:
        z = tl.where(inside, z, float("-inf"))
    peak = tl.maximum(peak, tl.max(z, 1))
    moved = offset_of(peak, k)
    s, u, t = rescale(offset, s, u, t, moved, ENTROPY, MODE)
    e, x = tile_sums(z, moved[:, None], k, ENTROPY, MODE)
    s += tl.sum(e, 1)
    u += tl.sum(e * e, 1)
    if ENTROPY:
        t += tl.sum(e * x, 1)
    if SMOOTHED:
        if WEIGHTED:
            w = tl.load(class_weight + columns, mask=inside, other=0.0).to(tl.float32)
            # A class of weight 0 adds nothing, masked or not.
            zsum += tl.sum(tl.where(inside & (w != 0.0), z * w, 0.0), 1)
        else:
            zsum += tl.sum(tl.where(inside, z, 0.0), 1)
    return peak, moved, s, u, t, zsum


@triton.jit
def reduce_row(
    row_ptr, start, stop, lead, class_weight, k, softcap,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHTED: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """State (peak, offset, s, u, t, zsum) of the columns [start, stop) of a row, as scalars.

    The first tile begins `lead` columns early, at a 16-byte boundary, and is masked; so is the tail. Between
    them four tiles a turn are in flight, and the lanes' offsets move once a turn.
    """
    TILE: tl.constexpr = LANES * WIDTH
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    offset = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    u = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    zsum = tl.zeros((LANES,), tl.float32)

    first = tl.multiple_of(start - lead, WIDTH)
    z = load_tile(row_ptr, first + tile, start, stop, softcap, True, SOFTCAP)
    peak, offset, s, u, t, zsum = absorb(
        z, first + tile, start, stop, peak, offset, s, u, t, zsum, class_weight, k, softcap,
        True, SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, MODE,
    )  # fmt: skip
    first += TILE

    if not (SOFTCAP or SMOOTHED):
        turns = tl.maximum(stop - first, 0) // (4 * TILE)
        for _ in range(turns):
            z0 = tl.load(row_ptr + first + tile)
            z1 = tl.load(row_ptr + first + TILE + tile)
            z2 = tl.load(row_ptr + first + 2 * TILE + tile)
            z3 = tl.load(row_ptr + first + 3 * TILE + tile)
            highest = tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
            peak = tl.maximum(peak, tl.max(highest, 1).to(tl.float32))
            moved = offset_of(peak, k)
            s, u, t = rescale(offset, s, u, t, moved, ENTROPY, MODE)
            offset = moved
            e0, x0 = tile_sums(z0.to(tl.float32), offset[:, None], k, ENTROPY, MODE)
            e1, x1 = tile_sums(z1.to(tl.float32), offset[:, None], k, ENTROPY, MODE)
            e2, x2 = tile_sums(z2.to(tl.float32), offset[:, None], k, ENTROPY, MODE)
            e3, x3 = tile_sums(z3.to(tl.float32), offset[:, None], k, ENTROPY, MODE)
            s += tl.sum((e0 + e1) + (e2 + e3), 1)
            squares = fma(e3, e3, fma(e2, e2, fma(e1, e1, e0 * e0, MODE), MODE), MODE)
            u += tl.sum(squares, 1)
            if ENTROPY:
                t += tl.sum(fma(e3, x3, fma(e2, x2, fma(e1, x1, e0 * x0, MODE), MODE), MODE), 1)
            first += 4 * TILE

    while first < stop:
        z = load_tile(row_ptr, first + tile, start, stop, softcap, True, SOFTCAP)
        peak, offset, s, u, t, zsum = absorb(
            z, first + tile, start, stop, peak, offset, s, u, t, zsum, class_weight, k, softcap,
            True, SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, MODE,
        )  # fmt: skip
        first += TILE

    return combine(peak, offset, s, u, t, zsum, k, ENTROPY, MODE)


@triton.jit
def combine(peak, offset, s, u, t, zsum, k, ENTROPY: tl.constexpr, MODE: tl.constexpr):
    """States along axis 0 into one."""
    joint = tl.max(offset, 0)
    s, u, t = rescale(offset, s, u, t, joint, ENTROPY, MODE)
    return tl.max(peak, 0), joint, tl.sum(s, 0), tl.sum(u, 0), tl.sum(t, 0), tl.sum(zsum, 0)


@triton.jit
def count_ties(
    row_ptr, start, stop, peak, softcap, LANES: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr
):
    """How many columns hold the largest logit; a second pass, for the gradient through max p alone."""
    TILE: tl.constexpr = LANES * WIDTH
    tile = (tl.arange(0, LANES) * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    count = tl.zeros((LANES,), tl.float32)
    for first in range(start, stop, TILE):
        z = load_tile(row_ptr, first + tile, start, stop, softcap, True, SOFTCAP)
        z = softcapped(z.to(tl.float32), softcap, SOFTCAP)
        inside = (first + tile) < stop
        count += tl.sum(tl.where(inside & (z == peak), 1.0, 0.0), 1)
    return tl.sum(count, 0)
