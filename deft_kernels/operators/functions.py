"""The losses over logits as autograd Functions that call the backend themselves, for plain eager calls.

They take a Spec; an operator takes what fits its schema. Both have the same backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import implementation, triton_backend
from ..core import validation
from ..core.reduction import Weighting
from ..core.spec import Spec
from ..core.statistics import loss_dtype
from . import in_place
from . import logits as logits_operators
from .eager import watched
from .logits import gradient_of_rows, gradient_storage


def row_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    """As `logits_operators.row_loss`."""
    if watched(logits, labels, class_weight):
        return logits_operators.row_loss(logits, labels, class_weight, ignore_index, *spec.encode())
    return RowLoss.apply(logits, labels, class_weight, ignore_index, spec)


def loss_with_gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """(sum_i row_scale_i loss_i, rows); the gradient is made here, with `inplace` in the logits' storage."""
    if not watched(logits, labels, row_scale, class_weight):
        return LossWithGradient.apply(logits, labels, row_scale, class_weight, ignore_index, spec)
    args = (labels, row_scale, class_weight, ignore_index, *spec.encode())
    if spec.inplace:
        return in_place.InPlaceLoss.apply(logits, *args)
    loss, rows, _ = logits_operators.row_loss_with_gradient(logits, *args)
    return loss, rows


def row_scale(
    weighting: Weighting, labels: Tensor, ignore_index: int, dtype: torch.dtype, *, by_kernel: bool
) -> Tensor:
    """d loss / d row of a mean or a sum over logits of `dtype`, [N].

    by_kernel: of a mean over the rows that count, on the Triton backend: one launch instead of several.
    """
    if by_kernel:
        return triton_backend().mean_scale(labels, ignore_index)
    return weighting.row_scale(labels != ignore_index, labels, loss_dtype(dtype))


def mean_loss(logits: Tensor, labels: Tensor, ignore_index: int, spec: Spec) -> tuple[Tensor, Tensor]:
    """(mean loss over the rows that count, rows), of the Triton backend: two launches, and two backward."""
    return MeanLoss.apply(logits, labels, ignore_index, spec)


class RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        validation.admit(logits, labels, class_weight, ignore_index, spec)
        loss, rows = implementation(spec).row_loss(logits, labels, class_weight, ignore_index, spec)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(logits, labels, class_weight, rows)
        ctx.spec = spec
        return loss, rows

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
        logits, labels, class_weight, rows = ctx.saved_tensors
        return gradient_of_rows(logits, labels, class_weight, rows, dloss, ctx.spec), None, None, None, None


class MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, spec: Spec
    ) -> tuple[Tensor, Tensor]:
        validation.admit(logits, labels, None, ignore_index, spec)
        loss, rows = implementation(spec).row_loss(logits, labels, None, ignore_index, spec)
        mean, scale = triton_backend().mean(loss, rows, labels, ignore_index)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(logits, labels, rows, scale)
        ctx.spec = spec
        return mean, rows

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, _: Any) -> Any:
        logits, labels, rows, scale = ctx.saved_tensors
        dloss = (dmean * scale[:1]).expand(labels.shape[0])
        return gradient_of_rows(logits, labels, None, rows, dloss, ctx.spec), None, None, None


class LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        ignore_index: int,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        validation.admit(logits, labels, class_weight, ignore_index, spec, row_scale)
        if spec.inplace and logits.dtype == torch.float16:
            in_place.warn_of_underflow()
        dlogits = gradient_storage(logits, spec)
        args = (labels, row_scale, class_weight, ignore_index, spec, dlogits)
        loss, rows = implementation(spec).row_loss_with_gradient(logits, *args)
        keep(ctx, logits, labels, row_scale, class_weight, rows, dlogits, spec)
        return implementation(spec).weighted_total(loss, row_scale, rows), rows

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, _: Any) -> Any:
        return kept_gradient(ctx, dtotal), None, None, None, None, None


def keep(
    ctx: Any,
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    dlogits: Tensor,
    spec: Spec,
) -> None:
    """What the backward needs of a gradient that the forward has written; `rows` is an output."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rows)
    ctx.save_for_backward(None if spec.inplace else logits, labels, row_scale, class_weight, rows)
    ctx.dlogits, ctx.spec = dlogits, spec
    ctx.version = in_place.version_of(dlogits) if spec.inplace else None


def kept_gradient(ctx: Any, dtotal: Tensor | None) -> Tensor | None:
    """The gradient that the forward made, for this upstream."""
    if dtotal is None:
        return None
    logits, labels, row_scale, class_weight, rows = ctx.saved_tensors
    spec: Spec = ctx.spec
    # With no other reference to the tensor, autograd keeps it as .grad without a copy.
    dlogits, ctx.dlogits = ctx.dlogits, None
    if spec.inplace:
        in_place.check_in_place_backward(dlogits, ctx.version)
    elif dlogits is None or torch.is_grad_enabled() or watched(dtotal):
        # An earlier backward took it; or it is to have a graph, for which the operator raises.
        dloss = (dtotal * row_scale).to(rows.dtype)
        return gradient_of_rows(logits, labels, class_weight, rows, dloss, spec)
    backend = implementation(spec)
    backend.match_upstream(dlogits, dtotal, logits, labels, row_scale, class_weight, rows, spec)
    return dlogits
