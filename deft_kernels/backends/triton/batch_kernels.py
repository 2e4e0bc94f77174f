"""What a mean needs of the whole batch, one program each: written in PyTorch it is ten launches of a few
microseconds, at 4,096 x 32,000 a sixth of the step."""

import triton
import triton.language as tl

# Rows that the one program takes at a time.
ROWS = tl.constexpr(4096)


@triton.jit
def scale_of_mean(labels, n_rows, ignore_index):
    """1 over the number of rows that count, 1 if none does."""
    counted = tl.zeros((ROWS,), tl.int32)
    first = 0
    while first < n_rows:
        row = first + tl.arange(0, ROWS)
        label = tl.load(labels + row, mask=row < n_rows, other=ignore_index)
        counted += tl.where(label != ignore_index, 1, 0)
        first += ROWS
    return 1.0 / tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)


@triton.jit
def mean_scale_kernel(
    labels,  # [N] int64
    scale,  # [1] fp32
    n_rows,
    ignore_index,
):
    tl.store(scale, scale_of_mean(labels, n_rows, ignore_index))


@triton.jit
def mean_kernel(
    labels,  # [N] int64
    loss,  # [N] fp32
    kept,  # [N] fp32
    scale,  # [1] fp32
    total,  # [1] fp32
    n_rows,
    ignore_index,
):
    """The mean loss, and its scale for the backward."""
    factor = scale_of_mean(labels, n_rows, ignore_index)
    tl.store(scale, factor)
    sums = tl.zeros((ROWS,), tl.float32)
    first = 0
    while first < n_rows:
        row = first + tl.arange(0, ROWS)
        inside = row < n_rows
        scaled = tl.load(loss + row, mask=inside, other=0.0) * factor
        sums += tl.where(tl.load(kept + row, mask=inside, other=0.0) != 0.0, scaled, 0.0)
        first += ROWS
    tl.store(total, tl.sum(sums, 0))


@triton.jit
def weighted_total_kernel(
    loss,  # [N] fp32
    kept,  # [N] fp32
    row_scale,  # [N] fp32, stride scale_stride
    total,  # [1] fp32
    n_rows,
    scale_stride,
):
    """sum_i row_scale_i loss_i over the rows that are kept; the scale of another row may hold NaN or inf."""
    sums = tl.zeros((ROWS,), tl.float32)
    first = 0
    while first < n_rows:
        row = first + tl.arange(0, ROWS)
        inside = row < n_rows
        scaled = tl.load(loss + row, mask=inside, other=0.0)
        scaled *= tl.load(row_scale + row.to(tl.int64) * scale_stride, mask=inside, other=0.0)
        sums += tl.where(tl.load(kept + row, mask=inside, other=0.0) != 0.0, scaled, 0.0)
        first += ROWS
    tl.store(total, tl.sum(sums, 0))
