"""The functions of `pytorch/backend.py`, by way of the kernels. Outputs are given, not made, except for the
buffers of [N] numbers between launches. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ...core.groups import batch_mean
from ...core.spec import Spec
from ...core.statistics import Field
from ..states import state_size
from . import objectives, tuning
from .batch_kernels import mean_scale_kernel, weighted_total_kernel
from .kernels import (
    combine_kernel,
    finish_kernel,
    fused_kernel,
    gradient_kernel,
    scale_kernel,
    statistics_kernel,
)
from .launch import (
    Call,
    kernel_for,
    lean,
    mode,
    on_device,
    options,
    out_strides_of,
    peel,
    processors,
    strides_of,
    warp,
    wide,
)

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
    splits = _splits(call)
    if splits == 1 and not spec.objective.needs_batch:
        _reduce(call, ignore_index, 0, (rows, loss))
        return loss, rows
    states = _reduce(call, ignore_index, splits)
    _finish(call, rows, loss, states, states.shape[1], (states.stride(1), states.stride(0)), ignore_index)
    return loss, rows


@on_device
def row_states(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> Tensor:
    """As `pytorch.backend.row_states`."""
    call = Call(logits, labels, class_weight, spec)
    states = _reduce(call, ignore_index, _splits(call), travels=True)
    splits = states.shape[1]
    if splits == 1 or call.count == 0:
        return states[:, 0]
    joined = torch.zeros(call.count, state_size(spec), dtype=torch.float32, device=call.device)
    combine_kernel[(call.count,)](
        labels, states, joined, splits, ignore_index, call.k,
        SMOOTHED=spec.label_smoothing > 0, TIES=spec.peaks, PREDICTED=spec.statistics,
        ENTROPY=spec.needs_entropy, SPLITS=triton.next_power_of_2(splits), MODE=call.mode,
        num_warps=1, **call.options,
    )  # fmt: skip
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
    call = Call(states, labels, class_weight, spec)
    call.vocabulary = vocabulary
    rows, loss = call.buffers()
    _finish(call, rows, loss, states, states.shape[0], (states.stride(0), states.stride(1)), ignore_index)
    return loss, rows


def _splits(call: Call) -> int:
    """Programs a row."""
    plan = tuning.statistics(call.vocabulary, call.logits.element_size(), call.spec.needs_entropy, warp())
    return tuning.splits(call.count, call.vocabulary, plan.tile, processors(call.device))


def _reduce(
    call: Call,
    ignore_index: int,
    splits: int,
    outputs: tuple[Tensor, Tensor] | None = None,
    *,
    travels: bool = False,
) -> Tensor:
    """Launch `statistics_kernel`: with splits to states [N, splits, size], without to the `outputs`."""
    spec, stored = call.spec, splits > 0
    plan = tuning.statistics(call.vocabulary, call.logits.element_size(), call.spec.needs_entropy, warp())
    span = call.vocabulary
    if stored:
        span = plan.tile * max(1, math.ceil(call.vocabulary / (plan.tile * splits)))
        splits = math.ceil(call.vocabulary / span)
    shape = (call.count, splits, state_size(spec))
    # Ignored rows are not written, but travel.
    make = torch.zeros if travels else torch.empty
    states = make(shape, dtype=torch.float32, device=call.device)
    if call.count == 0:
        return states
    rows, loss = outputs or (states, states)
    kernel_for(statistics_kernel, min(call.vocabulary, 2))[(call.count, max(splits, 1))](
        call.logits, call.labels, call.class_weight, call.weight_total, rows, loss,
        states if stored else rows,
        call.count, **call.position(), vocabulary=call.vocabulary, span=span, ignore_index=ignore_index,
        k=call.k, softcap=spec.softcap, temperature=spec.temperature,
        floor=0.5 * (spec.objective.mean_prob or 0.0), **call.scalars, **call.constants,
        WEIGHTED=call.weighted, SOFTCAP=call.softcap, TIES=spec.peaks, STORED=stored,
        PEEL=peel(plan.width, (call.logits,), (call.strides,)), TAIL=plan.tail,
        LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode, num_warps=plan.num_warps,
        **options(call.mode, wide(spec, reduces=True)),
    )  # fmt: skip
    return states


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
    spec = call.spec

    def launch(floor: Tensor | float, batch: bool, constants: dict[str, Any]) -> None:
        if call.count == 0:
            return
        finish_kernel[(call.count,)](
            call.labels, call.class_weight, call.weight_total, floor, rows, loss, states,
            call.count, parts, *strides, call.vocabulary, ignore_index, call.k, spec.temperature,
            **call.scalars, **constants, WEIGHTED=call.weighted, TIES=spec.peaks, BATCH=batch,
            SPLITS=triton.next_power_of_2(parts), MODE=call.mode, num_warps=1, **call.options,
        )  # fmt: skip

    if spec.objective.needs_batch:
        # First only the statistics, for the batch's mean p; the logits are not read again.
        none = {"FOCUS": objectives.FOCI["fixed"], "FAMILY": objectives.FAMILIES["none"], "THROUGH": 0}
        launch(0.0, False, call.constants | none)
        mean = batch_mean(rows[Field.LOGP], call.labels != ignore_index, spec.objective.batch_group)
        launch(mean, True, call.constants)
    else:
        launch(0.5 * (spec.objective.mean_prob or 0.0), False, call.constants)


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
    out_outer, out_inner = out_strides = out_strides_of(out, call.inner)
    kernel_for(fused_kernel, min(call.vocabulary, 2))[(call.count,)](
        logits, labels, call.class_weight, call.weight_total, rows, loss, row_scale, out,
        call.count, **call.position(), out_outer=out_outer, out_inner=out_inner,
        scale_stride=row_scale.stride(0), vocabulary=call.vocabulary, ignore_index=ignore_index, k=call.k,
        softcap=spec.softcap, temperature=spec.temperature,
        floor=0.5 * (spec.objective.mean_prob or 0.0), **call.scalars,
        spread=spec.label_smoothing / call.vocabulary / spec.temperature, **call.constants,
        WEIGHTED=call.weighted, SOFTCAP=call.softcap, TIES=spec.peaks,
        PEEL=peel(plan.width, (logits, out), (call.strides, out_strides)),
        TAIL=plan.tail, NEAR=plan.near,
        LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode,
        num_warps=plan.num_warps, **call.options,
    )  # fmt: skip
    return loss, rows


@on_device
def mean_scale(labels: Tensor, ignore_index: int) -> Tensor:
    """d loss / d row of a mean, [N] with stride 0: 1 over the number of rows that count."""
    scale = torch.empty(1, dtype=torch.float32, device=labels.device)
    args = (labels, scale, labels.numel(), ignore_index)
    mean_scale_kernel[(1,)](*args, num_warps=8, **options(mode(), False))
    return scale.expand(labels.numel())


@on_device
def weighted_total(loss: Tensor, row_scale: Tensor, rows: Tensor) -> Tensor:
    """As `operators.weighted_total`."""
    total = torch.empty(1, dtype=torch.float32, device=loss.device)
    args = (loss, rows[Field.KEPT], row_scale, total, loss.numel(), row_scale.stride(0))
    weighted_total_kernel[(1,)](*args, num_warps=8, **options(mode(), False))
    return total.reshape(())


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
    out_outer, out_inner = out_strides = out_strides_of(out, call.inner)
    programs = call.count
    if upstream is not None:
        span = call.vocabulary
        programs = min(call.count, RESCALING * processors(call.device))
    grid = (programs, math.ceil(call.vocabulary / span))
    gradient_kernel[grid](
        logits, labels, call.class_weight, rows, dloss, rows if upstream is None else upstream, out,
        call.count, **call.position(), out_outer=out_outer, out_inner=out_inner,
        dloss_stride=dloss.stride(0), vocabulary=call.vocabulary, span=span, k=call.k,
        softcap=spec.softcap, spread=spec.label_smoothing / call.vocabulary / spec.temperature,
        UPSTREAM=upstream is not None, SQUARES=spec.squares, LOGS=spec.logs, PEAKS=spec.peaks,
        SMOOTHED=spec.label_smoothing > 0, WEIGHTED=call.weighted, SOFTCAP=call.softcap,
        PEEL=peel(plan.width, (logits, out), (call.strides, out_strides)),
        NEAR=plan.near, LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode,
        num_warps=plan.num_warps, **call.options,
    )  # fmt: skip


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
    inner, outer, stride = strides_of(gradient)
    rows = gradient.numel() // gradient.shape[-1]
    scale_kernel[(min(rows, RESCALING * processors(gradient.device)),)](
        gradient, upstream, upstream if kept is None else kept, rows, inner, outer, stride,
        gradient.shape[-1], KEPT=kept is not None,
        LANES=plan.lanes, WIDTH=plan.width, MODE=mode(), num_warps=plan.num_warps, **options(mode(), False),
    )  # fmt: skip
