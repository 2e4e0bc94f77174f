"""Laws that two calls have to obey together: what changes nothing, what only scales, what only moves.

Each law takes a case and gives the two calls that have to agree; both may err what `bounds` allows the case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from backends_in_small import small
from bounds import excess, truth, ulp
from cases import Case, Tensors, keywords, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, cases
from torch import Tensor

from deft_kernels import deft_loss, objectives

pytestmark = pytest.mark.filterwarnings("ignore:.*inplace=True with:RuntimeWarning")
FEWER = settings(max_examples=max(1, settings().max_examples // 25))


class Results(NamedTuple):
    loss: Tensor  # [N] or [1], float64
    gradient: Tensor  # [N, V], float64


class Agreement(NamedTuple):
    """What has to agree, and the case whose bounds apply."""

    left: Results
    right: Results
    case: Case
    made: Tensors


Call = Callable[[Case, Tensors], Results]


def caller(backend: str) -> Call:
    def call(case: Case, made: Tensors) -> Results:
        leaf = made.logits.detach().clone().requires_grad_()
        with small(backend, case.block, case.vocabulary, case.seed):
            loss = deft_loss(
                leaf,
                made.labels,
                inplace=case.inplace,
                grad_in_forward=case.grad_in_forward,
                backend=backend,
                **keywords(case, made),
            )
            loss.backward(made.upstream.to(loss.dtype))
        assert leaf.grad is not None
        return Results(loss.detach().double().reshape(-1), leaf.grad.double().reshape(-1, case.vocabulary))

    return call


def steady(case: Case) -> Case:
    """A batch of rows without order and without what depends on the other rows."""
    objective = replace(case.objective, low=0.0, high=1.0)
    if objective.needs_batch:
        objective = replace(objective, mean_prob=0.3)
    return replace(case, shape=(case.rows,), shift=False, inplace=False, layout="contiguous",
                   grad_in_forward=None, objective=objective)  # fmt: skip


def permuted_columns(case: Case, call: Call) -> Agreement:
    """The vocabulary in another order: the same loss, the gradient in that order."""
    case = replace(steady(case), ignore_index=-100, label_dtype=torch.int64)
    made = tensors(case)
    order = torch.randperm(case.vocabulary, generator=torch.Generator().manual_seed(case.seed))
    place = order.argsort()
    moved = made._replace(
        logits=made.logits[:, order],
        labels=torch.where(made.labels < 0, made.labels, place[made.labels.clamp(min=0)]),
        class_weight=None if made.class_weight is None else made.class_weight[order],
    )
    loss, gradient = call(case, moved)
    return Agreement(Results(loss, gradient[:, place]), call(case, made), case, made)


def permuted_rows(case: Case, call: Call) -> Agreement:
    """The rows in another order: so their losses and gradients; a mean or a sum as it was."""
    case = steady(case)
    made = tensors(case)
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(case.seed))
    moved = rows_of(made, order)
    whole = call(case, made)
    loss = whole.loss[order] if case.reduction == "none" else whole.loss
    return Agreement(call(case, moved), Results(loss, whole.gradient[order]), case, moved)


def rows_of(made: Tensors, index: Tensor | slice) -> Tensors:
    return made._replace(
        logits=made.logits[index],
        labels=made.labels[index],
        targets=made.targets[index],
        token_weight=None if made.token_weight is None else made.token_weight[index],
        alpha=made.alpha if made.alpha is None or made.alpha.dim() == 0 else made.alpha[index],
        reference_logp=None if made.reference_logp is None else made.reference_logp[index],
        upstream=made.upstream[index] if made.upstream.dim() else made.upstream,
    )


def split_batch(case: Case, call: Call) -> Agreement:
    """Two parts that divide by the whole's denominator add up to the whole."""
    case = replace(steady(case), reduction="mean")
    made = tensors(case)
    counted = made.targets[made.targets != case.ignore_index]
    weight = torch.ones(case.vocabulary) if made.class_weight is None else made.class_weight
    total = float(weight.double()[counted].sum())
    # 0/0, a NaN, has no parts; a batch in which nothing counts is 0 whatever divides it.
    assume(case.num_items or total or not len(counted))
    items = case.num_items or total or 1.0
    parts = []
    for span in (slice(0, case.rows // 2), slice(case.rows // 2, case.rows)):
        part = rows_of(made, span)
        parts.append(call(replace(case, shape=(len(part.labels),), num_items=items), part))
    added = Results(parts[0].loss + parts[1].loss, torch.cat([part.gradient for part in parts]))
    return Agreement(added, call(case, made), case, made)


def summed_rows(case: Case, call: Call) -> Agreement:
    """A sum is the sum of the rows, each with the sum's upstream."""
    case = replace(case, reduction="none", num_items=None, inplace=False, grad_in_forward=None)
    made = tensors(case)
    one = torch.tensor(case.upstream, dtype=made.upstream.dtype)
    loss, gradient = call(case, made._replace(upstream=one.expand(case.shape)))
    case = replace(case, reduction="sum")
    made = made._replace(upstream=one)
    return Agreement(Results(loss.sum().reshape(1), gradient), call(case, made), case, made)


def mean_times_items(case: Case, call: Call) -> Agreement:
    """A mean over `num_items`, times these, is the sum."""
    case = replace(case, reduction="sum", num_items=None, inplace=False, grad_in_forward=None)
    made = tensors(case)
    loss, gradient = call(replace(case, reduction="mean", num_items=8.0), made)
    return Agreement(Results(8 * loss, 8 * gradient), call(case, made), case, made)


def scaled_upstream(case: Case, call: Call) -> Agreement:
    """Three times the upstream, three times the gradient; the loss does not know."""
    case = replace(case, inplace=False, upstream=1.0)
    made = tensors(case)
    loss, gradient = call(case, made._replace(upstream=made.upstream * 3))
    return Agreement(Results(loss, gradient / 3), call(case, made), case, made)


def temperature(case: Case, call: Call) -> Agreement:
    """A temperature of 4 is logits of a quarter."""
    case = replace(steady(case), softcap=None, temperature=4.0)
    made = tensors(case)
    quarter = made._replace(logits=made.logits * 0.25)
    loss, gradient = call(replace(case, temperature=1.0), quarter)
    return Agreement(Results(loss, gradient / 4), call(case, made), case, made)


def raised_logits(case: Case, call: Call) -> Agreement:
    """A constant added to all logits moves lse alone. Multiples of 1/4 below 8, so the sum is exact."""
    case = replace(steady(case), softcap=None, z_loss=0.0, kinds=("plain",))
    made = tensors(case)
    made = made._replace(logits=((made.logits * 4).round() / 4).clamp(-7.5, 7.5))
    return Agreement(call(case, made._replace(logits=made.logits + 16)), call(case, made), case, made)


def masked_columns(case: Case, call: Call) -> Agreement:
    """Columns of -inf at the end are no part of the vocabulary."""
    case = replace(steady(case), label_smoothing=0.0, softcap=None)  # which would make -inf a number
    made = tensors(case)
    more = 1 + case.seed % 9
    wider = made._replace(logits=torch.nn.functional.pad(made.logits, (0, more), value=-torch.inf))
    if made.class_weight is not None:
        wider = wider._replace(class_weight=torch.nn.functional.pad(made.class_weight, (0, more), value=0.5))
    loss, gradient = call(replace(case, vocabulary=case.vocabulary + more), wider)
    counted = made.targets != case.ignore_index
    assert not gradient[counted, case.vocabulary :].any()
    return Agreement(Results(loss, gradient[:, : case.vocabulary]), call(case, made), case, made)


def large_softcap(case: Case, call: Call) -> Agreement:
    """A cap far above the logits caps nothing."""
    case = replace(steady(case), softcap=1e12, kinds=("plain", "shifted" if case.seed % 2 else "uniform"))
    made = tensors(case)
    made = made._replace(logits=made.logits.clamp(-40, 40))
    return Agreement(call(case, made), call(replace(case, softcap=None), made), case, made)


def neutral_settings(case: Case, call: Call) -> Agreement:
    """Weights of 1 and a smoothing of 0 are none."""
    case = replace(case, label_smoothing=0.0, token_weight=None, class_weight=None)
    made = tensors(case)
    ones = made._replace(token_weight=torch.ones(case.shape), class_weight=torch.ones(case.vocabulary))
    return Agreement(call(case, ones), call(case, made), case, made)


def weighted_classes(case: Case, call: Call) -> Agreement:
    """Class weights are weights of their rows, where no smoothing, z-loss or anchor goes past them."""
    case = replace(steady(case), label_smoothing=0.0, z_loss=0.0, reduction="sum", num_items=None,
                   class_weight="positive", token_weight=None, anchor=0.0)  # fmt: skip
    made = tensors(case)
    assert made.class_weight is not None
    rows = made.class_weight[torch.where(made.targets == case.ignore_index, 0, made.targets)]
    right = call(case, made._replace(class_weight=None, token_weight=rows))
    return Agreement(call(case, made), right, case, made)


def paths(case: Case, call: Call) -> Agreement:
    """Where the gradient is made, forward or backward, and in which tensor, changes nothing."""
    case = replace(steady(case), reduction="sum", num_items=None, upstream=1.0)
    made = tensors(case)
    odd = replace(case, grad_in_forward=case.seed % 3 > 0, inplace=case.seed % 2 > 0)
    return Agreement(call(odd, made), call(replace(case, grad_in_forward=False), made), case, made)


def garbage_where_ignored(case: Case, call: Call) -> Agreement:
    """What stands in rows that do not count is not read."""
    case = replace(steady(case), ignored=0.5)
    made = tensors(case)
    ignored = (made.targets == case.ignore_index).unsqueeze(1)
    zeros = made._replace(logits=made.logits.masked_fill(ignored, 0.0))
    nan = made._replace(logits=made.logits.masked_fill(ignored, torch.nan))
    return Agreement(call(case, nan), call(case, zeros), case, zeros)


def one_name_for_another(case: Case, call: Call) -> Agreement:
    """Members of a family that coincide."""
    pairs = (
        (objectives.tsallis(0.0), objectives.nll()),
        (objectives.tsallis(1.0), objectives.neg_prob()),
        (objectives.tsallis(q=0.25), objectives.tsallis(0.75)),
        (objectives.rational(0.0), objectives.nll()),
        (objectives.nll().within("p>=0"), objectives.nll()),
        (objectives.cayley(mean_prob=1.0).within((0.0, 1.0)), objectives.cayley(mean_prob=1.0)),
    )
    one, other = pairs[case.seed % len(pairs)]
    case = replace(steady(case), objective=one, alpha=None)
    made = tensors(case)
    return Agreement(call(case, made), call(replace(case, objective=other), made), case, made)


LAWS = (
    permuted_columns, permuted_rows, split_batch, summed_rows, mean_times_items, scaled_upstream, temperature,
    raised_logits, masked_columns, large_softcap, neutral_settings, weighted_classes, paths,
    garbage_where_ignored, one_name_for_another,
)  # fmt: skip


def check(law: Callable[[Case, Call], Agreement], case: Case, backend: str) -> None:
    left, right, case, made = law(case, caller(backend))
    allowed = truth(case, made)
    assert excess(left.loss, right.loss, 2 * allowed.loss_slack) <= 1.0
    slack = (
        2 * allowed.gradient_slack + 2 * ulp(allowed.gradient, case.dtype) + torch.finfo(torch.float32).tiny
    )
    if case.dtype == torch.float16:
        # Scaled by up to 8, below its normal numbers.
        slack = slack + 2.0**-20
    assert excess(left.gradient, right.gradient, slack) <= 1.0


laws = st.sampled_from(LAWS)


@given(laws, cases(sound=True, wide=300))
def test_laws_of_the_pytorch_backend(law: Callable[[Case, Call], Agreement], case: Case) -> None:
    check(law, case, "torch")


@FEWER
@given(laws, cases(dtypes=DTYPES[:3], sound=True, wide=100))
def test_laws_of_the_kernels(law: Callable[[Case, Call], Agreement], case: Case) -> None:
    check(law, case, "triton")
