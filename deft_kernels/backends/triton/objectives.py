"""The objectives on the device, as in `pytorch/objectives.py`.

`focus_of` returns (alpha, slope), slope being the derivative of alpha by the statistic it comes from (by logp
for `cayley` and `prob`). `family_of` returns (loss, gate, d_alpha).
"""

import triton
import triton.language as tl

from .arithmetic import expm1


@triton.jit
def focus_of(stats, numbers, floor, OPTIONS):
    """`alpha` of the objective itself where the focus is fixed, or where there is none."""
    if OPTIONS.focus == "collision":
        return stats.collision, 1.0
    elif OPTIONS.focus == "shannon":
        value = tl.exp(-stats.entropy)
        return value, -value
    elif OPTIONS.focus == "max_prob":
        return stats.max_prob, 1.0
    elif OPTIONS.focus == "cayley":
        return cayley(stats.p, numbers.eps, floor)
    elif OPTIONS.focus == "prob":
        return stats.p, stats.p
    elif OPTIONS.focus == "entropy":
        return scaled_entropy(stats.entropy, numbers.power, numbers.scale)
    else:
        return numbers.alpha, 0.0


@triton.jit
def cayley(p, eps, floor):
    below = 2.0 - p + 2.0 * eps
    raw = floor + (1.0 - floor) * (p - eps) / below
    slope = (1.0 - floor) * (2.0 + eps) / (below * below) * p
    inside = (raw >= 0.001) & (raw <= 1.0)
    clamped = tl.where(raw < 0.001, 0.001, tl.where(raw > 1.0, 1.0, raw))
    return clamped, tl.where(inside, slope, 0.0)


@triton.jit
def scaled_entropy(entropy, power, scale):
    """w = (H scale)^power with scale = 1 / ln top_k."""
    weight = tl.exp2(power * tl.log2(entropy * scale))
    weight = tl.where(entropy > 0.0, weight, tl.where(entropy == entropy, 0.0, entropy))
    return weight, tl.where(entropy > 0.0, power * weight / entropy, 0.0)


@triton.jit
def family_of(logp, alpha, eps, OPTIONS):
    if OPTIONS.family == "deformed":
        return deformed(logp, alpha, eps, OPTIONS.through == "held")
    elif OPTIONS.family == "rational":
        return rational(logp, alpha)
    elif OPTIONS.family == "weighted":
        return weighted(logp, alpha)
    else:
        return 0.0 * alpha, 0.0 * alpha, 0.0


@triton.jit
def deformed(logp, alpha, eps, DETACH: tl.constexpr):
    """-(p^alpha - 1) / (alpha + eps); -logp at alpha = 0."""
    plain = (alpha == 0.0) & (eps == 0.0)
    x = tl.where(plain, 0.0, alpha * logp)
    weight = tl.where(plain, 1.0, alpha + eps)
    power = tl.exp(x)
    loss = tl.where(plain, -logp, -expm1(x) / weight)
    gate = tl.where(plain, 1.0, power * (alpha / weight))
    if DETACH:
        return loss, gate, 0.0
    else:
        # x e^x - expm1(x) without cancellation, and the second term that eps leaves.
        tail = 0.033333335 + x * (0.0069444445 + x * 0.0011904762)
        series = 0.5 + x * (0.33333334 + x * (0.125 + x * tail))
        direct = tl.maximum(x, -10000.0) * power - expm1(x)
        sharpening = tl.where(x > -0.3, series * x * x, direct)
        rest = eps * tl.where(power == 0.0, 0.0, logp * power)
        return loss, gate, -(sharpening + rest) / (weight * weight)


@triton.jit
def rational(logp, alpha):
    """-logp / (1 - alpha logp)."""
    impossible = logp == float("-inf")
    root = 1.0 / (1.0 - alpha * logp)
    # Of logp = -inf, the limit: infinite at alpha = 0, said without a division that the interpreter refuses.
    limit = tl.where(alpha == 0.0, float("inf"), 1.0 / tl.where(alpha == 0.0, 1.0, alpha))
    loss = tl.where(impossible, limit, -logp * root)
    root = tl.where(impossible & (alpha == 0.0), 1.0, root)
    return loss, root * root, -loss * loss


@triton.jit
def weighted(logp, alpha):
    """w (-logp), the weight coming in as `alpha`; 0 where the weight is, in the limit of p ln p."""
    loss = tl.where(alpha == 0.0, 0.0, -alpha * logp)
    return loss, alpha, tl.where(alpha == 0.0, 0.0, -logp)
