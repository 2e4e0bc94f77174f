"""What a call may err: the bounds of `rows`, scaled to what a row's gradient is made of, and nothing beside
them but what PyTorch itself errs in fp32 where an option rounds on its way.

Rows: loss 3e-5 relative and one fp32 epsilon of logp; gradient 3e-5 relative (fp32) or one ulp (bf16,
fp16), and 3e-7 of the row's scale: its upstream times its weights, over the temperature, or its largest
entry. A gradient through the gate is made of terms as large as dL/dS, dL/dH or dL/d(max p), which cancel
where one token holds nearly everything: one fp32 epsilon of these. For fp64 logits the same with fp64's
digits.

A soft cap, label smoothing, z-loss and anchor round on their way, as PyTorch's own formulas do in fp32.
There the largest error of the oracle run in fp32 on the same row is allowed beside these bounds, twice.
Smoothing's part of a loss, a difference of lse and the mean logit, may also be off by an epsilon of the
logits: PyTorch subtracts the largest first, and errs less where all are large and alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import Case, Tensors, keywords
from rows import FREE, RELATIVE
from torch import Tensor

from deft_kernels import deft_loss, reference
from deft_kernels.core.statistics import RowStatistics

EPSILON = torch.finfo(torch.float32).eps
# The oracle's own rounding, for a weight near 0 on a large -logp.
ORACLE = 1e-15
STATISTICS = ("logp", "lse", "collision", "entropy", "max_prob", "alpha", "gate")


class Truth(NamedTuple):
    """What the oracle says in float64, and how far from it a call may be."""

    loss: Tensor  # [N] or [1]
    loss_slack: Tensor
    gradient: Tensor  # [N, V]
    gradient_slack: Tensor  # before the rounding to the logits' dtype
    statistics: RowStatistics  # [N] each
    statistics_slack: dict[str, Tensor]


class Run(NamedTuple):
    loss: Tensor
    gradient: Tensor  # [N, V]
    statistics: RowStatistics  # [N] each
    rows: Tensor  # [N], the losses of the rows alone


def run(case: Case, made: Tensors, dtype: torch.dtype) -> Run:
    """The oracle in `dtype`."""
    ignored = (made.targets == case.ignore_index).reshape(*case.shape, 1)
    leaf = made.logits.to(dtype).masked_fill(ignored, 0.0).requires_grad_()
    options = keywords(case, made)
    loss, stats = deft_loss(leaf, made.labels, backend="reference", return_stats=True, **options)
    loss.backward(made.upstream.to(loss.dtype))
    options |= {"reduction": "none", "num_items": None}
    with torch.no_grad():
        rows = deft_loss(leaf, made.labels, backend="reference", **options)
    assert leaf.grad is not None
    flat = RowStatistics(*(s.reshape(-1) for s in stats))
    # A row of -inf alone has no statistics; PyTorch's lse of it is -inf.
    flat = flat._replace(lse=flat.lse.where(~flat.logp.isnan(), torch.nan))
    return Run(loss.detach().reshape(-1), leaf.grad.reshape(-1, case.vocabulary), flat, rows.reshape(-1))


def near_a_band(case: Case, stats: RowStatistics) -> bool:
    """Whether rounding decides for some row on which side of a band's end its p lies."""
    p = stats.logp.exp()
    ends = [end for end in (case.objective.low, case.objective.high) if 0.0 < end < 1.0]
    return any(bool(((p - end).abs() < 1e-4 * end + 1e-6).any()) for end in ends)


def truth(case: Case, made: Tensors) -> Truth:
    exact = run(case, made, torch.float64)
    stats, double = exact.statistics, case.dtype == torch.float64
    relative, free, epsilon = (1e-12, 1e-14, 1e-15) if double else (RELATIVE, FREE, EPSILON)

    # What a row weighs: of its objective and its smoothing, of its z-loss, of its loss in the total.
    p = stats.logp.exp()
    kept = (made.targets != case.ignore_index) & ~((p < case.objective.low) | (p > case.objective.high))
    classes = torch.ones(case.vocabulary, dtype=torch.float64)
    if made.class_weight is not None:
        classes = made.class_weight.double()
    target_weight = torch.where(kept, classes[torch.where(kept, made.targets, 0)], 0.0)
    own = (1 - case.label_smoothing) * target_weight
    spread = case.label_smoothing * classes.mean()
    added = case.z_loss * sound(2 * stats.lse.abs())
    steep, drift = torch.zeros_like(added), 0.0
    if made.reference_logp is not None:
        distance = made.reference_logp.double().reshape(-1) - stats.logp
        added = added + case.anchor * sound(distance.expm1().abs())
        # D is as far off as log p and the reference's are rounded, and e^D by as much relatively.
        steep = case.anchor * sound(distance.exp())
        drift = epsilon * (1.0 + sound(stats.logp.abs()))
    token = kept.double()
    if made.token_weight is not None:
        token = token * made.token_weight.reshape(-1).double().abs()
    divisor: Tensor | float = 1.0
    if case.reduction == "mean":
        divisor = case.num_items or target_weight.sum()
        divisor = torch.as_tensor(divisor).where(torch.as_tensor(divisor) != 0, 1.0)
    share = made.upstream.double().abs().expand(case.shape).reshape(-1) * token / divisor

    scale = torch.maximum(
        share * (own + spread + added) / case.temperature, sound(exact.gradient.abs()).amax(1)
    )
    through = share * own / case.temperature * through_the_gate(case, stats)
    gradient_slack = relative * exact.gradient.abs() + (free * scale + epsilon * through).unsqueeze(1)
    gradient_slack = gradient_slack + (drift * share * steep / case.temperature).unsqueeze(1)
    slope = own * sound(stats.gate).clamp(max=1.0) + spread + added
    rows_slack = relative * exact.rows.abs() + (epsilon * slope + drift * added) * token
    rows_slack = rows_slack + ORACLE * token * own * (1.0 + sound(stats.logp.abs()))
    statistics_slack = {name: relative * getattr(stats, name).abs() + free for name in STATISTICS}
    size = logit_size(case, made)
    rows_slack = rows_slack + epsilon * token * spread * size
    if double:
        # Both round the largest exponent, in units of the logits' size.
        reach = 1e-15 * size
        gradient_slack = gradient_slack + (reach * scale).unsqueeze(1)
        rows_slack = rows_slack + reach * token * slope
        statistics_slack = {name: slack + reach for name, slack in statistics_slack.items()}
    elif not case.plain:
        rough = run(case, made, torch.float32)
        rows_slack = rows_slack + 2 * error(rough.rows, exact.rows)
        gradient_slack = gradient_slack + 2 * error(rough.gradient, exact.gradient).amax(1, keepdim=True)
        for name in STATISTICS:
            wrong = error(getattr(rough.statistics, name), getattr(stats, name))
            statistics_slack[name] = statistics_slack[name] + 2 * wrong
    loss_slack = rows_slack
    if case.reduction != "none":
        # A sum of rows of both signs is rounded at the size of its terms.
        loss_slack = ((rows_slack + epsilon * exact.rows.abs()).sum() / divisor).reshape(1)
    # The focus index of a row without statistics is 1 or NaN, as its formula has it.
    statistics_slack["alpha"] = statistics_slack["alpha"].masked_fill(stats.logp.isnan(), torch.inf)
    # An exact gate on a target of probability 0: the oracle's autograd multiplies 0 by inf.
    hopeless = stats.logp.isneginf() & exact.gradient.isnan().any(1)
    gradient_slack = gradient_slack.masked_fill(hopeless.unsqueeze(1), torch.inf)
    exact.gradient[hopeless] = 0.0
    return Truth(exact.loss, loss_slack, exact.gradient, gradient_slack, stats, statistics_slack)


def through_the_gate(case: Case, stats: RowStatistics) -> Tensor:
    """|dL/dS| + |dL/dH| + |dL/d(max p)| [N] of an exact objective; 0 where the gate is held."""
    if case.objective.detach:
        return torch.zeros_like(stats.logp)
    names = ("collision", "entropy", "max_prob")
    leaves = {name: getattr(stats, name).clone().requires_grad_() for name in names}
    valid = torch.ones_like(stats.correct)
    loss, _, _ = reference.row_objective(case.objective, {"logp": stats.logp, **leaves}, valid)
    if not loss.requires_grad:
        return torch.zeros_like(stats.logp)
    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    return sum((sound(g.abs()) for g in found if g is not None), torch.zeros_like(stats.logp))


def logit_size(case: Case, made: Tensors) -> Tensor:
    """Largest |z| [N] of what a loss sees, infinities aside."""
    z = sound(made.logits.double().abs()).reshape(-1, case.vocabulary).amax(1)
    return (z if case.softcap is None else z.clamp(max=case.softcap)) / case.temperature


def sound(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def error(rough: Tensor, exact: Tensor) -> Tensor:
    """|rough - exact|, 0 where either is no number: what is not finite excuses nothing."""
    return sound((rough.double() - exact).abs())


def excess(actual: Tensor, exact: Tensor, slack: Tensor) -> float:
    """Largest |actual - exact| over what is allowed; infinities and NaN have to be the same."""
    actual, exact = actual.double(), exact.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan()) | slack.isposinf()
    ratio = torch.where(same, 0.0, (actual - exact).abs() / slack)
    return ratio.nan_to_num(torch.inf).max().item() if ratio.numel() else 0.0


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from x, rounded to `dtype`, to its neighbour away from 0; 0 for fp32 and fp64."""
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros_like(x)
    rounded = x.abs().to(dtype).clamp(max=torch.finfo(dtype).max)
    return sound((torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded).double())


def gradient_excess(actual: Tensor, exact: Tensor, slack: Tensor, roundings: int = 1) -> float:
    """As `excess`, for a gradient that was rounded to its dtype, usually once; beyond its range it is inf."""
    dtype = actual.dtype
    beyond = exact.abs() >= 0.999 * torch.finfo(dtype).max
    same = beyond & (actual.isinf() | (actual.abs() > 0.99 * torch.finfo(dtype).max))
    exact = torch.where(same, actual.double(), exact)
    return excess(actual, exact, slack + roundings * ulp(exact, dtype) + torch.finfo(torch.float32).tiny)
