"""The lanes' sums: tiles of logits [LANES, WIDTH], WIDTH columns a lane, into a state for each lane."""

import triton
import triton.language as tl

from .arithmetic import LOWEST, comparable, exp2, finite, fma, softcapped, widened
from .records import State


@triton.jit
def offset_of(peak, k):
    return tl.maximum(peak * k, LOWEST)


@triton.jit
def moved(state, offset, OPTIONS):
    """The same state, its sums as they are for another offset, not below its own."""
    d = state.offset - offset
    r = exp2(d, OPTIONS.mode)
    t = state.t
    if OPTIONS.entropy:
        t = r * (t + d * state.s)
    return State(state.peak, offset, state.s * r, state.u * (r * r), t, state.zsum)


@triton.jit
def tile_sums(z, offset, k, OPTIONS):
    """(2^x, x) in fp32 for a tile of logits [LANES, WIDTH], `offset` [LANES, 1]."""
    x = fma(widened(z, OPTIONS.entropy, OPTIONS.mode), k, -offset, OPTIONS.mode)
    return exp2(x, OPTIONS.mode), x


@triton.jit
def nothing(LANES: tl.constexpr):
    """The state of no column, for each lane."""
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    offset = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    u = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    zsum = tl.zeros((LANES,), tl.float32)
    return State(peak, offset, s, u, t, zsum)


@triton.jit
def load_masked(row, columns, numbers, OPTIONS):
    """A tile of transformed logits in fp32; columns outside of the row are -inf and add nothing."""
    inside = (columns >= row.start) & (columns < row.stop)
    z = tl.load(row.ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    z = softcapped(z, numbers.softcap, OPTIONS.softcap)
    if OPTIONS.softcap:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def absorb(state, row, columns, numbers, OPTIONS):
    """One masked tile into the lanes' sums; the loop for heads, tails and transformed logits."""
    inside = (columns >= row.start) & (columns < row.stop)
    z = load_masked(row, columns, numbers, OPTIONS)
    zsum = state.zsum
    if OPTIONS.smoothed:
        if OPTIONS.weighted:
            w = tl.load(row.class_weight + columns, mask=inside, other=0.0).to(tl.float32)
            # A class of weight 0 adds nothing, masked or not.
            zsum += tl.sum(tl.where(inside & (w != 0.0), z * w, 0.0), 1)
        else:
            zsum += tl.sum(tl.where(inside, z, 0.0), 1)
    if OPTIONS.entropy:
        z = finite(z)
    peak = tl.maximum(state.peak, tl.max(z, 1))
    state = moved(state, offset_of(peak, numbers.k), OPTIONS)
    e, x = tile_sums(z, state.offset[:, None], numbers.k, OPTIONS)
    t = state.t
    if OPTIONS.entropy:
        t += tl.sum(e * x, 1)
    return State(peak, state.offset, state.s + tl.sum(e, 1), state.u + tl.sum(e * e, 1), t, zsum)


@triton.jit
def absorb_four(state, z0, z1, z2, z3, numbers, OPTIONS):
    """Four tiles of logits, all loaded before the first is used, into the lanes' sums."""
    MODE: tl.constexpr = OPTIONS.mode
    z0, z1 = comparable(z0, MODE), comparable(z1, MODE)
    z2, z3 = comparable(z2, MODE), comparable(z3, MODE)
    highest = tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
    peak = tl.maximum(state.peak, tl.max(highest, 1).to(tl.float32))
    state = moved(state, offset_of(peak, numbers.k), OPTIONS)
    offset = state.offset[:, None]
    e0, x0 = tile_sums(z0, offset, numbers.k, OPTIONS)
    e1, x1 = tile_sums(z1, offset, numbers.k, OPTIONS)
    e2, x2 = tile_sums(z2, offset, numbers.k, OPTIONS)
    e3, x3 = tile_sums(z3, offset, numbers.k, OPTIONS)
    s = state.s + tl.sum((e0 + e1) + (e2 + e3), 1)
    squares = fma(e3, e3, fma(e2, e2, fma(e1, e1, e0 * e0, MODE), MODE), MODE)
    u = state.u + tl.sum(squares, 1)
    t = state.t
    if OPTIONS.entropy:
        t += tl.sum(fma(e3, x3, fma(e2, x2, fma(e1, x1, e0 * x0, MODE), MODE), MODE), 1)
    return State(peak, state.offset, s, u, t, state.zsum)


@triton.jit
def load_four(ptr, tile, TILE: tl.constexpr, EVICT: tl.constexpr):
    """Four tiles in the logits' own dtype, the first of them at `ptr`."""
    z0 = tl.load(ptr + tile, eviction_policy=EVICT)
    z1 = tl.load(ptr + TILE + tile, eviction_policy=EVICT)
    z2 = tl.load(ptr + 2 * TILE + tile, eviction_policy=EVICT)
    z3 = tl.load(ptr + 3 * TILE + tile, eviction_policy=EVICT)
    return z0, z1, z2, z3


@triton.jit
def load_tail(row, columns, last, EVICT: tl.constexpr):
    """A tile in the logits' own dtype; columns from `last` on are -inf."""
    return tl.load(row.ptr + columns, mask=columns < last, other=float("-inf"), eviction_policy=EVICT)


@triton.jit
def load_four_of_tail(row, columns, last, TILE: tl.constexpr, EVICT: tl.constexpr):
    z0 = load_tail(row, columns, last, EVICT)
    z1 = load_tail(row, TILE + columns, last, EVICT)
    z2 = load_tail(row, 2 * TILE + columns, last, EVICT)
    z3 = load_tail(row, 3 * TILE + columns, last, EVICT)
    return z0, z1, z2, z3


@triton.jit
def columns_of_lane(lane, first, one, PLAN):
    """Columns [LANES, WIDTH] that the loop gives to lane `one` in the LANES tiles from `first` on."""
    TILE: tl.constexpr = PLAN.lanes * PLAN.width
    return first + (lane * TILE)[:, None] + one * PLAN.width + tl.arange(0, PLAN.width)[None, :]
