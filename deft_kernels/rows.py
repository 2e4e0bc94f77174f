"""From a row's statistics to its loss and the coefficients of its gradient, on [N] vectors in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import coefficients, evaluate, outside_band
from .spec import Spec
from .statistics import Field


def finish(
    spec: Spec,
    rows: Tensor,
    valid: Tensor,
    vocabulary: int,
    *,
    mean_prob: Tensor | float | None = None,
    logit_sum: Tensor | None = None,
    target_weight: Tensor | None = None,
    weight_total: Tensor | float | None = None,
) -> Tensor:
    """Loss [R] of rows whose statistics stand in `rows` [len(Field), R]; fills the remaining fields.

        loss = (1 - eps) w_y objective + eps / V (W lse - sum_c w_c z_c) + z_loss lse^2,  W = sum_c w_c

    valid: bool [R], False for ignored rows.  logit_sum: sum_c w_c z_c [R], with label smoothing.
    target_weight: w_y [R] and weight_total: W, with class weights; otherwise w = 1, W = V.
    """
    objective = spec.objective
    if objective.family == "none":
        rows[Field.KEPT] = valid
        return drop(rows, torch.zeros_like(rows[0]), valid, valid)
    logp, lse = rows[Field.LOGP], rows[Field.LSE]
    value = evaluate(
        objective, logp, rows[Field.COLLISION], rows[Field.ENTROPY], rows[Field.MAX_PROB], mean_prob
    )
    loss = value.loss
    derivatives = [value.d_logp, None, value.d_collision, value.d_entropy, value.d_max_prob]
    scale: Tensor | float = 1.0 - spec.label_smoothing
    if target_weight is not None:
        scale = scale * target_weight
    if target_weight is not None or spec.label_smoothing > 0:
        loss = loss * scale
        derivatives = [None if d is None else d * scale for d in derivatives]
    d_lse: Tensor | None = None
    target_extra: Tensor | float = 0.0
    if spec.label_smoothing > 0:
        assert logit_sum is not None
        share = spec.label_smoothing / vocabulary
        total = float(vocabulary) if weight_total is None else weight_total
        loss = loss + share * (total * lse - logit_sum)
        d_lse = torch.ones_like(lse) * (share * total)
        target_extra = (-share if target_weight is None else -share * target_weight) / spec.temperature
    if spec.z_loss > 0:
        loss = loss + spec.z_loss * lse * lse
        z_slope = 2.0 * spec.z_loss * lse
        d_lse = z_slope if d_lse is None else d_lse + z_slope
    d_logp, _, d_collision, d_entropy, d_max_prob = derivatives
    assert d_logp is not None
    coefficients(
        rows,
        d_logp,
        d_lse,
        d_collision,
        d_entropy,
        d_max_prob,
        temperature=spec.temperature,
        target_extra=target_extra,
    )
    kept, gate = valid, value.gate
    if objective.has_band:
        outside = outside_band(objective, logp.exp())
        kept = valid & ~outside
        gate = gate.masked_fill(outside, 0.0)
    rows[Field.ALPHA] = value.alpha
    rows[Field.GATE] = gate
    rows[Field.KEPT] = kept
    return drop(rows, loss, valid, kept)


def gradient_fields(
    rows: Tensor,
    d_logp: Tensor | None,
    d_lse: Tensor | None,
    d_collision: Tensor | None,
    d_entropy: Tensor | None,
    d_max_prob: Tensor | None,
    temperature: float,
) -> Tensor:
    """A copy of `rows` with the gradient fields for these upstream derivatives of the statistics."""
    rows = rows.clone()
    if d_logp is None:
        d_logp = torch.zeros_like(rows[Field.LOGP])
    coefficients(rows, d_logp, d_lse, d_collision, d_entropy, d_max_prob, temperature=temperature)
    kept = rows[Field.KEPT] != 0
    drop(rows, rows[Field.LOGP], kept, kept)
    return rows


def drop(rows: Tensor, loss: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """Zero the gradient of rows that are not kept and every field of ignored ones; NaN and inf included."""
    rows[Field.A :].masked_fill_(~kept, 0.0)
    rows[: Field.A].masked_fill_(~valid, 0.0)
    return loss.masked_fill(~kept, 0.0)
