"""The functions of `pytorch/backend.py`, by way of the kernels. Outputs are given, not made, except for the
buffers of [N] numbers between launches. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.groups import batch_mean
from ...core.spec import Spec
from ...core.statistics import Field
from ..states import state_size
from . import tuning
from .batch_kernels import mean_kernel, mean_scale_kernel, weighted_total_kernel
from .gradient_kernels import gradient_kernel, scale_kernel
from .kernels import combine_kernel, finish_kernel, fused_kernel, slice_kernel, statistics_kernel
from .launch import (
    Call,
    kernel_for,
    lean,
    mode,
    on_device,
    options,
    out_strides_of,
    peel,
    plan_of,
    processors,
    strides_of,
    warp,
)
from .records import Options

# Programs a multiprocessor of a launch that mostly finds nothing to do, because the upstream is 1.
RESCALING = 8
SLICE_TURNS = 8  # columns of a gradient program, in turns of two tiles: long enough to amortise its row


@on_device
def row_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    """As `pytorch.backend.row_loss`."""
    call = Call(logits, labels, class_weight, spec)
    rows, loss = call.buffers()
    plan, splits = _slicing(call)
    if splits > 1 or spec.objective.needs_batch:
        states = _reduce(call, ignore_index, plan, splits, torch.empty)
        _finish(call, rows, loss, states, states.shape[1], (states.stride(1), states.stride(0)), ignore_index)
    elif call.count > 0:
        tensors = (logits, labels, call.class_weight, call.weight_total, rows, loss)
        scalars = (call.count, call.strides, call.vocabulary, ignore_index, call.variants.numbers)
        static = (call.variants.rows, plan_of(plan, peel(plan.width, (logits, call.strides))))
        kernel_for(statistics_kernel, call.vocabulary)[(call.count,)](
            *tensors, *scalars, *static, num_warps=plan.num_warps, **call.variants.compiler_of_reductions
        )
    return loss, rows


@on_device
def row_states(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> Tensor:
    """As `pytorch.backend.row_states`."""
    call = Call(logits, labels, class_weight, spec)
    # Zeros: rows that do not count are not written, but go to other ranks with the rest.
    states = _reduce(call, ignore_index, *_slicing(call), torch.zeros)
    _, splits, size = states.shape
    if splits == 1 or call.count == 0:
        return states[:, 0]
    joined = torch.zeros(call.count, size, dtype=torch.float32, device=call.device)
    args = (labels, states, joined, splits, ignore_index, call.variants.numbers.k)
    static = (size, _power_of_2(splits), call.variants.states)
    combine_kernel[(call.count,)](*args, *static, num_warps=1, **call.variants.compiler)
    return joined


@on_device
def states_loss(
    states: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """As `pytorch.backend.states_loss`."""
    call = Call(states, labels, class_weight, spec, vocabulary)
    rows, loss = call.buffers()
    _finish(call, rows, loss, states, states.shape[0], (states.stride(0), states.stride(1)), ignore_index)
    return loss, rows


def _slicing(call: Call) -> tuple[tuning.Launch, int]:
    """How rows are reduced, and by how many programs each."""
    vocabulary = call.vocabulary
    plan = tuning.statistics(vocabulary, call.logits.element_size(), call.spec.needs_entropy, warp())
    return plan, tuning.splits(call.count, vocabulary, plan.tile, processors(call.device))


def _reduce(
    call: Call, ignore_index: int, plan: tuning.Launch, splits: int, make: Callable[..., Tensor]
) -> Tensor:
    """States [N, splits, size], one of each slice of a row: whole tiles, none without a column."""
    span = plan.tile * max(1, -(-call.vocabulary // (plan.tile * splits)))
    splits = -(-call.vocabulary // span)
    size = state_size(call.spec)
    states = make(call.count, splits, size, dtype=torch.float32, device=call.device)
    if call.count > 0:
        tensors = (call.logits, call.labels, call.class_weight, states)
        scalars = (call.strides, call.vocabulary, span, ignore_index, call.variants.numbers)
        peeled = peel(plan.width, (call.logits, call.strides))
        static = (size, call.variants.slices, plan_of(plan, peeled))
        kernel_for(slice_kernel, call.vocabulary)[(call.count, splits)](
            *tensors, *scalars, *static, num_warps=plan.num_warps, **call.variants.compiler_of_reductions
        )
    return states


def _power_of_2(parts: int) -> int:
    """The next one: the kernels' vectors are that long."""
    return 1 << (parts - 1).bit_length()


def _finish(
    call: Call,
    rows: Tensor,
    loss: Tensor,
    states: Tensor,
    parts: int,
    strides: tuple[int, int],
    ignore_index: int,
) -> None:
    """strides: from part to part, from row to row."""

    def launch(mean_prob: Tensor | None, variant: Options) -> None:
        if call.count == 0:
            return
        # In place of what is not given fp32 numbers, whatever the logits are: no further program.
        weights = (call.class_weight, call.weight_total) if call.weighted else (rows, rows)
        given = rows if mean_prob is None else mean_prob
        tensors = (call.labels, *weights, given, rows, loss, states)
        scalars = (call.count, parts, *strides, call.vocabulary, ignore_index, call.variants.numbers)
        static = (mean_prob is not None, _power_of_2(parts), variant)
        finish_kernel[(call.count,)](*tensors, *scalars, *static, num_warps=1, **call.variants.compiler)

    objective = call.spec.objective
    if objective.needs_batch:
        # First only the statistics, for the batch's mean p; the logits are not read again. Ranks without a
        # row take part in the mean as well.
        launch(None, call.variants.batch)
        mean = batch_mean(rows[Field.LOGP], call.labels != ignore_index, objective.batch_group)
        launch(mean, call.variants.finish)
    else:
        launch(None, call.variants.finish)


@on_device
def row_loss_with_gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `pytorch.backend.row_loss_with_gradient`."""
    call = Call(logits, labels, class_weight, spec)
    rows, loss = call.buffers()
    if call.count == 0:
        return loss, rows
    plan = tuning.fused(call.vocabulary, logits.element_size(), lean(spec), warp())
    out_strides = out_strides_of(out, call.strides.inner)
    peeled = peel(plan.width, (logits, call.strides), (out, out_strides))
    tensors = (logits, labels, call.class_weight, call.weight_total, rows, loss, row_scale, out)
    rows_at = (call.count, call.strides, out_strides, row_scale.stride(0))
    scalars = (call.vocabulary, ignore_index, call.variants.numbers)
    static = (call.variants.rows, plan_of(plan, peeled))
    kernel_for(fused_kernel, call.vocabulary)[(call.count,)](
        *tensors, *rows_at, *scalars, *static, num_warps=plan.num_warps, **call.variants.compiler_of(plan)
    )
    return loss, rows


@on_device
def mean_scale(labels: Tensor, ignore_index: int) -> Tensor:
    """d loss / d row of a mean, [N] with stride 0: 1 over the number of rows that count."""
    scale = torch.empty(1, dtype=torch.float32, device=labels.device)
    args = (labels, scale, labels.numel(), ignore_index)
    mean_scale_kernel[(1,)](*args, num_warps=8, **options(mode()))
    return scale.expand(labels.numel())


@on_device
def mean(loss: Tensor, rows: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(mean of the losses of rows that count, its `mean_scale`), by one launch."""
    scale = torch.empty(1, dtype=torch.float32, device=labels.device)
    total = torch.empty((), dtype=torch.float32, device=labels.device)
    args = (labels, loss, rows[Field.KEPT], scale, total, labels.numel(), ignore_index)
    mean_kernel[(1,)](*args, num_warps=8, **options(mode()))
    return total, scale.expand(labels.numel())


@on_device
def weighted_total(loss: Tensor, row_scale: Tensor, rows: Tensor) -> Tensor:
    """As `operators.weighted_total`."""
    total = torch.empty((), dtype=torch.float32, device=loss.device)
    args = (loss, rows[Field.KEPT], row_scale, total, loss.numel(), row_scale.stride(0))
    weighted_total_kernel[(1,)](*args, num_warps=8, **options(mode()))
    return total


@on_device
def gradient(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    dloss: Tensor,
    spec: Spec,
    out: Tensor,
    upstream: Tensor | None = None,
) -> None:
    """As `pytorch.backend.gradient`; with `upstream` [1] nothing is written where it is 1, else it scales."""
    call = Call(logits, labels, class_weight, spec)
    if call.count == 0:
        return
    plan = tuning.gradient(call.vocabulary, logits.element_size(), warp())
    span = plan.tile * 2 * SLICE_TURNS
    out_strides = out_strides_of(out, call.strides.inner)
    programs = call.count
    if upstream is not None:
        span = call.vocabulary
        programs = min(call.count, RESCALING * processors(call.device))
    scalar = rows if upstream is None else upstream
    peeled = peel(plan.width, (logits, call.strides), (out, out_strides))
    tensors = (logits, labels, call.class_weight, rows, dloss, scalar, out)
    rows_at = (call.count, call.strides, out_strides, dloss.stride(0))
    scalars = (call.vocabulary, span, call.variants.numbers)
    static = (upstream is not None, call.variants.gradient, plan_of(plan, peeled))
    gradient_kernel[(programs, -(-call.vocabulary // span))](
        *tensors, *rows_at, *scalars, *static, num_warps=plan.num_warps, **call.variants.compiler
    )


@on_device
def match_upstream(
    dlogits: Tensor,
    upstream: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    spec: Spec,
) -> None:
    """See `operators.match_upstream_`; decided on the device."""
    if labels.numel() == 0:
        return
    if logits is not None:
        gradient(logits, labels, class_weight, rows, row_scale, spec, dlogits, upstream)
        return
    scale(dlogits, upstream, rows[Field.KEPT])


@on_device
def scale(gradient: Tensor, upstream: Tensor, kept: Tensor | None = None) -> None:
    """gradient [..., V] *= upstream; decided on the device, which reads and writes nothing where it is 1.

    kept: [N], 0 at rows to leave as they are.
    """
    plan = tuning.gradient(gradient.shape[-1], gradient.element_size(), warp())
    rows, vocabulary = gradient.numel() // gradient.shape[-1], gradient.shape[-1]
    args = (gradient, upstream, upstream if kept is None else kept, rows, strides_of(gradient), vocabulary)
    static = (kept is not None, mode(), plan_of(plan))
    scale_kernel[(min(rows, RESCALING * processors(gradient.device)),)](
        *args, *static, num_warps=plan.num_warps, **options(mode(), False)
    )
