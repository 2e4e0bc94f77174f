"""Launchers: the functions of `deft_kernels.blocked`, by way of the kernels. Outputs are given, not made,
except for the buffers of [N] numbers between launches. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from ..backends import interpreted
from ..formulas import log2_scale
from ..parallel import batch_mean
from ..spec import Spec
from ..states import state_size
from ..statistics import Field
from . import finish, objectives, table
from .device import GENERIC, INTERPRETED, PTX
from .row_kernels import (
    combine_kernel,
    finish_kernel,
    fused_kernel,
    gradient_kernel,
    scale_kernel,
    statistics_kernel,
)

SLICE_TURNS = 8  # columns of a gradient program, in turns of two tiles: long enough to amortise its row


def _mode() -> int:
    if interpreted():
        return INTERPRETED.value
    return GENERIC.value if torch.version.hip is not None else PTX.value


def options(mode: int, transformed: bool) -> dict[str, Any]:
    """Compiler options. Contraction of products and sums is said aloud: Triton 3.10 changes its default.

    transformed: soft-capped or smoothed logits, whose longer loops ptxas otherwise squeezes into 40 to 48
    registers with 8 to 32 bytes spilled (sm_80, sm_90; ahead of time, Triton 3.9); with 128 it spills none.
    """
    chosen: dict[str, Any] = {"enable_fp_fusion": True}
    if transformed and mode == PTX.value:
        chosen["maxnreg"] = 128
    return chosen


@lru_cache(maxsize=8)
def _for(kernel: Any, vocabulary: int) -> Any:
    """The kernel; for V = 1 one to which V is not a constant, which Triton 3.6 fails to compile."""
    if vocabulary > 1 or interpreted():
        return kernel
    return triton.jit(kernel.fn, do_not_specialize=["vocabulary"])


def _warp() -> int:
    return 64 if torch.version.hip is not None else 32


def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def objective_constants(spec: Spec) -> dict[str, Any]:
    """The constexprs and scalars that say which objective it is."""
    o = spec.objective
    through = finish.HELD
    if not o.detach and o.family != "none":
        by = {
            "cayley": finish.BY_LOGP,
            "prob": finish.BY_LOGP,
            "collision": finish.BY_COLLISION,
            "shannon": finish.BY_ENTROPY,
            "entropy": finish.BY_ENTROPY,
            "max_prob": finish.BY_MAX_PROB,
        }
        through = by.get(o.focus, finish.HELD)
    return {
        "FOCUS": objectives.FOCI[o.focus],
        "FAMILY": objectives.FAMILIES[o.family],
        "THROUGH": through.value,
        "IS_WEIGHT": o.family == "weighted",
        "BANDED": o.has_band,
        "Z_LOSS": spec.z_loss > 0,
        "SMOOTHED": spec.label_smoothing > 0,
        "ENTROPY": spec.needs_entropy,
    }


def _objective_scalars(spec: Spec) -> dict[str, float]:
    o = spec.objective
    return {
        "alpha": o.alpha,
        "eps": o.eps,
        "power": o.power,
        "scale": 1.0 / math.log(o.top_k),
        "low": o.low,
        "high": o.high,
        "z_loss": spec.z_loss,
        "smoothing": spec.label_smoothing,
    }


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """(inner, outer, stride): row r lies at (r // inner) outer + (r % inner) stride."""
    dims = [d for d in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if d[0] != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if not merged:
        return 1, logits.shape[-1], 0
    if len(merged) == 1:
        return 1, merged[0][1], 0
    (_, outer), (inner, stride) = merged
    return inner, outer, stride


def _out_strides(out: Tensor, inner: int) -> tuple[int, int]:
    """Strides of the output's rows under the logits' own split of the row number."""
    own_inner, outer, stride = _strides(out)
    if own_inner == inner:
        return outer, stride
    # The output is contiguous where the logits are not: one stride serves both parts.
    assert own_inner == 1
    return outer * inner, outer


def _peel(width: int, tensors: tuple[Tensor, ...], strides: tuple[tuple[int, int], ...]) -> bool:
    """Whether to peel a head off every row, so that its loads and stores are 16 bytes wide.

    Not needed where all strides are multiples of 16 elements, which Triton sees by itself; not possible where
    rows of the tensors lie differently to a 16-byte boundary.
    """
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return False
    alike = len({(outer % width, inner % width) for outer, inner in strides}) == 1
    return alike and any(stride % 16 for pair in strides for stride in pair)


def _on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @wraps(launcher)
    def guarded(logits: Tensor, *args: Any, **keywords: Any) -> Any:
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            return launcher(logits, *args, **keywords)

    return guarded


class _Call:
    """What the launches of one call share."""

    def __init__(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, spec: Spec):
        self.logits, self.labels, self.spec = logits, labels, spec
        self.count, self.vocabulary = labels.numel(), logits.shape[-1]
        self.device, self.mode, self.k = logits.device, _mode(), log2_scale(spec.temperature)
        self.weighted = class_weight is not None
        self.class_weight = logits if class_weight is None else class_weight
        self.softcap = spec.softcap > 0
        self.options = options(self.mode, self.softcap or spec.label_smoothing > 0)
        self.inner, *strides = _strides(logits)
        self.strides = (strides[0], strides[1])

    # Of the statistics alone: a backward builds none of these, and launches no sum of the class weights.
    @cached_property
    def constants(self) -> dict[str, Any]:
        return objective_constants(self.spec)

    @cached_property
    def scalars(self) -> dict[str, float]:
        return _objective_scalars(self.spec)

    @cached_property
    def weight_total(self) -> Tensor:
        return self.class_weight.float().sum() if self.weighted else self.logits

    def buffers(self) -> tuple[Tensor, Tensor]:
        rows = torch.empty(len(Field), self.count, dtype=torch.float32, device=self.device)
        return rows, torch.empty(self.count, dtype=torch.float32, device=self.device)

    def position(self) -> dict[str, int]:
        return {"inner": self.inner, "stride_outer": self.strides[0], "stride_inner": self.strides[1]}


@_on_device
def row_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    """As `blocked.row_loss`."""
    call = _Call(logits, labels, class_weight, spec)
    rows, loss = call.buffers()
    splits = _splits(call)
    if splits == 1 and not spec.objective.needs_batch:
        _reduce(call, ignore_index, 0, (rows, loss))
        return loss, rows
    states = _reduce(call, ignore_index, splits)
    _finish(call, rows, loss, states, states.shape[1], (states.stride(1), states.stride(0)), ignore_index)
    return loss, rows


@_on_device
def row_states(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> Tensor:
    """As `blocked.row_states`."""
    call = _Call(logits, labels, class_weight, spec)
    states = _reduce(call, ignore_index, _splits(call))
    splits = states.shape[1]
    if splits == 1 or call.count == 0:
        return states[:, 0]
    joined = torch.zeros(call.count, state_size(spec), dtype=torch.float32, device=call.device)
    combine_kernel[(call.count,)](
        labels, states, joined, splits, ignore_index, call.k,
        SMOOTHED=spec.label_smoothing > 0, TIES=spec.peaks, ENTROPY=spec.needs_entropy,
        SPLITS=triton.next_power_of_2(splits), MODE=call.mode, num_warps=1, **call.options,
    )  # fmt: skip
    return joined


@_on_device
def states_loss(
    states: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """As `blocked.states_loss`."""
    call = _Call(states, labels, class_weight, spec)
    call.vocabulary = vocabulary
    rows, loss = call.buffers()
    _finish(call, rows, loss, states, states.shape[0], (states.stride(0), states.stride(1)), ignore_index)
    return loss, rows


def _splits(call: _Call) -> int:
    """Programs a row."""
    plan = table.statistics(call.vocabulary, call.logits.element_size(), _warp())
    return table.splits(call.count, call.vocabulary, plan.tile, _processors(call.device))


def _reduce(
    call: _Call, ignore_index: int, splits: int, outputs: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Launch `statistics_kernel`: with splits to states [N, splits, size], without to the `outputs`."""
    spec, stored = call.spec, splits > 0
    plan = table.statistics(call.vocabulary, call.logits.element_size(), _warp())
    span = call.vocabulary
    if stored:
        span = plan.tile * max(1, math.ceil(call.vocabulary / (plan.tile * splits)))
        splits = math.ceil(call.vocabulary / span)
    # Zeros, because ignored rows are not written and may travel.
    states = torch.zeros(call.count, splits, state_size(spec), dtype=torch.float32, device=call.device)
    if call.count == 0:
        return states
    rows, loss = outputs or (states, states)
    _for(statistics_kernel, min(call.vocabulary, 2))[(call.count, max(splits, 1))](
        call.logits, call.labels, call.class_weight, call.weight_total, rows, loss,
        states if stored else rows,
        call.count, **call.position(), vocabulary=call.vocabulary, span=span, ignore_index=ignore_index,
        k=call.k, softcap=spec.softcap, temperature=spec.temperature,
        floor=0.5 * (spec.objective.mean_prob or 0.0), **call.scalars, **call.constants,
        WEIGHTED=call.weighted, SOFTCAP=call.softcap, TIES=spec.peaks, STORED=stored,
        PEEL=_peel(plan.width, (call.logits,), (call.strides,)),
        LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode, num_warps=plan.num_warps, **call.options,
    )  # fmt: skip
    return states


def _finish(
    call: _Call,
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


@_on_device
def row_loss_with_gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `blocked.row_loss_with_gradient`."""
    call = _Call(logits, labels, class_weight, spec)
    rows, loss = call.buffers()
    if call.count == 0:
        return loss, rows
    plan = table.fused(call.vocabulary, logits.element_size(), _warp())
    out_outer, out_inner = out_strides = _out_strides(out, call.inner)
    _for(fused_kernel, min(call.vocabulary, 2))[(call.count,)](
        logits, labels, call.class_weight, call.weight_total, rows, loss, row_scale, out,
        call.count, **call.position(), out_outer=out_outer, out_inner=out_inner,
        vocabulary=call.vocabulary, ignore_index=ignore_index, k=call.k, softcap=spec.softcap,
        temperature=spec.temperature, floor=0.5 * (spec.objective.mean_prob or 0.0), **call.scalars,
        spread=spec.label_smoothing / call.vocabulary / spec.temperature, **call.constants,
        WEIGHTED=call.weighted, SOFTCAP=call.softcap, TIES=spec.peaks,
        PEEL=_peel(plan.width, (logits, out), (call.strides, out_strides)),
        LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode,
        num_warps=plan.num_warps, **call.options,
    )  # fmt: skip
    return loss, rows


@_on_device
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
    """As `blocked.gradient`; with `upstream` [1] nothing is written when it is 1, else dloss is scaled."""
    call = _Call(logits, labels, class_weight, spec)
    if call.count == 0:
        return
    plan = table.gradient(call.vocabulary, logits.element_size(), _warp())
    span = plan.tile * 2 * SLICE_TURNS
    out_outer, out_inner = out_strides = _out_strides(out, call.inner)
    grid = (call.count, math.ceil(call.vocabulary / span))
    gradient_kernel[grid](
        logits, labels, call.class_weight, rows, dloss, rows if upstream is None else upstream, out,
        call.count, **call.position(), out_outer=out_outer, out_inner=out_inner,
        dloss_stride=dloss.stride(0), vocabulary=call.vocabulary, span=span, k=call.k,
        softcap=spec.softcap, spread=spec.label_smoothing / call.vocabulary / spec.temperature,
        UPSTREAM=upstream is not None, SQUARES=spec.squares, LOGS=spec.logs, PEAKS=spec.peaks,
        SMOOTHED=spec.label_smoothing > 0, WEIGHTED=call.weighted, SOFTCAP=call.softcap,
        PEEL=_peel(plan.width, (logits, out), (call.strides, out_strides)),
        LANES=plan.lanes, WIDTH=plan.width, MODE=call.mode,
        num_warps=plan.num_warps, **call.options,
    )  # fmt: skip


@_on_device
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
    scale(dlogits, upstream)


@_on_device
def scale(gradient: Tensor, upstream: Tensor) -> None:
    """gradient [..., V] *= upstream; decided on the device, which reads and writes nothing where it is 1."""
    plan = table.gradient(gradient.shape[-1], gradient.element_size(), _warp())
    inner, outer, stride = _strides(gradient)
    scale_kernel[(gradient.numel() // gradient.shape[-1],)](
        gradient, upstream, inner, outer, stride, gradient.shape[-1],
        LANES=plan.lanes, WIDTH=plan.width, MODE=_mode(), num_warps=plan.num_warps, **options(_mode(), False),
    )  # fmt: skip
