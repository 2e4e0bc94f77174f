"""The kernels: one program a row, or a row's slice. Arguments: tensors, scalars, constexprs.

statistics_kernel   a row (or slice) of logits -> its state; a whole row goes on to loss and coefficients
combine_kernel      stored states of a row's slices -> one state, which goes to other ranks
finish_kernel       stored states -> loss and coefficients, for split rows, for a vocabulary split
                    between ranks, and for objectives that wait for the batch
gradient_kernel     logits and coefficients -> gradient
fused_kernel        all of it for a row in one launch
"""

import triton
import triton.language as tl

from .arithmetic import cap_slope, narrowed, softcapped
from .finish import BY_COLLISION, BY_ENTROPY, BY_MAX_PROB, finish_row, floor_of, store_ignored, weights_of
from .gradient import write_gradient, write_zeros
from .state import count_ties, numbered, reduce_row
from .stored_states import load_parts, store_state


@triton.jit
def row_offset(row, inner, stride_outer, stride_inner):
    """Element offset of a row, int64: N V passes 2^31 in an ordinary batch."""
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def aligned(offset, WIDTH: tl.constexpr, PEEL: tl.constexpr):
    """(offset rounded down to a full load, columns rounded away); the hint keeps loads 16 bytes wide."""
    if PEEL:
        lead = (offset % WIDTH).to(tl.int32)
        return tl.multiple_of(offset - lead, WIDTH), lead
    else:
        return offset, 0


@triton.jit
def target_of(row_ptr, label, vocabulary):
    """The target's logit as it stands; NaN and no read for a label out of range."""
    known = (label >= 0) & (label < vocabulary)
    return tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def statistics_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    rows,  # [19, N] fp32
    loss,  # [N] fp32
    states,  # [N, splits, size] fp32 when STORED
    n_rows, inner, stride_outer, stride_inner, vocabulary, span, ignore_index, k, softcap, temperature,
    alpha, eps, power, scale, floor, low, high, z_loss, smoothing,
    FOCUS: tl.constexpr, FAMILY: tl.constexpr, THROUGH: tl.constexpr, IS_WEIGHT: tl.constexpr,
    BANDED: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr,
    STORED: tl.constexpr, PEEL: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label != ignore_index:
        at, lead = aligned(row_offset(row, inner, stride_outer, stride_inner), WIDTH, PEEL)
        # Columns count from the aligned position: the row is [lead, lead + V).
        start = lead
        stop = lead + vocabulary
        if STORED:
            start = lead + tl.program_id(1) * span
            stop = tl.minimum(start + span, stop)
        base = logits + at
        z_target = softcapped(target_of(base + lead, label, vocabulary), softcap, SOFTCAP)
        weights = class_weight
        if WEIGHTED:
            weights = class_weight - lead
        peak, offset, s, u, t, zsum, taken = reduce_row(
            base, start, stop, weights, k, softcap,
            LANES, WIDTH, SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, PREDICTED, PEEL, TAIL, False, MODE,
        )  # fmt: skip
        ties = 0.0
        if TIES:
            ties = count_ties(base, start, stop, peak, softcap, LANES, WIDTH, SOFTCAP)
        predicted = 0.0
        if PREDICTED:
            predicted = numbered(taken, lead, stop)
        if STORED:
            SIZE: tl.constexpr = 5 + SMOOTHED + TIES + PREDICTED
            to = states + (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SIZE
            # A target elsewhere: the identity of the maximum that finds it.
            here = (label >= 0) & (label < vocabulary)
            z_target = tl.where(here, z_target, float("-inf"))
            store_state(to, peak, s, u, t, z_target, zsum, ties, predicted, SMOOTHED, TIES, PREDICTED)
        else:
            w_target, total = weights_of(class_weight, weight_total, label, vocabulary, WEIGHTED)
            finish_row(
                rows, loss, row, n_rows, z_target, w_target, total, peak, offset, s, u, t, zsum, ties,
                predicted, vocabulary, k, temperature, alpha, eps, power, scale,
                floor, low, high, z_loss, smoothing,
                FOCUS, FAMILY, THROUGH, IS_WEIGHT, BANDED, Z_LOSS, SMOOTHED, WEIGHTED, ENTROPY, MODE,
            )  # fmt: skip
    elif not STORED:
        store_ignored(rows, loss, row, n_rows)


@triton.jit
def combine_kernel(
    labels,  # [N] int64
    states,  # [N, splits, size] fp32
    joined,  # [N, size] fp32
    splits, ignore_index, k,
    SMOOTHED: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr, ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(labels + row) != ignore_index:
        SIZE: tl.constexpr = 5 + SMOOTHED + TIES + PREDICTED
        at = states + row.to(tl.int64) * splits * SIZE
        peak, _, s, u, t, z_target, zsum, ties, predicted = load_parts(
            at, splits, SIZE, k, SPLITS, SMOOTHED, TIES, PREDICTED, ENTROPY, MODE
        )
        to = joined + row.to(tl.int64) * SIZE
        store_state(to, peak, s, u, t, z_target, zsum, ties, predicted, SMOOTHED, TIES, PREDICTED)


@triton.jit
def finish_kernel(
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    floor,  # [1] when BATCH: the batch's mean p
    rows,  # [19, N] fp32
    loss,  # [N] fp32
    states,  # fp32; state j of row i lies at j stride_outer + i stride_inner
    n_rows, splits, stride_outer, stride_inner, vocabulary, ignore_index, k, temperature,
    alpha, eps, power, scale, low, high, z_loss, smoothing,
    FOCUS: tl.constexpr, FAMILY: tl.constexpr, THROUGH: tl.constexpr, IS_WEIGHT: tl.constexpr,
    BANDED: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr, BATCH: tl.constexpr,
    SPLITS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    if label != ignore_index:
        peak, offset, s, u, t, z_target, zsum, ties, predicted = load_parts(
            states + row.to(tl.int64) * stride_inner, splits, stride_outer, k,
            SPLITS, SMOOTHED, TIES, PREDICTED, ENTROPY, MODE,
        )  # fmt: skip
        z_target = tl.where((label >= 0) & (label < vocabulary), z_target, float("nan"))
        w_target, total = weights_of(class_weight, weight_total, label, vocabulary, WEIGHTED)
        finish_row(
            rows, loss, row, n_rows, z_target, w_target, total, peak, offset, s, u, t, zsum, ties,
            predicted, vocabulary, k, temperature, alpha, eps, power, scale,
            floor_of(floor, BATCH), low, high,
            z_loss, smoothing,
            FOCUS, FAMILY, THROUGH, IS_WEIGHT, BANDED, Z_LOSS, SMOOTHED, WEIGHTED, ENTROPY, MODE,
        )  # fmt: skip
    else:
        store_ignored(rows, loss, row, n_rows)


@triton.jit
def gradient_of_slice(
    row, start, factor, logits, labels, class_weight, rows, dlogits,
    n_rows, inner, stride_outer, stride_inner, out_outer, out_inner, vocabulary, span, k, softcap, spread,
    SQUARES: tl.constexpr, LOGS: tl.constexpr, PEAKS: tl.constexpr, SMOOTHED: tl.constexpr,
    WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr, NEAR: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradient of the columns [start, start + span) of a row, times `factor`."""
    at, lead = aligned(row_offset(row, inner, stride_outer, stride_inner), WIDTH, PEEL)
    to = row_offset(row, inner, out_outer, out_inner) - lead
    if PEEL:
        to = tl.multiple_of(to, WIDTH)
    start += lead
    stop = tl.minimum(start + span, lead + vocabulary)
    if tl.load(rows + 8 * n_rows + row) != 0.0:
        label = tl.load(labels + row)
        offset = tl.load(rows + 9 * n_rows + row)
        peak = tl.load(rows + 11 * n_rows + row)
        a = tl.load(rows + 14 * n_rows + row) * factor
        b = tl.load(rows + 15 * n_rows + row) * factor
        c = tl.load(rows + 16 * n_rows + row) * factor
        peak_grad = tl.load(rows + 17 * n_rows + row) * factor
        target = tl.load(rows + 18 * n_rows + row) * factor
        if SOFTCAP:
            # Only the program that writes the target's element needs its logit. In place, others would read
            # what that program has already overwritten; its own threads wait for each other.
            own = (label + lead >= start) & (label + lead < stop)
            raw_target = target_of(logits + at + lead, tl.where(own, label, -1), vocabulary)
            target *= cap_slope(raw_target, softcap)
            tl.debug_barrier()
        weights = class_weight
        if WEIGHTED:
            weights = class_weight - lead
        write_gradient(
            logits + at, dlogits + to, start, stop, label + lead, weights, k, softcap,
            offset, peak, a, b, c, peak_grad, target, spread * factor,
            LANES, WIDTH, SOFTCAP, SMOOTHED, WEIGHTED, SQUARES, LOGS, PEAKS,
            PEEL, NEAR, MODE,
        )  # fmt: skip
    else:
        write_zeros(dlogits + to, start, stop, LANES, WIDTH, PEEL)


@triton.jit
def gradient_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    rows,  # [19, N] fp32
    dloss,  # [N], stride dloss_stride
    upstream,  # [1] or unused
    dlogits,  # [N, V], may be the logits
    n_rows, inner, stride_outer, stride_inner, out_outer, out_inner, dloss_stride, vocabulary, span, k,
    softcap, spread,
    UPSTREAM: tl.constexpr, SQUARES: tl.constexpr, LOGS: tl.constexpr, PEAKS: tl.constexpr,
    SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr,
    NEAR: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if UPSTREAM:
        # The gradient stands already for an upstream of 1: decided here, never by waiting on the host, and by
        # a few programs that walk over the rows, since mostly they have nothing to do.
        scalar = tl.load(upstream).to(tl.float32)
        stop = tl.where(scalar != 1.0, n_rows, 0)
        while row < stop:
            factor = tl.load(dloss + row.to(tl.int64) * dloss_stride).to(tl.float32) * scalar
            start = tl.program_id(1) * span
            gradient_of_slice(
                row, start, factor, logits, labels, class_weight, rows, dlogits,
                n_rows, inner, stride_outer, stride_inner, out_outer, out_inner, vocabulary, span, k, softcap,
                spread, SQUARES, LOGS, PEAKS, SMOOTHED, WEIGHTED, SOFTCAP, PEEL, NEAR, LANES, WIDTH,
                MODE,
            )  # fmt: skip
            row += tl.num_programs(0)
    else:
        factor = tl.load(dloss + row.to(tl.int64) * dloss_stride).to(tl.float32)
        gradient_of_slice(
            row, tl.program_id(1) * span, factor, logits, labels, class_weight, rows, dlogits,
            n_rows, inner, stride_outer, stride_inner, out_outer, out_inner, vocabulary, span, k, softcap,
            spread, SQUARES, LOGS, PEAKS, SMOOTHED, WEIGHTED, SOFTCAP, PEEL, NEAR, LANES, WIDTH, MODE,
        )  # fmt: skip


@triton.jit
def scale_kernel(
    dlogits,  # [N, V]
    upstream,  # [1]
    kept,  # [N] or unused
    n_rows, inner, out_outer, out_inner, vocabulary,
    KEPT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """dlogits times a scalar on the device; nothing at all when it is 1."""
    scalar = tl.load(upstream).to(tl.float32)
    row = tl.program_id(0)
    stop = tl.where(scalar != 1.0, n_rows, 0)
    while row < stop:
        base = dlogits + row_offset(row, inner, out_outer, out_inner)
        first = 0
        if KEPT:
            # Zeros stay zeros where the upstream is inf or NaN.
            first = tl.where(tl.load(kept + row) != 0, 0, vocabulary)
        while first < vocabulary:
            columns = first + tl.arange(0, LANES * WIDTH)
            inside = columns < vocabulary
            d = tl.load(base + columns, mask=inside).to(tl.float32) * scalar
            tl.store(base + columns, narrowed(d, dlogits, MODE), mask=inside)
            first += LANES * WIDTH
        row += tl.num_programs(0)


@triton.jit
def fused_kernel(
    logits,  # [N, V]
    labels,  # [N] int64
    class_weight,  # [V] or unused
    weight_total,  # [1] or unused
    rows,  # [19, N] fp32
    loss,  # [N] fp32
    row_scale,  # [N] fp32, stride scale_stride
    dlogits,  # [N, V], may be the logits
    n_rows, inner, stride_outer, stride_inner, out_outer, out_inner, scale_stride, vocabulary, ignore_index,
    k, softcap, temperature, alpha, eps, power, scale, floor, low, high, z_loss, smoothing, spread,
    FOCUS: tl.constexpr, FAMILY: tl.constexpr, THROUGH: tl.constexpr, IS_WEIGHT: tl.constexpr,
    BANDED: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TIES: tl.constexpr, PREDICTED: tl.constexpr,
    PEEL: tl.constexpr, TAIL: tl.constexpr, NEAR: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    at, lead = aligned(row_offset(row, inner, stride_outer, stride_inner), WIDTH, PEEL)
    to = row_offset(row, inner, out_outer, out_inner) - lead
    if PEEL:
        to = tl.multiple_of(to, WIDTH)
    start = lead
    stop = lead + vocabulary
    kept = 0.0
    if label != ignore_index:
        base = logits + at
        raw_target = target_of(base + lead, label, vocabulary)
        z_target = softcapped(raw_target, softcap, SOFTCAP)
        # Before the loop, which hides its latency.
        factor = tl.load(row_scale + row.to(tl.int64) * scale_stride).to(tl.float32)
        weights = class_weight
        if WEIGHTED:
            weights = class_weight - lead
        peak, offset, s, u, t, zsum, taken = reduce_row(
            base, start, stop, weights, k, softcap,
            LANES, WIDTH, SOFTCAP, SMOOTHED, WEIGHTED, ENTROPY, PREDICTED, PEEL, TAIL, NEAR, MODE,
        )  # fmt: skip
        ties = 0.0
        if TIES:
            ties = count_ties(base, start, stop, peak, softcap, LANES, WIDTH, SOFTCAP)
        predicted = 0.0
        if PREDICTED:
            predicted = numbered(taken, lead, stop)
        w_target, total = weights_of(class_weight, weight_total, label, vocabulary, WEIGHTED)
        kept, a, b, c, peak_grad, target = finish_row(
            rows, loss, row, n_rows, z_target, w_target, total, peak, offset, s, u, t, zsum, ties,
            predicted, vocabulary, k, temperature, alpha, eps, power, scale,
            floor, low, high, z_loss, smoothing,
            FOCUS, FAMILY, THROUGH, IS_WEIGHT, BANDED, Z_LOSS, SMOOTHED, WEIGHTED, ENTROPY, MODE,
        )  # fmt: skip
        # In place: nobody may overwrite a logit that another thread's reduction has still to read.
        tl.debug_barrier()
        if SOFTCAP:
            target *= cap_slope(raw_target, softcap)
        if kept != 0.0:
            write_gradient(
                base, dlogits + to, start, stop, label + lead, weights, k, softcap, offset,
                peak, a * factor, b * factor, c * factor, peak_grad * factor, target * factor,
                spread * factor,
                LANES, WIDTH, SOFTCAP, SMOOTHED, WEIGHTED,
                THROUGH == BY_COLLISION, THROUGH == BY_ENTROPY, THROUGH == BY_MAX_PROB,
                PEEL, NEAR, MODE,
            )  # fmt: skip
    else:
        store_ignored(rows, loss, row, n_rows)
    if kept == 0.0:
        write_zeros(dlogits + to, start, stop, LANES, WIDTH, PEEL)
