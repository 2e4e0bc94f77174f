"""From a row's statistics to its loss and the coefficients of its gradient, on [N] vectors in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.spec import Spec
from ...core.statistics import Field, Fields, pack, unpack
from .objectives import coefficients, evaluate, outside_band


def finish(
    spec: Spec,
    fields: Fields,
    valid: Tensor | None,
    vocabulary: int,
    *,
    mean_prob: Tensor | float | None = None,
    logit_sum: Tensor | None = None,
    target_weight: Tensor | None = None,
    weight_total: Tensor | float | None = None,
) -> Tensor:
    """Loss [R] of rows whose statistics stand in `fields`; adds the remaining fields.

        loss = (1 - eps) w_y objective + eps / V (W lse - sum_c w_c z_c) + z_loss lse^2,  W = sum_c w_c

    valid: bool [R], False for ignored rows; None where there are none.
    logit_sum: sum_c w_c z_c [R], with label smoothing.
    target_weight: w_y [R] and weight_total: W, with class weights; otherwise w = 1, W = V.
    """
    objective = spec.objective
    if objective.family == "none":
        return _settle(fields, torch.zeros_like(fields[Field.LOGP]), valid, valid)
    logp, lse = fields[Field.LOGP], fields[Field.LSE]
    value = evaluate(objective, fields, mean_prob)
    loss = value.loss
    derivatives = [_shown(value.d_logp, logp), None, value.d_collision, value.d_entropy, value.d_max_prob]
    scale: Tensor | float = 1.0 - spec.label_smoothing
    if target_weight is not None:
        scale = scale * target_weight
    if target_weight is not None or spec.label_smoothing > 0:
        loss = loss * scale
        derivatives = [None if d is None else d * scale for d in derivatives]
    d_lse: Tensor | None = None
    target_extra: Tensor | float | None = None
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
        fields,
        d_logp,
        d_lse,
        d_collision,
        d_entropy,
        d_max_prob,
        temperature=spec.temperature,
        target_extra=target_extra,
    )
    fields[Field.ALPHA] = value.alpha
    fields[Field.GATE] = value.gate
    kept = valid
    if objective.has_band:
        inside = ~outside_band(objective, logp.exp())
        fields[Field.GATE] = value.gate.masked_fill(~inside, 0.0)
        kept = inside if valid is None else valid & inside
    return _settle(fields, loss, valid, kept)


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
    fields = unpack(rows)
    logp = fields[Field.LOGP]
    d_logp = torch.zeros_like(logp) if d_logp is None else _shown(d_logp, logp)
    coefficients(fields, d_logp, d_lse, d_collision, d_entropy, d_max_prob, temperature=temperature)
    kept = fields[Field.KEPT] != 0
    _settle(fields, fields[Field.LOGP], kept, kept)
    return pack(fields)


def with_terms(
    spec: Spec, rows: Tensor, loss: Tensor, own: Tensor, target_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss, rows) of formulas of the rows, from those of the Spec's objective.

    own: [K, N]. Four of a loss that takes the place of -logp, the objective: loss, slope, alpha and gate; two
    of an anchor, which is added: loss and slope; or these six. A slope is -d loss / d logp.
    target_weight: w_y of each row's class, with class weights. They and the smoothing weigh the objective
    alone, as in `finish`, not smoothing, z-loss and anchor.
    """
    fields = unpack(rows)
    logp, temperature = fields[Field.LOGP], spec.temperature
    scaled_sum, expm1 = fields[Field.SUM] * temperature, torch.expm1(logp) / temperature
    kept, counted = fields[Field.KEPT] != 0, fields[Field.SUM] != 0
    a, target, found = fields[Field.A], fields[Field.TARGET], loss
    if own.shape[0] != 2:
        value, slope, fields[Field.ALPHA], fields[Field.GATE] = own[:4]
        share = torch.full_like(logp, 1.0 - spec.label_smoothing)
        if target_weight is not None:
            share = share * target_weight.to(share.dtype)
        g = share * slope
        found = share * value
        if spec.label_smoothing > 0 or spec.z_loss > 0:
            # What stands there of the Spec's objective goes; the rest is smoothing and z-loss.
            there = evaluate(spec.objective, fields)
            found = found + (loss - share * there.loss)
            g = g - share * there.gate
            a, target = a + g / scaled_sum, target + g * expm1
        else:
            a, target = g / scaled_sum, g * expm1
        fields[Field.GATE] = fields[Field.GATE].where(kept, 0.0)
    if own.shape[0] != 4:
        value, slope = own[-2:]
        found = found + value
        a, target = a + slope / scaled_sum, target + slope * expm1
    # Of a label out of range the loss is NaN, and so is its row's gradient.
    fields[Field.A], fields[Field.TARGET] = a.masked_fill(logp.isnan(), math.nan), target
    return _settle(fields, found, counted, kept), pack(fields)


def _shown(d_logp: Tensor, logp: Tensor) -> Tensor:
    """NaN where logp is NaN. For a label out of range the loss is NaN, and so the gradient has to be,
    although a gate of 1 or one made of the entropy does not depend on the label."""
    return d_logp.masked_fill(logp.isnan(), math.nan)


def _settle(fields: Fields, loss: Tensor, valid: Tensor | None, kept: Tensor | None) -> Tensor:
    """Set to 0, also from NaN and inf: loss and gradient of rows that are not kept, every field of ignored
    rows."""
    fields[Field.KEPT] = torch.ones_like(loss) if kept is None else kept.to(loss.dtype)
    for field, value in fields.items():
        keep = kept if field >= Field.A else valid
        if keep is not None:
            fields[field] = value.where(keep, 0.0)
    return loss if kept is None else loss.where(kept, 0.0)
