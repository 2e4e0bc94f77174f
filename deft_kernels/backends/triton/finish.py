"""From a row's state to its loss and the coefficients of its gradient, as `pytorch/finish.py` does."""

import triton
import triton.language as tl

from .arithmetic import HIGHEST, expm1, fma, log1p, nats
from .objectives import family_of, focus_of
from .records import FIELD, Fields, Gradient, Statistics, Weights


@triton.jit
def weights_of(class_weight, weight_total, label, vocabulary, OPTIONS):
    if OPTIONS.weighted:
        known = (label >= 0) & (label < vocabulary)
        target = tl.load(class_weight + label, mask=known, other=0.0).to(tl.float32)
        return Weights(target, tl.load(weight_total))
    else:
        return Weights(1.0, vocabulary * 1.0)


@triton.jit
def statistics_of(state, z_target, numbers, OPTIONS):
    # The largest probability's own 2^x, then everything relative to it: ln(1 + rest) keeps the digits of a
    # confident row, and differences of logits are exact where lse would be rounded at the size of the logits.
    x_peak = fma(state.peak, numbers.k, -state.offset, OPTIONS.mode)
    e_peak = tl.exp2(x_peak)
    # Logits of 2e8 and more: the offset's rounding no longer cancels. NaN, rather than a wrong number.
    rest = tl.where(tl.abs(state.offset) >= HIGHEST, float("nan"), state.s)
    log_sum = log1p(rest / e_peak)
    logp = (z_target - state.peak) / numbers.temperature - log_sum
    p = tl.exp(logp)
    lse = state.peak / numbers.temperature + log_sum
    s = rest + e_peak
    collision = (state.u + e_peak * e_peak) / (s * s)
    max_prob = e_peak / s
    entropy = 0.0 * s
    if OPTIONS.entropy:
        entropy = log_sum - nats(state.t - x_peak * rest) / s
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return Statistics(logp, p, lse, collision, entropy, max_prob, s, log_sum, x_peak)


@triton.jit
def finish_row(saved, loss_ptr, row, reduced, weights, vocabulary, floor, numbers, OPTIONS):
    """Write a row's loss and fields; return whether it is kept, and what its gradient takes."""
    state, z_target = reduced.state, reduced.z_target
    stats = statistics_of(state, z_target, numbers, OPTIONS)
    # A row of NaN or of masks alone predicts nothing.
    predicted = tl.where(stats.max_prob == stats.max_prob, reduced.predicted, 0.0)

    focus, slope = focus_of(stats, numbers, floor, OPTIONS)
    loss, gate, d_focus = family_of(stats.logp, focus, numbers.eps, OPTIONS)
    d_logp = -gate
    if OPTIONS.through == "logp":
        d_logp += d_focus * slope
    shown = focus
    if OPTIONS.family == "weighted":
        # The focus is a weight, and no focus index.
        shown = numbers.alpha + 0.0 * focus
    kept = 1.0
    if OPTIONS.banded:
        # NaN is kept: it must show, not vanish.
        kept = tl.where((stats.p < numbers.low) | (stats.p > numbers.high), 0.0, 1.0)
        gate = tl.where(kept != 0.0, gate, 0.0)

    share = 1.0 - numbers.smoothing
    if OPTIONS.weighted:
        share = share * weights.target
    if OPTIONS.weighted or OPTIONS.smoothed:
        loss = loss * share
        d_logp = d_logp * share
        d_focus = d_focus * share
    d_lse = 0.0
    extra = 0.0
    if OPTIONS.smoothed:
        spread = numbers.smoothing / vocabulary
        loss += spread * (weights.total * stats.lse - state.zsum / numbers.temperature)
        d_lse += spread * weights.total
        extra = -spread
        if OPTIONS.weighted:
            extra = -spread * weights.target
    if OPTIONS.z_loss:
        loss += numbers.z_loss * stats.lse * stats.lse
        d_lse += 2.0 * numbers.z_loss * stats.lse

    g = gradient_of(stats, reduced, d_logp, d_focus, slope, d_lse, extra, numbers, OPTIONS)
    if OPTIONS.banded:
        dropped = kept == 0.0
        loss = tl.where(dropped, 0.0, loss)
        a = tl.where(dropped, 0.0, g.a)
        b = tl.where(dropped, 0.0, g.b)
        c = tl.where(dropped, 0.0, g.c)
        peak_grad = tl.where(dropped, 0.0, g.peak_grad)
        target = tl.where(dropped, 0.0, g.target)
        g = Gradient(g.offset, g.peak, a, b, c, peak_grad, target, g.spread)

    tl.store(loss_ptr + row, loss)
    correct = tl.where((z_target >= state.peak) & (stats.s == stats.s), 1.0, 0.0)
    fields = Fields(
        logp=stats.logp,
        lse=stats.lse,
        collision=stats.collision,
        entropy=stats.entropy,
        max_prob=stats.max_prob,
        correct=correct,
        alpha=shown,
        gate=gate,
        kept=kept,
        offset=state.offset,
        sum=stats.s,
        peak=state.peak,
        ties=reduced.ties,
        predicted=predicted,
        a=g.a,
        b=g.b,
        c=g.c,
        peak_grad=g.peak_grad,
        target=g.target,
    )
    store_fields(saved, row, fields)
    return kept, g


@triton.jit
def gradient_of(stats, reduced, d_logp, d_focus, slope, d_lse, extra, numbers, OPTIONS):
    """From the loss's derivatives by logp, by the focus index (times `slope`: by its statistic) and by lse.

    dL/dz_j = p (a + b p + c (z_j - lse)) - g [j = y], a = g + rest; see `coefficients` in
    `pytorch/objectives.py`. extra: what label smoothing adds in the target's column.
    """
    p, s, temperature = stats.p, stats.s, numbers.temperature
    state = reduced.state
    g = -d_logp
    rest = d_lse
    b = 0.0
    c = 0.0
    peak_grad = 0.0
    target = g * expm1(stats.logp)
    if OPTIONS.through == "collision":
        b = 2.0 * d_focus * slope
        rest -= b * stats.collision
        target += b * p * p
    if OPTIONS.through == "entropy":
        c = -d_focus * slope
        rest += c * stats.entropy
        target += tl.where(p == 0.0, 0.0, c * p * stats.logp)
    if OPTIONS.through == "max_prob":
        through = d_focus * slope * stats.max_prob
        peak_grad = through / reduced.ties
        rest -= through
        target += tl.where(reduced.z_target >= state.peak, peak_grad, 0.0)
    target = (target + p * rest + extra) / temperature
    a = (g + rest - c * (stats.log_sum + nats(stats.x_peak))) / (s * temperature)
    # A label out of range: the row's gradient shows it as its loss does, whatever the gate.
    a = tl.where(reduced.z_target == reduced.z_target, a, float("nan"))
    b = b / (s * s * temperature)
    c = nats(c) / (s * temperature)
    peak_grad = peak_grad / temperature
    return Gradient(state.offset, state.peak, a, b, c, peak_grad, target, numbers.spread)


@triton.jit
def store_fields(saved, row, fields):
    COUNT: tl.constexpr = len(FIELD.value)
    for place in tl.static_range(COUNT):
        tl.store(saved.fields + row + place * saved.n_rows, fields[place])


@triton.jit
def store_ignored(saved, loss_ptr, row):
    """A row that counts for nothing: every field 0, whatever its logits hold."""
    COUNT: tl.constexpr = len(FIELD.value)
    tl.store(loss_ptr + row, 0.0)
    for place in tl.static_range(COUNT):
        tl.store(saved.fields + row + place * saved.n_rows, 0.0)


@triton.jit
def load_field(saved, row, PLACE: tl.constexpr):
    return tl.load(saved.fields + PLACE * saved.n_rows + row)
