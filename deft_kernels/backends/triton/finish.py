"""From a row's state to its loss and the coefficients of its gradient, as `pytorch/finish.py` does."""

import triton
import triton.language as tl

from .arithmetic import HIGHEST, LN2, expm1, fma, log1p

# Where the derivative by the focus index goes on to, when the gate is not held constant.
HELD = tl.constexpr(0)
BY_LOGP = tl.constexpr(1)
BY_COLLISION = tl.constexpr(2)
BY_ENTROPY = tl.constexpr(3)
BY_MAX_PROB = tl.constexpr(4)


@triton.jit
def weights_of(class_weight, weight_total, label, vocabulary, WEIGHTED: tl.constexpr):
    """(w_y, sum of w)."""
    if WEIGHTED:
        known = (label >= 0) & (label < vocabulary)
        return tl.load(class_weight + label, mask=known, other=0.0).to(tl.float32), tl.load(weight_total)
    else:
        return 1.0, vocabulary * 1.0


@triton.jit
def floor_of(floor, BATCH: tl.constexpr):
    """The Cayley floor: a number, or half of a mean that an earlier launch left in memory."""
    if BATCH:
        return 0.5 * tl.load(floor)
    else:
        return floor


@triton.jit
def finish_row(
    rows, loss_ptr, row, n_rows, z_target, w_target, weight_total, peak, offset, s, u, t, zsum, ties,
    predicted, vocabulary, k, temperature, alpha, eps, power, scale, floor, low, high, z_loss, smoothing,
    FOCUS: tl.constexpr, FAMILY: tl.constexpr, THROUGH: tl.constexpr, IS_WEIGHT: tl.constexpr,
    BANDED: tl.constexpr, Z_LOSS: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    ENTROPY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Write one row's loss and fields (in the order of `statistics.Field`); return its gradient fields.

    s, u, t: without the largest column, which `peak` stands for (see `state`).
    z_target: the target's logit, soft-capped; NaN for a label out of range, so that the row shows it.
    predicted: 1 + the first column with the largest logit, or 0 where nobody asks for it.
    """
    # The largest probability's own 2^x, then everything relative to it: ln(1 + rest) keeps the digits of a
    # confident row, and differences of logits are exact where lse would be rounded at the size of the logits.
    x_peak = fma(peak, k, -offset, MODE)
    e_peak = tl.exp2(x_peak)
    # Logits of 2e8 and more: the offset's rounding no longer cancels. NaN, rather than a wrong number.
    s = tl.where(tl.abs(offset) >= HIGHEST, float("nan"), s)
    log_sum = log1p(s / e_peak)
    logp = (z_target - peak) / temperature - log_sum
    p = tl.exp(logp)
    lse = peak / temperature + log_sum
    rest_sum = s
    s += e_peak
    collision = (u + e_peak * e_peak) / (s * s)
    max_prob = e_peak / s
    # A row of NaN or of masks alone predicts nothing.
    predicted = tl.where(max_prob == max_prob, predicted, 0.0)
    entropy = 0.0 * s
    if ENTROPY:
        entropy = log_sum - LN2 * (t - x_peak * rest_sum) / s
        entropy = tl.where(entropy < 0.0, 0.0, entropy)

    focus, slope = FOCUS(p, collision, entropy, max_prob, alpha, eps, power, scale, floor)
    loss, gate, d_focus = FAMILY(logp, focus, eps, THROUGH == HELD)
    d_logp = -gate
    if THROUGH == BY_LOGP:
        d_logp += d_focus * slope
    shown = focus
    if IS_WEIGHT:
        shown = alpha + 0.0 * focus
    kept = 1.0
    if BANDED:
        # NaN is kept: it must show, not vanish.
        kept = tl.where((p < low) | (p > high), 0.0, 1.0)
        gate = tl.where(kept != 0.0, gate, 0.0)

    share = 1.0 - smoothing
    if WEIGHTED:
        share = share * w_target
    if WEIGHTED or SMOOTHED:
        loss = loss * share
        d_logp = d_logp * share
        d_focus = d_focus * share
    d_lse = 0.0
    extra = 0.0
    if SMOOTHED:
        spread = smoothing / vocabulary
        loss += spread * (weight_total * lse - zsum / temperature)
        d_lse += spread * weight_total
        extra = -spread
        if WEIGHTED:
            extra = -spread * w_target
    if Z_LOSS:
        loss += z_loss * lse * lse
        d_lse += 2.0 * z_loss * lse

    # dL/dz_j = p (a + b p + c (z_j - lse)) - g [j = y], a = g + rest; see `coefficients` there.
    g = -d_logp
    rest = d_lse
    b = 0.0
    c = 0.0
    peak_grad = 0.0
    target = g * expm1(logp)
    if THROUGH == BY_COLLISION:
        b = 2.0 * d_focus * slope
        rest -= b * collision
        target += b * p * p
    if THROUGH == BY_ENTROPY:
        c = -d_focus * slope
        rest += c * entropy
        target += tl.where(p == 0.0, 0.0, c * p * logp)
    if THROUGH == BY_MAX_PROB:
        through = d_focus * slope * max_prob
        peak_grad = through / ties
        rest -= through
        target += tl.where(z_target >= peak, peak_grad, 0.0)
    target = (target + p * rest + extra) / temperature
    a = (g + rest - c * (log_sum + LN2 * x_peak)) / (s * temperature)
    # A label out of range: the row's gradient shows it as its loss does, whatever the gate.
    a = tl.where(z_target == z_target, a, float("nan"))
    b = b / (s * s * temperature)
    c = c * LN2 / (s * temperature)
    peak_grad = peak_grad / temperature
    if BANDED:
        dropped = kept == 0.0
        loss = tl.where(dropped, 0.0, loss)
        a = tl.where(dropped, 0.0, a)
        b = tl.where(dropped, 0.0, b)
        c = tl.where(dropped, 0.0, c)
        peak_grad = tl.where(dropped, 0.0, peak_grad)
        target = tl.where(dropped, 0.0, target)

    tl.store(loss_ptr + row, loss)
    correct = tl.where((z_target >= peak) & (s == s), 1.0, 0.0)
    store_fields(
        rows, row, n_rows, logp, lse, collision, entropy, max_prob, correct, shown, gate, kept, offset, s,
        peak, ties, predicted, a, b, c, peak_grad, target,
    )  # fmt: skip
    return kept, a, b, c, peak_grad, target


@triton.jit
def store_fields(
    rows, row, n_rows, logp, lse, collision, entropy, max_prob, correct, alpha, gate, kept, offset, s,
    peak, ties, predicted, a, b, c, peak_grad, target,
):  # fmt: skip
    """The packed fields of a row, n_rows apart; the order is that of `statistics.Field`."""
    to = rows + row
    tl.store(to, logp)
    tl.store(to + 1 * n_rows, lse)
    tl.store(to + 2 * n_rows, collision)
    tl.store(to + 3 * n_rows, entropy)
    tl.store(to + 4 * n_rows, max_prob)
    tl.store(to + 5 * n_rows, correct)
    tl.store(to + 6 * n_rows, alpha)
    tl.store(to + 7 * n_rows, gate)
    tl.store(to + 8 * n_rows, kept)
    tl.store(to + 9 * n_rows, offset)
    tl.store(to + 10 * n_rows, s)
    tl.store(to + 11 * n_rows, peak)
    tl.store(to + 12 * n_rows, ties)
    tl.store(to + 13 * n_rows, predicted)
    tl.store(to + 14 * n_rows, a)
    tl.store(to + 15 * n_rows, b)
    tl.store(to + 16 * n_rows, c)
    tl.store(to + 17 * n_rows, peak_grad)
    tl.store(to + 18 * n_rows, target)


@triton.jit
def store_ignored(rows, loss_ptr, row, n_rows):
    """A row that counts for nothing: every field 0, whatever its logits hold."""
    tl.store(loss_ptr + row, 0.0)
    store_fields(
        rows, row, n_rows, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
        0.0, 0.0, 0.0,
    )  # fmt: skip
