"""The kernels of the backward: one program a row's slice, or a few that walk over the rows.

gradient_kernel     logits and saved fields -> gradient
scale_kernel        a gradient times a scalar
"""

import triton
import triton.language as tl

from .arithmetic import cap_slope, narrowed
from .finish import load_field
from .gradient import scaled, sloped, write_gradient, write_zeros
from .records import FIELD, UNSPECIALISED, Gradient, Matrix, Row, Saved
from .rows import columns_of, place_beside, place_of, row_offset, target_of


@triton.jit
def load_gradient(saved, row, spread):
    offset = load_field(saved, row, FIELD.value.offset)
    peak = load_field(saved, row, FIELD.value.peak)
    a = load_field(saved, row, FIELD.value.a)
    b = load_field(saved, row, FIELD.value.b)
    c = load_field(saved, row, FIELD.value.c)
    peak_grad = load_field(saved, row, FIELD.value.peak_grad)
    target = load_field(saved, row, FIELD.value.target)
    return Gradient(offset, peak, a, b, c, peak_grad, target, spread)


@triton.jit
def gradient_of_slice(
    row, factor, logits, labels, class_weight, saved, dlogits, span, numbers, OPTIONS, PLAN
):
    """Gradient, times `factor`, of those `span` columns of a row that are this program's."""
    at, lead = place_of(row, logits.strides, PLAN)
    to = place_beside(row, lead, dlogits.strides, PLAN)
    start = tl.program_id(1) * span + lead
    stop = tl.minimum(start + span, lead + logits.vocabulary)
    if load_field(saved, row, FIELD.value.kept) != 0.0:
        label = tl.load(labels + row)
        g = scaled(load_gradient(saved, row, numbers.spread), factor)
        if OPTIONS.softcap:
            # Only the program that writes the target's element needs its logit. In place, others would read
            # what that program has already overwritten; its own threads wait for each other.
            own = (label + lead >= start) & (label + lead < stop)
            raw_target = target_of(logits.ptr + at + lead, tl.where(own, label, -1), logits.vocabulary)
            g = sloped(g, cap_slope(raw_target, numbers.softcap))
            tl.debug_barrier()
        columns = columns_of(logits.ptr + at, class_weight, lead, start, stop, OPTIONS)
        write_gradient(columns, dlogits.ptr + to, label + lead, g, numbers, OPTIONS, PLAN)
    else:
        write_zeros(Row(dlogits.ptr + to, class_weight, start, stop), PLAN)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gradient_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    rows,  # [len(Field), N] fp32
    dloss,  # [N], stride dloss_stride
    upstream,  # [1] or unused
    dlogits,  # [N, V], may be the logits
    n_rows,
    strides,
    out_strides,
    dloss_stride,
    vocabulary,
    span,  # columns of a program
    numbers,
    UPSTREAM: tl.constexpr,
    OPTIONS,
    PLAN,
):
    row = tl.program_id(0)
    saved = Saved(rows, n_rows.to(tl.int64))
    logits = Matrix(logits, strides, vocabulary)
    dlogits = Matrix(dlogits, out_strides, vocabulary)
    if UPSTREAM:
        # The gradient stands already for an upstream of 1: decided here, never by waiting on the host, and by
        # a few programs that walk over the rows, since mostly they have nothing to do.
        scalar = tl.load(upstream).to(tl.float32)
        stop = tl.where(scalar != 1.0, n_rows, 0)
        while row < stop:
            factor = tl.load(dloss + row.to(tl.int64) * dloss_stride).to(tl.float32) * scalar
            gradient_of_slice(
                row, factor, logits, labels, class_weight, saved, dlogits, span, numbers, OPTIONS, PLAN
            )
            row += tl.num_programs(0)
    else:
        factor = tl.load(dloss + row.to(tl.int64) * dloss_stride).to(tl.float32)
        gradient_of_slice(
            row, factor, logits, labels, class_weight, saved, dlogits, span, numbers, OPTIONS, PLAN
        )


@triton.jit(do_not_specialize=UNSPECIALISED)
def scale_kernel(
    dlogits,  # [N, V]
    upstream,  # [1]
    kept,  # [N] or unused
    n_rows,
    strides,
    vocabulary,
    KEPT: tl.constexpr,
    MODE: tl.constexpr,
    PLAN,
):
    """Nothing at all where the scalar, which is on the device, is 1."""
    TILE: tl.constexpr = PLAN.lanes * PLAN.width
    scalar = tl.load(upstream).to(tl.float32)
    row = tl.program_id(0)
    stop = tl.where(scalar != 1.0, n_rows, 0)
    while row < stop:
        base = dlogits + row_offset(row, strides)
        first = 0
        if KEPT:
            # Zeros stay zeros where the upstream is inf or NaN.
            first = tl.where(tl.load(kept + row) != 0, 0, vocabulary)
        while first < vocabulary:
            columns = first + tl.arange(0, TILE)
            inside = columns < vocabulary
            d = tl.load(base + columns, mask=inside).to(tl.float32) * scalar
            tl.store(base + columns, narrowed(d, dlogits, MODE), mask=inside)
            first += TILE
        row += tl.num_programs(0)
