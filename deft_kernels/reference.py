"""The oracle: every formula written the slow, obvious way over whole [N, V] tensors, gradients by autograd.

Float64-capable, differentiable as often as PyTorch can, and it shares no code with what it judges: from an
`Objective` it reads only the fields that say which formula is meant. It is slow and uses much memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def transformed(logits: Tensor, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    """softcap * tanh(x / softcap), then / temperature; in fp32 at least."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def statistics(z: Tensor, labels: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """logp, lse, collision, entropy, max_prob, correct, predicted of transformed z [N, V]; labels [N]."""
    target = labels.masked_fill(labels == ignore_index, 0)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    # p log p at p = 0 is 0; where() twice keeps inf out of the backward as well.
    positive = p > 0
    p_log_p = torch.where(positive, p * torch.where(positive, log_p, 0.0), torch.where(p.isnan(), p, 0.0))
    z_target = z.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    max_prob = p.amax(-1)
    return {
        "logp": log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        "lse": torch.logsumexp(z, dim=-1),
        "collision": (p * p).sum(-1),
        "entropy": -p_log_p.sum(-1),
        "max_prob": max_prob,
        "correct": z_target >= z.amax(-1),
        "predicted": z.detach().argmax(-1).masked_fill(max_prob.isnan(), -1),
    }


def without_ignored(stats: dict[str, Tensor], valid: Tensor) -> dict[str, Tensor]:
    """The statistics, 0 where a row is not `valid`, and the predicted class -1."""
    return {
        name: value.masked_fill(~valid, -1 if name == "predicted" else 0) for name, value in stats.items()
    }


def row_objective(objective: Any, stats: dict[str, Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, alpha, gate) of each row, before weights, smoothing and z-loss; the table of `objectives`."""

    def held(value: Tensor) -> Tensor:
        return value.detach() if objective.detach else value

    logp = stats["logp"]
    p = logp.exp()
    impossible = torch.isinf(logp)  # a target of probability 0: the limits of the formulas
    finite = logp.masked_fill(impossible, 0.0)

    if objective.focus == "given":
        seen = logp.masked_fill((objective.weight == 0) & impossible, 0.0)
        return objective.weight * -seen, torch.zeros_like(logp), objective.weight
    if objective.focus == "prob":
        return (held(p) * -finite).masked_fill(impossible, 0.0), torch.ones_like(logp), p
    if objective.focus == "entropy":
        weight = (stats["entropy"].clamp(min=0) / math.log(objective.top_k)) ** objective.power
        # A row of entropy 0 has weight 0, and an impossible target there is 0 * inf.
        seen = logp.masked_fill((weight == 0) & impossible, 0.0)
        return held(weight) * -seen, torch.zeros_like(logp), weight

    if objective.focus == "given alpha":
        alpha = objective.alpha.to(logp).reshape(-1).expand_as(logp)
        zero = alpha == 0
        divisor = alpha.masked_fill(zero, 1.0)
        power = torch.where(impossible, 0.0, torch.exp(alpha * finite))
        loss = torch.where(impossible, 1 / divisor, -torch.expm1(alpha * finite) / divisor)
        return torch.where(zero, -logp, loss), alpha, power.masked_fill(zero, 1.0)
    if objective.focus == "fixed":
        alpha = torch.full_like(logp, objective.alpha)
    elif objective.focus == "collision":
        alpha = held(stats["collision"])
    elif objective.focus == "shannon":
        alpha = held(torch.exp(-stats["entropy"]))
    elif objective.focus == "max_prob":
        alpha = held(stats["max_prob"])
    elif objective.focus == "cayley":
        mean_prob = objective.mean_prob
        if mean_prob is None:
            known = valid & ~p.isnan()
            mean_prob = p.detach().where(known, 0.0).sum() / known.sum().clamp(min=1)
        floor = 0.5 * mean_prob
        radius = 1 - held(p) + objective.eps
        local = (1 - radius) / (1 + radius + objective.eps)
        alpha = (floor + (1 - floor) * local).clamp(0.001, 1.0)
    else:
        raise ValueError(f"objective: no reference for {objective!r}")

    if objective.family == "rational":
        loss = -finite / (1 - alpha * finite)
        gate = (1 - alpha * logp) ** -2
        return torch.where(impossible, 1 / alpha, loss), alpha, gate
    if objective.focus == "fixed" and objective.alpha == 0.0:
        return -logp, alpha, torch.ones_like(logp)
    power = torch.where(impossible, 0.0, torch.exp(alpha * finite))
    damped = alpha + objective.eps
    # expm1, as 1 - p^alpha itself would lose every digit of a confident row, in any precision.
    loss = torch.where(impossible, 1 / damped, -torch.expm1(alpha * finite) / damped)
    return loss, alpha, power * alpha / damped


def loss(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: Any,
    reduction: str = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    anchor: float = 0.0,
    reference_logp: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, statistics) of logits [..., V] and labels [...]; keywords as in `deft_loss`.

    Statistics have the labels' shape and carry alpha and gate beside those of `statistics`.
    """
    vocabulary = logits.shape[-1]
    shape, labels = labels.shape, labels.reshape(-1)
    z = transformed(logits, softcap, temperature).reshape(-1, vocabulary)
    valid = labels != ignore_index
    target = labels.masked_fill(~valid, 0)
    # Ignored rows may hold anything, even NaN; they must not reach the sum or its gradient.
    z = z.masked_fill(~valid.unsqueeze(-1), 0.0)
    stats = statistics(z, labels, ignore_index)
    rows, stats["alpha"], stats["gate"] = row_objective(objective, stats, valid)
    p = stats["logp"].exp()
    outside = (p < objective.low) | (p > objective.high)
    stats["gate"] = stats["gate"].masked_fill(outside, 0.0)
    kept = valid & ~outside

    row_weight = torch.ones_like(rows) if weight is None else weight.to(rows.dtype)[target]
    rows = (1 - label_smoothing) * row_weight * rows
    if label_smoothing > 0:
        log_p = F.log_softmax(z, dim=-1)
        if weight is None:
            smooth = -log_p.sum(-1)
        else:
            smooth = -torch.where(weight == 0, 0.0, weight.to(z.dtype) * log_p).sum(-1)
        rows = rows + label_smoothing / vocabulary * smooth
    if z_loss > 0:
        rows = rows + z_loss * stats["lse"] ** 2
    if reference_logp is not None:
        ratio = (reference_logp.reshape(-1).to(rows.dtype) - stats["logp"]).masked_fill(~valid, 0.0)
        rows = rows + anchor * (torch.expm1(ratio) - ratio)
    rows = torch.where(kept, rows, 0.0)
    if token_weight is not None:
        # Padding may hold NaN in the token weights, as in the logits.
        rows = rows * torch.where(kept, token_weight.reshape(-1).to(rows.dtype), 0.0)

    stats = {name: value.detach().reshape(shape) for name, value in without_ignored(stats, valid).items()}
    if reduction == "none":
        return rows.reshape(shape), stats
    total = rows.sum()
    if reduction == "sum":
        return total, stats
    # Without a row that counts a mean is 0, whatever it would be divided by.
    none = (~kept.any()).to(rows.dtype)
    if num_items is not None:
        return total / (num_items + none), stats
    count = torch.where(kept, row_weight, 0.0).sum()
    # Rows whose class weights sum to 0 have no mean, as in F.cross_entropy.
    count = torch.where(count == 0, math.nan, count)
    return total / torch.where(kept.any(), count, 1.0), stats
