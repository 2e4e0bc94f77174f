"""The differentiable statistics, alone and under functions as objectives, and the row formula on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from backends_in_small import small
from bounds import EPSILON, excess, logit_size, sound, ulp
from cases import Case, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rows import FREE, RELATIVE
from strategies import DTYPES, OBJECTIVES, cases
from torch import Tensor

from deft_kernels import RowStatistics, deft_loss, gated_loss, reference, row_statistics
from deft_kernels.objectives import Objective

FEWER = settings(max_examples=max(1, settings().max_examples // 25))
NAMES = ("logp", "lse", "collision", "entropy", "max_prob")
# The rows that no option makes NaN or infinite, and whose largest logits do not all but tie.
KINDS = ("plain", "uniform", "confident", "conflict", "shifted", "lowered", "masked", "peaked")

FUNCTIONS: dict[str, Callable[[RowStatistics], Tensor]] = {
    "focal": lambda r: -((1 - r.logp.exp()) ** 2) * r.logp,
    "entropy": lambda r: r.entropy - 0.3 * r.logp,
    "collision": lambda r: r.collision**2 + r.lse * 0.1,
    "max_prob": lambda r: r.max_prob * r.entropy,
    "all": lambda r: r.logp * r.collision.detach() + r.lse**2 * 0.01 + r.entropy * r.max_prob,
    "none": lambda r: r.logp * 0.0 + 1.0,
}


def plain_case(case: Case) -> Case:
    """A case with what a function of statistics accepts, and rows on which it is smooth."""
    kinds = tuple(kind if kind in KINDS else "plain" for kind in case.kinds)
    if case.dtype in (torch.bfloat16, torch.float16):
        # A soft cap may make the largest logits equal in one precision and not in the other.
        case = replace(case, softcap=None)
    return replace(case, kinds=kinds, inplace=False, grad_in_forward=None, vocabulary=max(case.vocabulary, 2))


def check_function(case: Case, name: str, backend: str) -> None:
    case = plain_case(case)
    made = tensors(case)
    options = {
        "reduction": "none",
        "ignore_index": case.ignore_index,
        "token_weight": made.token_weight,
        "weight": made.class_weight,
        "shift": case.shift,
        "softcap": case.softcap,
        "temperature": case.temperature,
        "z_loss": case.z_loss,
    }
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.randn(case.shape, generator=generator)

    def of(dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
        ignored = (made.targets == case.ignore_index).reshape(*case.shape, 1)
        leaf = made.logits.detach() if where == backend else made.logits.to(dtype).masked_fill(ignored, 0.0)
        leaf = leaf.requires_grad_()
        loss = deft_loss(leaf, made.labels, objective=FUNCTIONS[name], backend=where, **options)
        loss.backward(upstream.to(loss.dtype))
        assert leaf.grad is not None
        return loss.detach().reshape(-1).double(), leaf.grad.reshape(-1, case.vocabulary).double()

    with small(backend, case.block, case.vocabulary, case.seed):
        loss, gradient = of(case.dtype, backend)
    exact_loss, exact = of(torch.float64, "reference")
    rough_loss, rough = of(torch.float32, "reference")
    size = logit_size(case, made)
    double = case.dtype == torch.float64
    epsilon = 1e-14 if double else EPSILON
    weight = (
        torch.ones(case.rows) if made.token_weight is None else made.token_weight.reshape(-1).double().abs()
    )
    if made.class_weight is not None:
        weight = weight * made.class_weight.max()
    loss_slack = (1e-12 if double else RELATIVE) * exact_loss.abs() + 4 * epsilon * weight * (1 + size)
    loss_slack = loss_slack + 2 * sound((rough_loss - exact_loss).abs())
    assert excess(loss, exact_loss, loss_slack) <= 1.0
    slack = (1e-12 if double else RELATIVE) * exact.abs()
    largest = torch.maximum(exact.abs().amax(1), weight * upstream.reshape(-1).abs() / case.temperature)
    slack = slack + ((1e-13 if double else FREE) * largest).unsqueeze(1)
    slack = slack + 2 * sound((rough - exact).abs()).amax(1, keepdim=True) + ulp(exact, case.dtype)
    assert excess(gradient, exact, slack) <= 1.0


functions = st.sampled_from(sorted(FUNCTIONS))


@given(cases(), functions)
def test_functions_of_the_statistics(case: Case, name: str) -> None:
    check_function(case, name, "torch")


@FEWER
@given(cases(dtypes=DTYPES[:3], wide=120), functions)
def test_functions_of_the_statistics_on_the_kernels(case: Case, name: str) -> None:
    check_function(case, name, "triton")


def check_row_formula(objective: Objective, seed: int, double: bool) -> None:
    """`gated_loss` from statistics given in fp32 or fp64, against the oracle's formula in fp64."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    count = 1 + seed % 7
    # Statistics of some row each, not numbers that no row could have.
    z = torch.randn(count, 9, generator=generator, dtype=torch.float64) * (1 + seed % 5)
    labels = torch.randint(0, 9, (count,), generator=generator)
    stats = row_statistics(z, labels, backend="reference")
    valid = torch.rand(count, generator=generator) < 0.8
    given = {"logp": stats.logp, "log_collision": stats.collision.log()}
    given |= {"entropy": stats.entropy, "max_prob": stats.max_prob}
    given = {name: value.to(dtype) for name, value in given.items()}
    upstream = torch.randn(count, generator=generator, dtype=torch.float64)

    mine = {name: value.clone().requires_grad_() for name, value in given.items()}
    loss = gated_loss(**mine, objective=objective, valid=valid)
    loss.backward(upstream.to(dtype))

    exact = {name: value.double().clone().requires_grad_() for name, value in given.items()}
    rows = {**exact, "collision": exact["log_collision"].exp()}
    expected, _, _ = reference.row_objective(objective, rows, valid)
    p = exact["logp"].detach().exp()
    kept = valid & (p >= objective.low) & (p <= objective.high)
    ends = [end for end in (objective.low, objective.high) if 0.0 < end < 1.0]
    assume(all(bool(((p - end).abs() > 1e-5).all()) for end in ends))
    expected = torch.where(kept, expected, 0.0)
    (expected * upstream).sum().backward()

    relative, free = (1e-11, 1e-13) if double else (RELATIVE, FREE)
    assert loss.dtype == dtype
    assert excess(loss.detach(), expected.detach(), relative * expected.detach().abs() + free) <= 1.0
    for name, theirs in exact.items():
        wanted = torch.zeros_like(p) if theirs.grad is None else theirs.grad
        found = mine[name].grad
        found = torch.zeros_like(p) if found is None else found
        largest = wanted.abs().max().clamp(min=1.0)
        assert excess(found, wanted, relative * wanted.abs() + free * largest) <= 1.0, name


@given(OBJECTIVES, st.integers(0, 2**16), st.booleans())
def test_the_row_formula(objective: Objective, seed: int, double: bool) -> None:
    check_row_formula(objective, seed, double)
