"""How the states of all parts of a vocabulary (see `backends/states.py`) become one, and then statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.spec import Spec
from ...core.statistics import Field, Fields
from .objectives import LN2

# The rounding of larger offsets is too large an error in 2^x, see `triton/arithmetic.py`.
LARGEST_OFFSET = 2.0**28


def offset_of(peak: Tensor, k: float) -> Tensor:
    """The offset that belongs to a peak, rounded in the peak's dtype as every pass over the row rounds it."""
    return (peak * k).clamp_(min=-LARGEST_OFFSET)


def bounded(offset: Tensor) -> Tensor:
    """The offset of a whole row. Logits of 2e8 and more: its rounding no longer cancels. NaN, rather than a
    wrong number."""
    return offset.masked_fill(offset.abs() >= LARGEST_OFFSET, math.nan)


def combine(states: Tensor, spec: Spec, k: float) -> tuple[Fields, Tensor | None]:
    """(statistics, sum_c w_c z_c if smoothing) of rows from their states [parts, N, size].

    In every part but the one with the largest logit, the column of the peak joins the sums again.
    """
    peaks, target = states[..., 0], states[..., 4].amax(0).double()
    offsets = offset_of(peaks, k).double()
    peak, winner = peaks.double().max(0)
    offset = bounded(offsets.amax(0))
    s, u, t = states[..., 1:4].double().unbind(-1)
    moved = offsets - offset
    r = torch.exp2(moved)
    x = peaks.double() * k - offset
    e = torch.exp2(x).scatter(0, winner.unsqueeze(0), 0.0)
    rest = (s * r + e).sum(0)
    logs = r * (t + moved * s) + torch.where(e == 0, 0.0, x * e)
    fields: Fields = {}
    if spec.peaks:
        ties = states[..., 5 + (spec.label_smoothing > 0)].double()
        fields[Field.TIES] = torch.where(peaks == peak, ties, 0.0).sum(0)
    if spec.statistics:
        columns = states[..., -1].double()
        fields[Field.PREDICTED] = torch.where(peaks == peak, columns, math.inf).amin(0)
    x_peak = peak * k - offset
    largest = torch.exp2(x_peak)
    squares = (u * (r * r) + e * e).sum(0)
    t_sum = logs.sum(0) if spec.needs_entropy else None
    statistics_of(fields, spec.temperature, k, target, peak, offset, rest, largest, squares, t_sum)
    return fields, states[..., 5].double().sum(0) if spec.label_smoothing > 0 else None


def statistics_of(
    fields: Fields,
    temperature: float,
    k: float,
    target: Tensor,
    peak: Tensor,
    offset: Tensor,
    rest: Tensor,
    apart: Tensor,
    u: Tensor,
    t: Tensor | None,
    *,
    held: Tensor | None = None,
) -> None:
    """Statistics from a row's sums, in float64: each is then rounded once, as the sums are.

    rest, u, t: over all columns but one, whose 2^x is `apart`.  held: where that column, which is then the
    target, is the largest; None where it always is.
    """
    s = rest + apart
    x_peak = peak * k - offset
    correct = target >= peak if held is None else held
    log_sum = torch.where(
        apart > 0.5 if held is None else held,
        torch.log1p(rest / apart),
        torch.log(s) - x_peak * LN2,
    )
    fields[Field.OFFSET], fields[Field.PEAK], fields[Field.SUM] = offset, peak, s
    fields[Field.CORRECT] = correct.double()
    distance = target - peak
    if temperature != 1.0:
        distance, peak = distance / temperature, peak / temperature
    fields[Field.LOGP] = distance - log_sum
    fields[Field.LSE] = peak + log_sum
    fields[Field.COLLISION] = (u + apart * apart) / (s * s)
    fields[Field.MAX_PROB] = torch.exp2(x_peak) / s
    if Field.PREDICTED in fields:
        # A row that is all NaN or all masked predicts nothing.
        fields[Field.PREDICTED] = fields[Field.PREDICTED].masked_fill(fields[Field.MAX_PROB].isnan(), 0.0)
    if t is not None:
        fields[Field.ENTROPY] = (log_sum - LN2 * (t - x_peak * rest) / s).clamp_(min=0.0)
