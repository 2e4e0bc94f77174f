"""The operators of the loss from hidden states, registered as those of `logits`, and their backward.

hidden is [N, D], labels are flat. `product` is the dtype of the matrix products, `budget` the bytes of the
chunk buffer, `wanted` says which gradients of (hidden, weight, bias) to make.
"""

from dataclasses import replace
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .. import objectives
from ..backends import implementation
from ..backends.interface import Backend
from ..backends.pytorch.finish import gradient_fields
from ..core import checks, validation
from ..core.spec import decode
from ..core.statistics import Field, loss_dtype
from . import chunks
from .chunks import Head
from .eager import function_of, of_batch, watched
from .logits import no_double_backward, save_nothing


def outside_autocast(hidden: Tensor) -> torch.autocast:
    """The products' dtype is decided already: autocast must not choose another one inside the operator."""
    return torch.autocast(hidden.device.type, enabled=False)


def _results(hidden: Tensor, product: torch.dtype) -> Tuple[Tensor, Tensor]:
    dtype = loss_dtype(product)
    count = hidden.shape[0]
    return hidden.new_empty(count, dtype=dtype), hidden.new_empty((len(Field), count), dtype=dtype)


def _gradients(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], wanted: List[bool]) -> Any:
    inputs = (hidden, weight, hidden if bias is None else bias)
    return tuple(x.new_empty(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True))


@torch.library.custom_op("deft_kernels::linear_row_loss", mutates_args=())
def linear_row_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    class_weight: Optional[Tensor],
    wanted: List[bool],
    product: torch.dtype,
    budget: int,
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor]:
    """(loss [N], rows [len(Field), N]) of every row; `wanted` is for the backward."""
    spec = decode(code, numbers)
    of_all_ranks: Any = {"hidden": hidden, "budget": budget, "wanted": wanted[0]}
    args = (labels, product, class_weight, ignore_index, spec)
    validation.compare(spec.shard, weight.shape[0], *args, **of_all_ranks)
    checks.check_label_range(labels, spec.vocabulary(weight.shape[0]), ignore_index)
    with outside_autocast(hidden):
        head = Head(hidden, weight, bias, product, budget, spec.shard)
        return chunks.row_loss(implementation(spec), head, labels, class_weight, ignore_index, spec)


@linear_row_loss.register_fake
def _(hidden, weight, bias, labels, class_weight, wanted, product, budget, ignore_index, code, numbers):
    return _results(hidden, product)


@torch.library.custom_op("deft_kernels::linear_loss_with_gradient", mutates_args=())
def linear_loss_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Optional[Tensor],
    wanted: List[bool],
    product: torch.dtype,
    budget: int,
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(sum_i row_scale_i loss_i, rows, its gradients by hidden, weight and bias)."""
    spec = decode(code, numbers)
    of_all_ranks: Any = {"hidden": hidden, "budget": budget, "wanted": wanted[0], "row_scale": row_scale}
    args = (labels, product, class_weight, ignore_index, spec)
    validation.compare(spec.shard, weight.shape[0], *args, gradient_in_forward=True, **of_all_ranks)
    checks.check_label_range(labels, spec.vocabulary(weight.shape[0]), ignore_index)
    with outside_autocast(hidden):
        head = Head(hidden, weight, bias, product, budget, spec.shard)
        loss, rows, gradients = chunks.loss_with_gradient(
            implementation(spec), head, labels, row_scale, class_weight, ignore_index, spec, wanted
        )
        return (implementation(spec).weighted_total(loss, row_scale, rows), rows, *gradients)


@linear_loss_with_gradient.register_fake
def _(
    hidden,
    weight,
    bias,
    labels,
    row_scale,
    class_weight,
    wanted,
    product,
    budget,
    ignore_index,
    code,
    numbers,
):
    loss, rows = _results(hidden, product)
    return loss.new_empty(()), rows, *_gradients(hidden, weight, bias, wanted)


@torch.library.custom_op("deft_kernels::linear_gradient", mutates_args=())
def linear_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    class_weight: Optional[Tensor],
    rows: Tensor,
    dloss: Tensor,
    wanted: List[bool],
    product: torch.dtype,
    budget: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias for an upstream `dloss` [N]; makes the logits again."""
    spec = decode(code, numbers)
    with outside_autocast(hidden):
        head = Head(hidden, weight, bias, product, budget, spec.shard)
        return chunks.gradient(implementation(spec), head, labels, class_weight, rows, dloss, spec, wanted)


@linear_gradient.register_fake
def _(hidden, weight, bias, labels, class_weight, rows, dloss, wanted, product, budget, code, numbers):
    return _gradients(hidden, weight, bias, wanted)


@torch.library.custom_op("deft_kernels::linear_statistics", mutates_args=())
def linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    labels: Tensor,
    wanted: List[bool],
    product: torch.dtype,
    budget: int,
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, lse, collision, entropy, max_prob), each [N], and rows; differentiable in the first five."""
    args = (hidden, weight, bias, labels, None, wanted, product, budget, ignore_index, code, numbers)
    _, rows = linear_row_loss._init_fn(*args)
    picked = (Field.LOGP, Field.LSE, Field.COLLISION, Field.ENTROPY, Field.MAX_PROB)
    logp, lse, collision, entropy, max_prob = (rows[field].clone() for field in picked)
    return logp, lse, collision, entropy, max_prob, rows


@linear_statistics.register_fake
def _(hidden, weight, bias, labels, wanted, product, budget, ignore_index, code, numbers):
    vectors = (_results(hidden, product)[0] for _ in range(5))
    return (*vectors, _results(hidden, product)[1])


def gradient(hidden: Tensor, *args: Any) -> Any:
    """`linear_gradient`; by the operator if the call is `watched`, or if its own backward has to raise."""
    tensors = (x for x in args if isinstance(x, Tensor))
    if torch.is_grad_enabled() or watched(hidden, *tensors):
        return linear_gradient(hidden, *args)
    return linear_gradient._init_fn(hidden, *args)


def given(gradients: Any, wanted: List[bool], inputs: int) -> Any:
    """What autograd expects of a backward: a gradient or None for each of the operator's `inputs`."""
    made = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (*made, *[None] * (inputs - 3))


def _setup_row_loss(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.wanted, ctx.product, ctx.budget, _, ctx.code, ctx.numbers = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _row_loss_backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
    args = (dloss, ctx.wanted, ctx.product, ctx.budget, ctx.code, ctx.numbers)
    return given(gradient(*ctx.saved_tensors, *args), ctx.wanted, 11)


def setup_with_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.wanted, ctx.product, ctx.budget, _, ctx.code, ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, output[1])
    # Not read from the saved tensors: that would unpack hidden, too, which checkpointing computes again.
    ctx.kept, ctx.gradients = output[1][Field.KEPT], output[2:]


def with_gradient_backward(ctx: Any, dtotal: Optional[Tensor], *_: Any) -> Any:
    if dtotal is None:
        return (None,) * 12
    # With no other reference to the tensors, autograd keeps them as .grad without a copy.
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None and type(gradients[0]) is not Tensor:
        # A traced backward may not overwrite what its forward returned.
        scaled = [gradient * dtotal for gradient in gradients]
        if ctx.wanted[0]:
            scaled[0] = scaled[0].where(ctx.kept.unsqueeze(1) != 0, 0.0)
        return given(scaled, ctx.wanted, 12)
    if gradients is None or torch.is_grad_enabled() or of_batch(dtotal):
        # An earlier backward took them; or create_graph=True, with which `linear_gradient` raises; or a batch
        # of upstreams.
        hidden, weight, bias, labels, row_scale, class_weight, rows = ctx.saved_tensors
        dloss = (dtotal * row_scale).to(rows.dtype)
        args = (rows, dloss, ctx.wanted, ctx.product, ctx.budget, ctx.code, ctx.numbers)
        gradients = gradient(hidden, weight, bias, labels, class_weight, *args)
        return given(gradients, ctx.wanted, 12)
    backend = implementation(decode(ctx.code, ctx.numbers))
    scale_(gradients[0], dtotal, backend, ctx.kept)
    scale_(gradients[1], dtotal, backend)
    scale_(gradients[2], dtotal, backend)
    return given(gradients, ctx.wanted, 12)


def scale_(gradient: Tensor, upstream: Tensor, backend: Backend, kept: Optional[Tensor] = None) -> None:
    """gradient *= upstream, unchanged if that is 1; on a GPU the device decides, without waiting.

    kept: which rows of hidden's gradient count; the others stay 0, whatever the upstream.
    """
    if gradient.numel() > 0:
        backend.scale(gradient, upstream, kept)


def _setup_statistics(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.wanted, ctx.product, ctx.budget, _, ctx.code, ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(*tensors, output[5])


def _statistics_backward(ctx: Any, *upstream: Any) -> Any:
    hidden, weight, bias, labels, rows = ctx.saved_tensors
    spec = decode(ctx.code, ctx.numbers)
    d_logp, d_lse, d_collision, d_entropy, d_max_prob, _ = upstream
    if all(d is None for d in upstream):
        return (None,) * 10
    rows = gradient_fields(rows, d_logp, d_lse, d_collision, d_entropy, d_max_prob, spec.temperature)
    code, numbers = replace(spec, objective=objectives.of_statistics(d_max_prob is not None)).encode()
    args = (rows, torch.ones_like(rows[0]), ctx.wanted, ctx.product, ctx.budget, code, numbers)
    return given(gradient(hidden, weight, bias, labels, None, *args), ctx.wanted, 10)


linear_row_loss.register_autograd(_row_loss_backward, setup_context=_setup_row_loss)
linear_loss_with_gradient.register_autograd(with_gradient_backward, setup_context=setup_with_gradient)
linear_statistics.register_autograd(_statistics_backward, setup_context=_setup_statistics)
linear_gradient.register_autograd(no_double_backward, setup_context=save_nothing)

row_loss = function_of(linear_row_loss, _setup_row_loss, _row_loss_backward)
loss_with_gradient = function_of(linear_loss_with_gradient, setup_with_gradient, with_gradient_backward)
statistics = function_of(linear_statistics, _setup_statistics, _statistics_backward)
