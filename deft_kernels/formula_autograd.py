"""The row formula as a differentiable function of statistics that came from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .formulas import cayley_mean, evaluate
from .objectives import Objective


class RowFormula(torch.autograd.Function):
    """`formulas.evaluate` with its hand-written derivatives; rows outside `valid` or the band are 0."""

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
            mean_prob = cayley_mean(logp, valid)
        # A statistic that was not given is one that the formula does not read.
        given = [logp if s is None else s for s in (collision, entropy, max_prob)]
        value = evaluate(objective, logp, given[0], given[1], given[2], mean_prob)
        p = logp.exp()
        kept = valid & ~((p < objective.low) | (p > objective.high))
        derivatives = (value.d_logp, value.d_collision, value.d_entropy, value.d_max_prob)
        ctx.save_for_backward(*(None if d is None else d.masked_fill(~kept, 0.0) for d in derivatives))
        return value.loss.masked_fill(~kept, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> Any:
        grads = (None if d is None else d * dloss for d in ctx.saved_tensors)
        return (*grads, None, None)
