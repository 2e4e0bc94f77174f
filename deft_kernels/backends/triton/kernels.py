"""The kernels of the forward: one program a row, or a row's slice.

Arguments: tensors, scalars, records, constexprs.

statistics_kernel   a row of logits -> loss and coefficients
slice_kernel        a slice of a row -> its state
combine_kernel      stored states of a row's slices -> one state, which goes to other ranks
finish_kernel       stored states -> loss and coefficients, for split rows, for a vocabulary split
                    between ranks, and for objectives that wait for the batch
fused_kernel        all of it for a row in one launch
"""

import triton
import triton.language as tl

from .arithmetic import cap_slope, softcapped
from .finish import finish_row, store_ignored, weights_of
from .gradient import scaled, sloped, write_gradient, write_zeros
from .records import UNSPECIALISED, Reduced, Row, Saved
from .rows import columns_of, place_beside, place_of, reduced_row, target_of
from .stored_states import load_parts, store_state


@triton.jit(do_not_specialize=UNSPECIALISED)
def statistics_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    rows,  # [len(Field), N] fp32
    loss,  # [N] fp32
    n_rows,
    strides,
    vocabulary,
    ignore_index,
    numbers,
    OPTIONS,
    PLAN,
):
    row = tl.program_id(0)
    saved = Saved(rows, n_rows.to(tl.int64))
    label = tl.load(labels + row)
    if label != ignore_index:
        at, lead = place_of(row, strides, PLAN)
        ptr = logits + at
        z_target = target_of(ptr + lead, label, vocabulary)
        z_target = softcapped(z_target, numbers.softcap, OPTIONS.softcap)
        columns = columns_of(ptr, class_weight, lead, lead, lead + vocabulary, OPTIONS)
        reduced = reduced_row(columns, lead, z_target, numbers, OPTIONS, PLAN)
        weights = weights_of(class_weight, weight_total, label, vocabulary, OPTIONS)
        finish_row(saved, loss, row, reduced, weights, vocabulary, numbers.floor, numbers, OPTIONS)
    else:
        store_ignored(saved, loss, row)


@triton.jit(do_not_specialize=UNSPECIALISED)
def slice_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    states,  # [N, splits, SIZE] fp32
    strides,
    vocabulary,
    span,  # columns of a slice
    ignore_index,
    numbers,
    SIZE: tl.constexpr,
    OPTIONS,
    PLAN,
):
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label != ignore_index:
        at, lead = place_of(row, strides, PLAN)
        start = lead + tl.program_id(1) * span
        stop = tl.minimum(start + span, lead + vocabulary)
        ptr = logits + at
        z_target = target_of(ptr + lead, label, vocabulary)
        z_target = softcapped(z_target, numbers.softcap, OPTIONS.softcap)
        columns = columns_of(ptr, class_weight, lead, start, stop, OPTIONS)
        reduced = reduced_row(columns, lead, z_target, numbers, OPTIONS, PLAN)
        to = states + (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SIZE
        # No column of this part has the label: -inf, which the maximum over the parts does not choose.
        here = (label >= 0) & (label < vocabulary)
        z_target = tl.where(here, z_target, float("-inf"))
        store_state(to, Reduced(reduced.state, z_target, reduced.ties, reduced.predicted), OPTIONS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_kernel(
    labels,  # [N] int64
    states,  # [N, splits, SIZE] fp32
    joined,  # [N, SIZE] fp32
    splits,
    ignore_index,
    k,
    SIZE: tl.constexpr,
    SPLITS: tl.constexpr,  # the next power of two
    OPTIONS,
):
    row = tl.program_id(0)
    if tl.load(labels + row) != ignore_index:
        at = states + row.to(tl.int64) * splits * SIZE
        reduced = load_parts(at, splits, SIZE, k, SPLITS, OPTIONS)
        store_state(joined + row.to(tl.int64) * SIZE, reduced, OPTIONS)


# No column is addressed here, so the vocabulary is a number like others.
@triton.jit(do_not_specialize=(*UNSPECIALISED, "vocabulary"))
def finish_kernel(
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    mean_prob,  # [1], the batch's mean p, when BATCH
    rows,  # [len(Field), N] fp32
    loss,  # [N] fp32
    states,  # fp32; state j of row i lies at j stride_outer + i stride_inner
    n_rows,
    splits,
    stride_outer,
    stride_inner,
    vocabulary,
    ignore_index,
    numbers,
    BATCH: tl.constexpr,
    SPLITS: tl.constexpr,  # the next power of two
    OPTIONS,
):
    row = tl.program_id(0)
    saved = Saved(rows, n_rows.to(tl.int64))
    label = tl.load(labels + row)
    if label != ignore_index:
        at = states + row.to(tl.int64) * stride_inner
        parts = load_parts(at, splits, stride_outer, numbers.k, SPLITS, OPTIONS)
        z_target = tl.where((label >= 0) & (label < vocabulary), parts.z_target, float("nan"))
        reduced = Reduced(parts.state, z_target, parts.ties, parts.predicted)
        weights = weights_of(class_weight, weight_total, label, vocabulary, OPTIONS)
        floor = numbers.floor
        if BATCH:
            # The Cayley floor, from what an earlier launch left in memory.
            floor = 0.5 * tl.load(mean_prob)
        finish_row(saved, loss, row, reduced, weights, vocabulary, floor, numbers, OPTIONS)
    else:
        store_ignored(saved, loss, row)


@triton.jit(do_not_specialize=UNSPECIALISED)
def fused_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    rows,  # [len(Field), N] fp32
    loss,  # [N] fp32
    row_scale,  # [N] fp32, stride scale_stride
    dlogits,  # [N, V], may be the logits
    n_rows,
    strides,
    out_strides,
    scale_stride,
    vocabulary,
    ignore_index,
    numbers,
    OPTIONS,
    PLAN,
):
    row = tl.program_id(0)
    saved = Saved(rows, n_rows.to(tl.int64))
    label = tl.load(labels + row)
    at, lead = place_of(row, strides, PLAN)
    to = place_beside(row, lead, out_strides, PLAN)
    start = lead
    stop = lead + vocabulary
    kept = 0.0
    if label != ignore_index:
        ptr = logits + at
        raw_target = target_of(ptr + lead, label, vocabulary)
        z_target = softcapped(raw_target, numbers.softcap, OPTIONS.softcap)
        # Before the loop, which hides its latency.
        factor = tl.load(row_scale + row.to(tl.int64) * scale_stride).to(tl.float32)
        columns = columns_of(ptr, class_weight, lead, start, stop, OPTIONS)
        reduced = reduced_row(columns, lead, z_target, numbers, OPTIONS, PLAN)
        weights = weights_of(class_weight, weight_total, label, vocabulary, OPTIONS)
        kept, g = finish_row(saved, loss, row, reduced, weights, vocabulary, numbers.floor, numbers, OPTIONS)
        # In place: nobody may overwrite a logit that another thread's reduction has still to read.
        tl.debug_barrier()
        if OPTIONS.softcap:
            g = sloped(g, cap_slope(raw_target, numbers.softcap))
        if kept != 0.0:
            write_gradient(columns, dlogits + to, label + lead, scaled(g, factor), numbers, OPTIONS, PLAN)
    else:
        store_ignored(saved, loss, row)
    if kept == 0.0:
        write_zeros(Row(dlogits + to, class_weight, start, stop), PLAN)
