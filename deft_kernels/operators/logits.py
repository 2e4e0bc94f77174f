"""The operators of the package, registered with torch.library, and their hand-written backward.

They are registered so that torch.compile needs no graph break, and so that opcheck can check the schema, the
shape functions and the autograd rule. Plain eager calls use the Functions of `functions` and `eager`, which
are quicker. Settings are passed as (code, numbers), see `core/spec.py`. Labels are flat, int64, [N]; logits
[..., V] keep their shape and strides.
"""

from dataclasses import replace
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .. import objectives
from ..backends import implementation
from ..backends.pytorch.finish import gradient_fields
from ..core import validation
from ..core.spec import Spec, decode
from ..core.statistics import Field, loss_dtype
from .eager import function_of, watched

# torch.library infers an operator's schema from annotations, so they are spelled with `typing` here.


@torch.library.custom_op("deft_kernels::row_loss", mutates_args=())
def row_loss(
    logits: Tensor,
    labels: Tensor,
    class_weight: Optional[Tensor],
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor]:
    """(loss [N], rows [len(Field), N]) of every row."""
    spec = decode(code, numbers)
    validation.admit(logits, labels, class_weight, ignore_index, spec)
    return implementation(spec).row_loss(logits, labels, class_weight, ignore_index, spec)


@row_loss.register_fake
def _(logits, labels, class_weight, ignore_index, code, numbers):
    dtype, count = loss_dtype(logits.dtype), labels.shape[0]
    return logits.new_empty(count, dtype=dtype), logits.new_empty((len(Field), count), dtype=dtype)


@torch.library.custom_op("deft_kernels::row_loss_with_gradient", mutates_args=())
def row_loss_with_gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Optional[Tensor],
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    """(sum_i row_scale_i loss_i, rows, its gradient by the logits), in one visit to the logits."""
    spec = decode(code, numbers)
    validation.admit(logits, labels, class_weight, ignore_index, spec, row_scale)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    loss, rows = implementation(spec).row_loss_with_gradient(
        logits, labels, row_scale, class_weight, ignore_index, spec, dlogits
    )
    return implementation(spec).weighted_total(loss, row_scale, rows), rows, dlogits


@row_loss_with_gradient.register_fake
def _(logits, labels, row_scale, class_weight, ignore_index, code, numbers):
    dtype, count = loss_dtype(logits.dtype), labels.shape[0]
    rows = logits.new_empty((len(Field), count), dtype=dtype)
    return logits.new_empty((), dtype=dtype), rows, logits.new_empty(logits.shape)


@torch.library.custom_op("deft_kernels::logits_gradient", mutates_args=())
def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    dloss: Tensor,
    code: str,
    numbers: List[float],
) -> Tensor:
    """Gradient by the logits for an upstream `dloss` [N], in the logits' dtype, contiguous."""
    spec = decode(code, numbers)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    implementation(spec).gradient(logits, labels, class_weight, rows, dloss, spec, dlogits)
    return dlogits


@logits_gradient.register_fake
def _(logits, labels, class_weight, rows, dloss, code, numbers):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("deft_kernels::logits_gradient_", mutates_args=("logits",))
def logits_gradient_(
    logits: Tensor,
    labels: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    dloss: Tensor,
    code: str,
    numbers: List[float],
) -> None:
    """`logits_gradient` that overwrites the logits with it."""
    spec = decode(code, numbers)
    implementation(spec).gradient(logits, labels, class_weight, rows, dloss, spec, logits)


@torch.library.custom_op("deft_kernels::match_upstream_", mutates_args=("dlogits",))
def match_upstream_(
    dlogits: Tensor,
    upstream: Tensor,
    logits: Optional[Tensor],
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    code: str,
    numbers: List[float],
) -> None:
    """Turn a gradient that the forward made for an upstream of 1 into the gradient for a scalar `upstream`.

    Nothing is done when it is 1. Where scaling would round a second time, the gradient is computed again from
    the logits; if they were overwritten, it is scaled.
    """
    spec = decode(code, numbers)
    implementation(spec).match_upstream(
        dlogits, upstream, logits, labels, row_scale, class_weight, rows, spec
    )


@torch.library.custom_op("deft_kernels::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor, labels: Tensor, ignore_index: int, code: str, numbers: List[float]
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, collision, entropy, max_prob), each [N], and rows; differentiable in the first five."""
    spec = decode(code, numbers)
    validation.admit(logits, labels, None, ignore_index, spec)
    _, rows = implementation(spec).row_loss(logits, labels, None, ignore_index, spec)
    picked = (Field.LOGP, Field.LSE, Field.COLLISION, Field.ENTROPY, Field.MAX_PROB)
    logp, lse, collision, entropy, max_prob = (rows[field].clone() for field in picked)
    return logp, lse, collision, entropy, max_prob, rows


@row_statistics.register_fake
def _(logits, labels, ignore_index, code, numbers):
    dtype, count = loss_dtype(logits.dtype), labels.shape[0]
    vectors = (logits.new_empty(count, dtype=dtype) for _ in range(5))
    return (*vectors, logits.new_empty((len(Field), count), dtype=dtype))


def scalar_upstream(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient that the forward left on `ctx`, for this upstream; computed again if an earlier backward
    took it.

    Also computed again with create_graph=True: the stored tensor has no history, so a second derivative would
    silently be missing, but `logits_gradient` raises.
    """
    logits, labels, row_scale, class_weight, rows = ctx.saved_tensors
    # With no other reference to the tensor, autograd keeps it as .grad without a copy.
    dlogits, ctx.dlogits = ctx.dlogits, None
    # Under a tracer too: a traced backward may not overwrite what its forward returned.
    traced = type(dlogits) is not Tensor
    if traced or torch.is_grad_enabled():
        upstream_rows = (upstream * row_scale).to(rows.dtype)
        return logits_gradient(logits, labels, class_weight, rows, upstream_rows, ctx.code, ctx.numbers)
    args = (upstream, logits, labels, row_scale, class_weight, rows, ctx.code, ctx.numbers)
    match_upstream_(dlogits, *args)
    return dlogits


def no_double_backward(*_: Any) -> None:
    raise RuntimeError(
        "deft_kernels: the backward is not differentiable a second time (create_graph=True); "
        'use backend="reference" for second derivatives'
    )


def save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _setup_row_loss(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, class_weight, _, ctx.code, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, class_weight, output[1])


def gradient_storage(logits: Tensor, spec: Spec) -> Tensor:
    """A new tensor for the gradient, or the logits' storage; a later use of the logits then raises."""
    if not spec.inplace:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    overwritten = logits.detach()  # shares storage and version counter
    torch.autograd.graph.increment_version(overwritten)
    return overwritten


def gradient_of_rows(
    logits: Tensor, labels: Tensor, class_weight: Optional[Tensor], rows: Tensor, dloss: Tensor, spec: Spec
) -> Tensor:
    """The gradient by the logits for an upstream `dloss` [N], with `inplace` in the logits' storage."""
    if not torch.is_grad_enabled() and not watched(logits, dloss):
        dlogits = gradient_storage(logits, spec)
        implementation(spec).gradient(logits, labels, class_weight, rows, dloss, spec, dlogits)
        return dlogits
    args = (labels, class_weight, rows, dloss, *spec.encode())
    if not spec.inplace:
        # With create_graph=True its own backward is the one that raises.
        return logits_gradient(logits, *args)
    if torch.is_grad_enabled():
        no_double_backward()
    # detach shares storage and version counter: a later use of the logits raises.
    overwritten = logits.detach()
    logits_gradient_(overwritten, *args)
    return overwritten


def _row_loss_backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
    logits, labels, class_weight, rows = ctx.saved_tensors
    dlogits = gradient_of_rows(logits, labels, class_weight, rows, dloss, decode(ctx.code, ctx.numbers))
    return dlogits, None, None, None, None, None


def _setup_with_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, row_scale, class_weight, _, ctx.code, ctx.numbers = inputs
    # Without this autograd would hand the backward an [N, V] tensor of zeros for the gradient output.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(logits, labels, row_scale, class_weight, output[1])
    ctx.dlogits = output[2]


def _with_gradient_backward(ctx: Any, dtotal: Optional[Tensor], *_: Any) -> Any:
    dlogits = None if dtotal is None else scalar_upstream(ctx, dtotal)
    return dlogits, None, None, None, None, None, None


def _setup_statistics(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, _, ctx.code, ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(logits, labels, output[5])


def _statistics_backward(ctx: Any, *upstream: Any) -> Any:
    logits, labels, rows = ctx.saved_tensors
    spec = decode(ctx.code, ctx.numbers)
    d_logp, d_lse, d_collision, d_entropy, d_max_prob, _ = upstream
    if all(d is None for d in upstream):
        return None, None, None, None, None
    rows = gradient_fields(rows, d_logp, d_lse, d_collision, d_entropy, d_max_prob, spec.temperature)
    spec = replace(spec, objective=objectives.of_statistics(d_max_prob is not None))
    dlogits = gradient_of_rows(logits, labels, None, rows, torch.ones_like(rows[0]), spec)
    return dlogits, None, None, None, None


row_loss.register_autograd(_row_loss_backward, setup_context=_setup_row_loss)
row_loss_with_gradient.register_autograd(_with_gradient_backward, setup_context=_setup_with_gradient)
row_statistics.register_autograd(_statistics_backward, setup_context=_setup_statistics)
logits_gradient.register_autograd(no_double_backward, setup_context=save_nothing)
statistics = function_of(row_statistics, _setup_statistics, _statistics_backward)
