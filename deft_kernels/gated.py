"""`gated_loss`: the row formula alone, for statistics that were computed by other code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import objectives
from .backends.pytorch.objectives import evaluate, outside_band
from .core.arguments import kind_of
from .core.checks import check_dense, check_no_transform
from .core.groups import batch_mean
from .core.keywords import named
from .core.statistics import Field, loss_dtype
from .objectives import Objective


class RowFormula(torch.autograd.Function):
    """`evaluate` of the PyTorch backend and its derivatives; rows outside `valid` or the band are 0."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        collision: Tensor | None,
        entropy: Tensor | None,
        max_prob: Tensor | None,
        valid: Tensor,
        objective: Objective,
    ) -> Tensor:
        mean_prob: Tensor | float | None = objective.mean_prob
        if objective.needs_batch:
            mean_prob = batch_mean(logp, valid, objective.batch_group)
        given = {
            Field.LOGP: logp,
            Field.COLLISION: collision,
            Field.ENTROPY: entropy,
            Field.MAX_PROB: max_prob,
        }
        # A statistic that was not given is one that the formula does not read.
        value = evaluate(objective, {f: s for f, s in given.items() if s is not None}, mean_prob)
        kept = valid & ~outside_band(objective, logp.exp())
        derivatives = (value.d_logp, value.d_collision, value.d_entropy, value.d_max_prob)
        ctx.save_for_backward(kept, *derivatives)
        return value.loss.where(kept, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        # Not once_differentiable, which raises only when dloss itself has a graph.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gated_loss: the backward is not differentiable a second time (create_graph=True); "
                "deft_kernels.reference.row_objective is"
            )
        kept, *derivatives = ctx.saved_tensors
        # The product is masked, not a factor: an upstream of inf or NaN times 0 would be NaN.
        grads = (None if d is None else (d * dloss).where(kept, 0.0) for d in derivatives)
        return (*grads, None, None)


@named
def gated_loss(
    logp: Tensor,
    log_collision: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    max_prob: Tensor | None = None,
    objective: str | Objective = "deft",
    valid: Tensor | None = None,
) -> Tensor:
    """The row formula alone, where the statistics exist already; no kernel, any device.

        deft:  loss = (1 - p^alpha) / alpha,  alpha = exp(log_collision) = sum p^2,  dloss/dlogp = -p^alpha

    Args:
        logp: [...], log-probability of the target, nats.
        log_collision: [...], ln sum p^2 = -H_2; needed by "deft" and rational("collision").
        entropy: [...], Shannon entropy in nats; needed by deft(order=1) and "eaft".
        max_prob: [...], max p; needed by deft(order=inf).
        objective: a name or an Objective.
        valid: [...], bool; the rows over which `cayley` takes its mean p, and the rows that are not zero.
            Where it is False nothing is read and no gradient passes, NaN or infinite ones included.
    Returns: [...], each row's loss in the dtype of logp (fp32 for fp16 and bf16); rows outside a band on p,
        or not `valid`, are 0. Differentiable in logp, and through the gate in the statistics when the
        objective has detach=False.
    Raises: ValueError when the objective needs a statistic that is not given, or shapes differ; RuntimeError
        in a backward with create_graph=True.
    Source: arXiv:2602.11424.
    """
    described = objectives.resolve(objective)
    given = {"log_collision": log_collision, "entropy": entropy, "max_prob": max_prob}
    needed = {
        "collision": "log_collision",
        "shannon": "entropy",
        "entropy": "entropy",
        "max_prob": "max_prob",
    }
    name = needed.get(described.focus)
    if name is not None and given[name] is None:
        raise ValueError(f"{name}: needed by objective {described.name!r} with focus {described.focus!r}")
    if not isinstance(logp, Tensor) or not logp.is_floating_point():
        raise TypeError("logp: expected a floating Tensor")
    check_dense(logp, "logp")
    for key, tensor in (*given.items(), ("valid", valid)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{key}: expected a Tensor, got {kind_of(tensor)}")
        check_dense(tensor, key)
        if tensor.shape != logp.shape:
            raise ValueError(
                f"{key}: expected the shape of logp {tuple(logp.shape)}, got {tuple(tensor.shape)}"
            )
    for key, tensor in (("logp", logp), *given.items()):
        if tensor is not None:
            check_no_transform(tensor, key, "deft_kernels.reference has the formulas in plain PyTorch")
    dtype = loss_dtype(logp.dtype)
    mask = torch.ones_like(logp, dtype=torch.bool) if valid is None else valid.bool()

    def counted(statistic: Tensor | None) -> Tensor | None:
        """Zero where a row is not valid, so that exp and its derivative are finite, whatever the row
        holds."""
        if statistic is None:
            return None
        return statistic.to(dtype) if valid is None else statistic.to(dtype).where(mask, 0.0)

    collision = counted(log_collision)
    collision = None if collision is None else collision.exp()
    return RowFormula.apply(counted(logp), collision, counted(entropy), counted(max_prob), mask, described)
