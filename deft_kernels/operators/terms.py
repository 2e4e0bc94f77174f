"""Losses that are made of formulas of the rows (`deft_kernels.row_objectives`), in part or as a whole.

The statistics are those of an objective that every backend knows; from them come the formulas' values, in
Python, and then the rows' losses and the coefficients of their gradients, on vectors of [N]: no backend knows
of formulas. `own` stands for the values, [K, N], see `with_terms`.
"""

# Annotations as in `logits`.
from dataclasses import replace
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ..backends import implementation
from ..backends.pytorch.finish import with_terms
from ..core import checks, validation
from ..core.reduction import Weighting, class_weights
from ..core.spec import Spec, decode
from ..core.statistics import Field, statistics_record
from ..objectives import tsallis
from ..row_objectives import Terms
from . import chunks, functions, hidden, in_place
from .eager import function_of, watched
from .logits import gradient_of_rows, gradient_storage

# Of a loss and a gate that are 0 beside any other, also where the target's probability is 0.
NOTHING = tsallis(1e30)


def without_objective(terms: Terms, spec: Spec) -> Spec:
    """Where a formula takes the place of the objective, smoothing and z-loss alone: to subtract another loss
    from a sum of all would lose digits, and leave inf - inf of a target of probability 0."""
    if terms.objective is None or not (spec.label_smoothing > 0 or spec.z_loss > 0):
        return spec
    return replace(spec, objective=replace(NOTHING, low=spec.objective.low, high=spec.objective.high))


def values_of(
    terms: Terms,
    rows: Tensor,
    labels: Tensor,
    ignore_index: int,
    vocabulary: int,
    which: slice | Tensor | None = None,
) -> Tensor:
    """[K, N], from packed rows, of the statistics that `terms` need; which: of all rows, those that these
    are."""
    stats = statistics_record(rows.detach(), labels.shape, vocabulary)._replace(alpha=None, gate=None)
    return terms.of(stats, labels != ignore_index, which)


def _with_terms(
    spec: Spec, rows: Tensor, loss: Tensor, own: Tensor, labels: Tensor, class_weight: Optional[Tensor]
) -> Tuple[Tensor, Tensor]:
    of_target = None if class_weight is None else class_weights(class_weight, labels, rows.dtype)
    return with_terms(spec, rows, loss, own, of_target)


@torch.library.custom_op("deft_kernels::row_loss_of_terms", mutates_args=())
def row_loss_of_terms(
    logits: Tensor,
    labels: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    loss: Tensor,
    own: Tensor,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor]:
    """(loss [N], rows), from those of the Spec's objective, which have to be those of these logits."""
    return _with_terms(decode(code, numbers), rows, loss, own, labels, class_weight)


@row_loss_of_terms.register_fake
def _(logits, labels, class_weight, rows, loss, own, code, numbers):
    return torch.empty_like(loss), torch.empty_like(rows)


def _setup_row_loss(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, class_weight, _, _, _, ctx.code, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, class_weight, output[1])


def _row_loss_backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
    logits, labels, class_weight, rows = ctx.saved_tensors
    spec = decode(ctx.code, ctx.numbers)
    return gradient_of_rows(logits, labels, class_weight, rows, dloss, spec), *[None] * 7


@torch.library.custom_op("deft_kernels::linear_row_loss_of_terms", mutates_args=())
def linear_row_loss_of_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    loss: Tensor,
    own: Tensor,
    wanted: List[bool],
    product: torch.dtype,
    budget: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor]:
    """`row_loss_of_terms` of the logits that the head makes."""
    return _with_terms(decode(code, numbers), rows, loss, own, labels, class_weight)


@linear_row_loss_of_terms.register_fake
def _(
    hidden, weight, bias, labels, class_weight, rows, loss, own, wanted, product, budget, code, numbers
):  # fmt: skip
    return torch.empty_like(loss), torch.empty_like(rows)


def _setup_linear(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, _, _, ctx.wanted, ctx.product, ctx.budget, ctx.code, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _linear_backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
    args = (dloss, ctx.wanted, ctx.product, ctx.budget, ctx.code, ctx.numbers)
    return hidden.given(hidden.gradient(*ctx.saved_tensors, *args), ctx.wanted, 13)


row_loss_of_terms.register_autograd(_row_loss_backward, setup_context=_setup_row_loss)
linear_row_loss_of_terms.register_autograd(_linear_backward, setup_context=_setup_linear)
row_loss = function_of(row_loss_of_terms, _setup_row_loss, _row_loss_backward)
linear_row_loss = function_of(linear_row_loss_of_terms, _setup_linear, _linear_backward)


class LossWithGradient(torch.autograd.Function):
    """The total and its gradient by the logits, made in the forward; for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        rows: Tensor,
        loss: Tensor,
        own: Tensor,
        spec: Spec,
    ) -> tuple[Tensor, Tensor]:
        loss, rows = _with_terms(spec, rows, loss, own, labels, class_weight)
        if spec.inplace and logits.dtype == torch.float16:
            in_place.warn_of_underflow()
        dlogits = gradient_storage(logits, spec)
        implementation(spec).gradient(logits, labels, class_weight, rows, row_scale, spec, dlogits)
        functions.keep(ctx, logits, labels, row_scale, class_weight, rows, dlogits, spec)
        return implementation(spec).weighted_total(loss, row_scale, rows), rows

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, _: Any) -> Any:
        return functions.kept_gradient(ctx, dtotal), *[None] * 7


class LinearLossWithGradient(torch.autograd.Function):
    """The total and its gradients by hidden, weight and bias with three products, as
    `hidden.linear_loss_with_gradient`, whose backward it has; for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Tensor | None,
        terms: Terms,
        wanted: list[bool],
        product: torch.dtype,
        budget: int,
        ignore_index: int,
        spec: Spec,
    ) -> tuple[Tensor, ...]:
        spec = without_objective(terms, spec)
        backend, vocabulary = implementation(spec), spec.vocabulary(weight.shape[0])
        of_all_ranks: Any = {"hidden": states, "budget": budget, "wanted": wanted[0], "row_scale": row_scale}
        args = (labels, product, class_weight, ignore_index, spec)
        validation.compare(spec.shard, weight.shape[0], *args, gradient_in_forward=True, **of_all_ranks)
        checks.check_label_range(labels, vocabulary, ignore_index)

        def of_rows(rows: Tensor, loss: Tensor, some: Tensor, which: slice | Tensor) -> tuple[Tensor, Tensor]:
            # So that weights which require a gradient show it: a forward has it disabled.
            with torch.enable_grad():
                own = values_of(terms, rows, some, ignore_index, vocabulary, which)
            return _with_terms(spec, rows, loss, own, some, class_weight)

        with hidden.outside_autocast(states):
            head = chunks.Head(states, weight, bias, product, budget, spec.shard)
            loss, rows, gradients = chunks.loss_of_terms_with_gradient(
                backend, head, labels, row_scale, class_weight, ignore_index, spec, wanted, of_rows
            )
            output = (backend.weighted_total(loss, row_scale, rows), rows, *gradients)
        inputs = (states, weight, bias, labels, row_scale, class_weight)
        settings = (wanted, product, budget, ignore_index, *spec.encode())
        hidden.setup_with_gradient(ctx, (*inputs, *settings), output)
        return output

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, *_: Any) -> Any:
        return hidden.with_gradient_backward(ctx, dtotal)


def loss(
    terms: Terms,
    logits: Tensor,
    labels: Tensor,
    weighting: Weighting,
    ignore_index: int,
    spec: Spec,
    *,
    in_forward: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, rows); the loss [N] for "none"."""
    spec = without_objective(terms, spec)
    vocabulary, classes = spec.vocabulary(logits.shape[-1]), weighting.class_weight
    with torch.no_grad():
        plain, rows = functions.row_loss(logits.detach(), labels, classes, ignore_index, spec)
    own = values_of(terms, rows, labels, ignore_index, vocabulary)
    if in_forward and torch.is_grad_enabled() and logits.requires_grad:
        if watched(logits, labels):
            raise ValueError(
                "grad_in_forward: not available where a call is traced, with objectives.weighted, an alpha "
                "that is a tensor, or an anchor"
            )
        scale = functions.row_scale(weighting, labels, ignore_index, logits.dtype, by_kernel=False)
        return LossWithGradient.apply(logits, labels, scale, classes, rows, plain, own, spec)
    losses, rows = row_loss(logits, labels, classes, rows, plain, own, *spec.encode())
    return weighting.reduce(losses, rows[Field.KEPT] != 0, labels), rows
