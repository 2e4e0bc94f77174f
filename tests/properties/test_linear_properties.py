"""`fused_linear_deft_loss` against the float64 oracle, with every keyword and chunks of odd sizes.

Hidden states and weights are multiples of 1/2 below 2, so that every logit is exact in every dtype and the
order in which a product adds up does not matter; what is judged is all that follows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from backends_in_small import small
from bounds import EPSILON, Truth, excess, near_a_band, truth, ulp
from cases import Case, keywords, reference_model, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, cases, numbers, sometimes
from torch import Tensor

from deft_kernels import fused_linear_deft_loss

FEWER = settings(max_examples=max(1, settings().max_examples // 25))


@dataclass(frozen=True)
class Head:
    """width: D.  chunk: bytes of the buffer.  autocast: fp32 tensors, products in bf16."""

    width: int = 4
    bias: bool = False
    logit_scale: float = 1.0
    chunk: int = 1
    autocast: bool = False
    frozen: str = ""


heads = st.builds(
    Head,
    width=st.integers(1, 8),
    bias=st.booleans(),
    logit_scale=sometimes(st.sampled_from([0.0625, 0.5, 2.0]) | numbers(0.1, 3.0), 1.0),
    chunk=st.integers(1, 2000),
    autocast=sometimes(st.just(True), False, 4),
    frozen=st.sampled_from(["", "", "hidden", "weight", "bias"]),
)


def linear_case(case: Case, head: Head) -> Case:
    kinds = tuple(kind if kind in ("plain", "uniform") else "plain" for kind in case.kinds)
    dtype = torch.bfloat16 if head.autocast else case.dtype
    # The gradient of the logits, which nobody sees, has fp16's range, as it has between F.linear and a loss.
    upstream = min(case.upstream, 100.0) if dtype == torch.float16 else case.upstream
    return replace(
        case,
        kinds=kinds,
        inplace=False,
        grad_in_forward=None,
        dtype=dtype,
        layout="contiguous",
        upstream=upstream,
    )


def steps(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator).double() / 2


def check(case: Case, head: Head, backend: str) -> None:
    case = linear_case(case, head)
    made = tensors(case)
    generator = torch.Generator().manual_seed(case.seed + 2)
    given = {
        "hidden": steps((*case.shape, head.width), generator),
        "weight": steps((case.vocabulary, head.width), generator),
        "bias": steps((case.vocabulary,), generator) if head.bias else None,
    }
    ignored = (made.targets == case.ignore_index).reshape(*case.shape, 1)
    logits = torch.nn.functional.linear(given["hidden"], given["weight"], given["bias"])
    # The oracle of the logits: its gradient and what it may err, which the products then spread.
    scaled = replace(case, softcap=case.softcap and case.softcap / head.logit_scale,
                     temperature=case.temperature / head.logit_scale)  # fmt: skip
    of_logits = made._replace(logits=logits.masked_fill(ignored, 0.0).to(case.dtype))
    if case.anchor > 0:
        of_logits = of_logits._replace(reference_logp=reference_model(scaled, of_logits.logits, made.targets))
    expected = truth(scaled, of_logits)
    assume(not near_a_band(scaled, expected.statistics))

    stored = torch.float32 if head.autocast else case.dtype
    leaves = {name: None if x is None else x.to(stored) for name, x in given.items()}
    if leaves["hidden"] is not None:
        # Rows that do not count are never multiplied.
        leaves["hidden"] = leaves["hidden"].masked_fill(ignored, torch.nan)
    for name, leaf in leaves.items():
        if leaf is not None and name != head.frozen:
            leaf.requires_grad_()
    options: dict[str, Any] = keywords(case, of_logits)
    options["class_weight"] = options.pop("weight")
    with (
        small(backend, case.block, case.vocabulary, case.seed),
        torch.autocast("cpu", torch.bfloat16, enabled=head.autocast),
    ):
        loss = fused_linear_deft_loss(
            **leaves, labels=made.labels, logit_scale=head.logit_scale, chunk_bytes=head.chunk,
            backend=backend, **options,
        )  # fmt: skip
    loss.backward(made.upstream.to(loss.dtype))
    assert excess(loss.detach().reshape(-1), expected.loss, expected.loss_slack) <= 1.0
    judge(case, given, leaves, expected)


def judge(case: Case, given: dict[str, Any], leaves: dict[str, Any], expected: Truth) -> None:
    """Each gradient against the product of the oracle's, the slack of the logits' gradient spread alike."""
    g, slack = expected.gradient, expected.gradient_slack
    # The gradient of the logits is rounded to the products' dtype, for an upstream of 1 and once more scaled.
    slack = slack + 2 * ulp(g, case.dtype) + (2.0**-24 if case.dtype == torch.float16 else 0.0)
    hidden, weight = given["hidden"].reshape(len(g), given["hidden"].shape[-1]), given["weight"]
    products = {
        "hidden": (g @ weight, slack @ weight.abs(), g.abs() @ weight.abs()),
        "weight": (g.T @ hidden, slack.T @ hidden.abs(), g.T.abs() @ hidden.abs()),
        "bias": (g.sum(0), slack.sum(0), g.abs().sum(0)),
    }
    epsilon = 1e-15 if case.dtype == torch.float64 else EPSILON
    for name, leaf in leaves.items():
        if leaf is None or not leaf.requires_grad:
            continue
        exact, allowed, size = products[name]
        assert leaf.grad is not None, name
        allowed = allowed + 8 * epsilon * size + 2 * ulp(exact, leaf.dtype)
        assert excess(leaf.grad.reshape(exact.shape), exact, allowed) <= 1.0, name


@given(cases(wide=300, sound=True), heads)
def test_the_linear_call(case: Case, head: Head) -> None:
    check(case, head, "torch")


@FEWER
@given(cases(dtypes=DTYPES[:3], wide=100, sound=True), heads)
def test_the_linear_call_on_the_kernels(case: Case, head: Head) -> None:
    check(case, head, "triton")
