"""Values, statistics and gradients of `deft_loss` against the float64 oracle, whatever is asked together.

A hundred or so cases, always the same; many others, in a few minutes on one core:

    .venv/bin/python -m pytest tests/properties --examples 20000

A case that ever failed stays here as an example.
"""

from __future__ import annotations

import pytest
import torch
from backends_in_small import small
from bounds import STATISTICS, excess, gradient_excess, near_a_band, truth
from cases import Case, Tensors, keywords, tensors
from hypothesis import assume, event, example, given, settings
from strategies import DTYPES, cases

from deft_kernels import deft_loss, objectives

# That fp16 logits overwritten in the forward lose small entries under a loss scale is said once; see `check`.
pytestmark = pytest.mark.filterwarnings("ignore:.*inplace=True with:RuntimeWarning")
FEWER = settings(max_examples=max(1, settings().max_examples // 25))


def check(case: Case, backend: str) -> None:
    made = tensors(case)
    expected = truth(case, made)
    assume(not near_a_band(case, expected.statistics))
    event(f"{case.objective.name}, {case.reduction}")
    leaf = made.logits.detach().requires_grad_()
    before, storage = made.logits.clone(), made.storage.clone()
    with small(backend, case.block, case.vocabulary, case.seed):
        loss, stats = deft_loss(
            leaf,
            made.labels,
            inplace=case.inplace,
            grad_in_forward=case.grad_in_forward,
            return_stats=True,
            backend=backend,
            **keywords(case, made),
        )
        loss.backward(made.upstream.to(loss.dtype))
    gradient = leaf.grad
    assert gradient is not None and gradient.dtype == case.dtype and gradient.shape == made.logits.shape
    assert excess(loss.detach().reshape(-1), expected.loss, expected.loss_slack) <= 1.0
    # Overwritten logits hold a gradient rounded for an upstream of 1, and then that one scaled.
    twice = case.inplace and bool(case.grad_in_forward) and case.upstream != 1.0
    slack = expected.gradient_slack
    if twice and case.dtype == torch.float16:
        slack = slack + 2.0**-24 * abs(case.upstream)
    flat = gradient.reshape(-1, case.vocabulary)
    assert gradient_excess(flat, expected.gradient, slack, 1 + twice) <= 1.0
    for name in STATISTICS:
        mine, theirs = getattr(stats, name).reshape(-1), getattr(expected.statistics, name)
        assert excess(mine, theirs, expected.statistics_slack[name]) <= 1.0, name
    if case.softcap is None:  # which may make neighbours equal, in fp32 others than in fp64
        known = ~expected.statistics.logp.isnan()
        assert torch.equal(stats.correct.reshape(-1)[known], expected.statistics.correct[known])
    untouched(case, made, before, storage)


def untouched(case: Case, made: Tensors, before: torch.Tensor, storage: torch.Tensor) -> None:
    """The logits as they were, unless they were given away; their neighbours in any case."""
    if not case.inplace:
        torch.testing.assert_close(made.logits, before, rtol=0, atol=0, equal_nan=True)
        return
    assert torch.equal(made.storage[made.outside], storage[made.outside])


# The soft cap in half precision was divided in the logits' dtype.
@example(Case(shape=(), vocabulary=2, dtype=torch.bfloat16, softcap=0.5595, objective=objectives.nll()))
@example(Case(shape=(4,), vocabulary=9, dtype=torch.float16, softcap=20.0, kinds=("peaked",)))
# Bounds that were too narrow: cancellation through the entropy, p below fp32, the oracle's own rounding.
@example(Case((3, 3), 8, kinds=("wild",), seed=5252, objective=objectives.eaft(top_k=1.5, detach=False)))
@example(Case((2, 3), 8, kinds=("wild",), seed=1154, objective=objectives.dft(detach=False)))
@example(Case((3, 4), 5, kinds=("wild",), seed=5252, objective=objectives.eaft(top_k=1.5)))
@example(Case((), 3, kinds=("impossible",), objective=objectives.eaft(top_k=1.5, detach=False)))
@given(cases())
def test_the_pytorch_backend(case: Case) -> None:
    check(case, "torch")


@FEWER
@given(cases(dtypes=DTYPES[:3], wide=150))
def test_the_kernels(case: Case) -> None:
    check(case, "triton")
