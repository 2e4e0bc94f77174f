"""The row formulas in PyTorch: an objective's loss and exact derivatives, and the gradient's coefficients.

Written by hand, without autograd: at small alpha the derivative through the gate is a difference of nearly
equal numbers, and a target of probability 0 makes 0 * inf. `triton/objectives.py` has the same for the
kernels; the test oracle (`reference.py`) differentiates the plain formulas in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.statistics import Field, Fields
from ...objectives import Objective

LN2 = math.log(2.0)
ALPHA_MIN, ALPHA_MAX = 0.001, 1.0


class Evaluation(NamedTuple):
    """Loss of each row and its derivatives by the statistics; None stands for a derivative that is zero."""

    loss: Tensor
    alpha: Tensor
    gate: Tensor
    d_logp: Tensor
    d_collision: Tensor | None = None
    d_entropy: Tensor | None = None
    d_max_prob: Tensor | None = None


def outside_band(objective: Objective, p: Tensor) -> Tensor:
    """Rows whose p lies outside the objective's band. A NaN counts as inside, so that it stays visible."""
    return (p < objective.low) | (p > objective.high)


def sharpening(x: Tensor) -> Tensor:
    """x e^x - expm1(x) for x <= 0, without cancellation: x^2/2 + x^3/3 + x^4/8 + ... near 0, 1 at -inf."""
    powers = (0.5, 1 / 3, 1 / 8, 1 / 30, 1 / 144, 1 / 840, 1 / 5760, 1 / 45360)
    series = torch.zeros_like(x)
    for coefficient in reversed(powers):
        series = series * x + coefficient
    direct = x.clamp(min=-1e4) * torch.exp(x) - torch.expm1(x)
    switch = -0.3 if x.dtype == torch.float32 else -0.02
    return torch.where(x > switch, series * x * x, direct)


def cayley_alpha(p: Tensor, floor: Tensor | float, eps: float) -> tuple[Tensor, Tensor]:
    """The Cayley focus index and d alpha / d p, `eps` placed as in the authors' trainer."""
    denominator = 2.0 - p + 2.0 * eps
    raw = floor + (1.0 - floor) * (p - eps) / denominator
    slope = (1.0 - floor) * (2.0 + eps) / (denominator * denominator)
    inside = (raw >= ALPHA_MIN) & (raw <= ALPHA_MAX)
    return raw.clamp(ALPHA_MIN, ALPHA_MAX), torch.where(inside, slope, 0.0)


def evaluate(objective: Objective, fields: Fields, mean_prob: Tensor | float | None = None) -> Evaluation:
    """Loss, focus index, gate and derivatives of each row from its statistics; formulas in `objectives`."""
    logp = fields[Field.LOGP]
    if objective.family == "weighted":
        return _weighted(objective, fields)
    slope: Tensor | None = None
    if objective.focus == "fixed":
        alpha = torch.full_like(logp, objective.alpha)
    elif objective.focus == "collision":
        alpha = fields[Field.COLLISION]
    elif objective.focus == "shannon":
        alpha = torch.exp(-fields[Field.ENTROPY])
    elif objective.focus == "max_prob":
        alpha = fields[Field.MAX_PROB]
    else:
        assert mean_prob is not None
        p = logp.exp()
        alpha, slope = cayley_alpha(p, 0.5 * mean_prob, objective.eps)
        slope = slope * p

    if objective.family == "deformed":
        loss, gate, d_alpha = _deformed(logp, alpha, objective)
    else:
        loss, gate, d_alpha = _rational(logp, alpha)
    if objective.detach or d_alpha is None or objective.focus == "fixed":
        return Evaluation(loss, alpha, gate, -gate)
    if objective.focus == "collision":
        return Evaluation(loss, alpha, gate, -gate, d_collision=d_alpha)
    if objective.focus == "shannon":
        return Evaluation(loss, alpha, gate, -gate, d_entropy=-d_alpha * alpha)
    if objective.focus == "max_prob":
        return Evaluation(loss, alpha, gate, -gate, d_max_prob=d_alpha)
    assert slope is not None
    return Evaluation(loss, alpha, gate, d_alpha * slope - gate)


def _deformed(logp: Tensor, alpha: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor | None]:
    if objective.focus == "fixed" and objective.alpha == 0.0:
        return -logp, torch.ones_like(logp), None
    x = alpha * logp
    weight = alpha + objective.eps
    gate = torch.exp(x)
    loss = -torch.expm1(x) / weight
    d_alpha = None
    if not objective.detach and objective.focus != "fixed":
        # eps leaves a second term; logp e^x is 0 for a target of probability 0.
        rest = objective.eps * torch.where(gate == 0, 0.0, logp * gate)
        d_alpha = -(sharpening(x) + rest) / (weight * weight)
    return loss, gate if objective.eps == 0.0 else gate * (alpha / weight), d_alpha


def _rational(logp: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    gate = (1.0 - alpha * logp).reciprocal()
    loss = torch.where(torch.isinf(logp), alpha.reciprocal(), -logp * gate)
    gate = torch.where(torch.isinf(logp) & (alpha == 0), 1.0, gate)
    return loss, gate * gate, -loss * loss


def _weighted(objective: Objective, fields: Fields) -> Evaluation:
    logp = fields[Field.LOGP]
    if objective.focus == "prob":
        weight = logp.exp()
        # p ln p tends to 0 with p.
        loss = torch.where(weight == 0, 0.0, -weight * logp)
        d_logp = -weight if objective.detach else loss - weight
        return Evaluation(loss, torch.ones_like(logp), weight, d_logp)
    entropy = fields[Field.ENTROPY]
    ratio = entropy.clamp(min=0.0) / math.log(objective.top_k)
    weight = ratio.pow(objective.power)
    # A row of entropy 0 has weight 0, and an impossible target there is 0 * inf.
    seen = torch.where(weight == 0, 0.0, logp)
    loss = -weight * seen
    if objective.detach:
        return Evaluation(loss, torch.zeros_like(logp), weight, -weight)
    slope = torch.where(entropy <= 0, 0.0, objective.power * weight / entropy)
    return Evaluation(loss, torch.zeros_like(logp), weight, -weight, d_entropy=-slope * seen)


def coefficients(
    rows: Fields,
    d_logp: Tensor,
    d_lse: Tensor | None = None,
    d_collision: Tensor | None = None,
    d_entropy: Tensor | None = None,
    d_max_prob: Tensor | None = None,
    *,
    temperature: float = 1.0,
    target_extra: Tensor | float | None = None,
) -> None:
    """Fill the gradient fields of `rows` from the derivatives of a row's loss by its statistics.

    With x_j = k z_j - OFFSET and e_j = 2^x_j:  dL/dz_j = e_j (A + B e_j + C x_j) + PEAK_GRAD [z_j is the max]
    for j != y and TARGET at j = y. This is p_j (a + b p_j + c (z_j - lse)) - g [j = y] with
    a = d_lse - d_logp - 2 S d_S - H d_H, b = 2 d_S, c = -d_H, g = -d_logp; the target's p_y - 1 is
    expm1(logp), so a confident target keeps its digits.
    """
    logp, s = rows[Field.LOGP], rows[Field.SUM]
    p = logp.exp()
    g = -d_logp
    rest: Tensor | None = d_lse
    target = g * torch.expm1(logp)
    b = c = None
    if d_collision is not None:
        b = 2.0 * d_collision
        rest = _add(rest, -b * rows[Field.COLLISION])
        target = target + b * p * p
    if d_entropy is not None:
        c = -d_entropy
        rest = _add(rest, c * rows[Field.ENTROPY])
        target = target + torch.where(p == 0, 0.0, c * p * logp)
    if d_max_prob is not None:
        peak = d_max_prob * rows[Field.MAX_PROB]
        share = peak / rows[Field.TIES]
        rest = _add(rest, -peak)
        target = target + torch.where(rows[Field.CORRECT] > 0, share, 0.0)
        rows[Field.PEAK_GRAD] = share / temperature
    a = g if rest is None else g + rest
    if rest is not None:
        target = target + p * rest
    if c is not None:
        a = a - c * LN2 * torch.log2(s)
        rows[Field.C] = c * (LN2 / temperature) / s
    if b is not None:
        rows[Field.B] = b / (s * s) / temperature
    if temperature != 1.0:
        s, target = s * temperature, target / temperature
    rows[Field.A] = a / s
    rows[Field.TARGET] = target if target_extra is None else target + target_extra


def _add(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right
