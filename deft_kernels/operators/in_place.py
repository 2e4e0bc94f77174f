"""The gradient made in the forward, in the logits' own storage: a mutating operator and its Function."""

import warnings
from functools import lru_cache
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ..backends import implementation
from ..core import validation
from ..core.spec import decode
from ..core.statistics import Field, loss_dtype
from .logits import match_upstream_, no_double_backward

# Annotations as in `logits`.


@lru_cache(maxsize=1)
def warn_of_underflow() -> None:
    """Once. The backward could not say it: on a GPU the host does not know the upstream."""
    warnings.warn(
        "deft_kernels: inplace=True with grad_in_forward=True rounds the gradient to float16 before the loss "
        "scale is known: entries below 3e-8 are 0 already, and no loss scale brings them back. Leave "
        "grad_in_forward out, or use bfloat16",
        RuntimeWarning,
        stacklevel=2,
    )


@torch.library.custom_op("deft_kernels::row_loss_with_gradient_", mutates_args=("logits",))
def row_loss_with_gradient_(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Optional[Tensor],
    ignore_index: int,
    code: str,
    numbers: List[float],
) -> Tuple[Tensor, Tensor]:
    """`row_loss_with_gradient` that leaves the gradient in the logits' storage."""
    spec = decode(code, numbers)
    validation.admit(logits, labels, class_weight, ignore_index, spec, row_scale)
    if logits.dtype == torch.float16:
        warn_of_underflow()
    loss, rows = implementation(spec).row_loss_with_gradient(
        logits, labels, row_scale, class_weight, ignore_index, spec, logits
    )
    return implementation(spec).weighted_total(loss, row_scale, rows), rows


@row_loss_with_gradient_.register_fake
def _(logits, labels, row_scale, class_weight, ignore_index, code, numbers):
    dtype, count = loss_dtype(logits.dtype), labels.shape[0]
    return logits.new_empty((), dtype=dtype), logits.new_empty((len(Field), count), dtype=dtype)


def version_of(dlogits: Tensor) -> Optional[int]:
    """None where nobody counts: in a trace, which sees the writes itself, and in inference mode."""
    return None if torch.compiler.is_compiling() or dlogits.is_inference() else dlogits._version


def check_in_place_backward(dlogits: Optional[Tensor], version: Optional[int]) -> None:
    """version: `version_of` the gradient when the forward had made it."""
    # once_differentiable raises only when the upstream itself has a graph.
    if torch.is_grad_enabled():
        no_double_backward()
    if dlogits is None:
        raise RuntimeError("inplace: the logits' storage held the gradient, which a first backward took")
    if version is not None and version_of(dlogits) not in (None, version):
        raise RuntimeError(
            "inplace: with grad_in_forward=True the logits' storage holds their gradient, but was written to "
            "before the backward; a second loss of the same logits writes there, too"
        )


class InPlaceLoss(torch.autograd.Function):
    """Loss whose forward leaves the gradient in the logits' storage; the version counter moves with it.

    An operator cannot return a tensor that it mutates, so this one wraps the mutating operator.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        row_scale: Tensor,
        class_weight: Optional[Tensor],
        ignore_index: int,
        code: str,
        numbers: List[float],
    ) -> Tuple[Tensor, Tensor]:
        overwritten = logits.detach()
        args = (labels, row_scale, class_weight, ignore_index, code, numbers)
        total, rows = row_loss_with_gradient_(overwritten, *args)
        ctx.mark_non_differentiable(rows)
        ctx.save_for_backward(labels, row_scale, class_weight, rows)
        ctx.dlogits, ctx.code, ctx.numbers = overwritten, code, numbers
        ctx.version = version_of(overwritten)
        return total, rows

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, _: Any) -> Any:
        labels, row_scale, class_weight, rows = ctx.saved_tensors
        dlogits, ctx.dlogits = ctx.dlogits, None
        check_in_place_backward(dlogits, ctx.version)
        match_upstream_(dlogits, dtotal, None, labels, row_scale, class_weight, rows, ctx.code, ctx.numbers)
        return dlogits, None, None, None, None, None, None
