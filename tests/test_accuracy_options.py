"""The options that change the logits or the loss, in every dtype, against the float64 oracle.

A soft cap that was right in fp32 once divided bf16 logits in bf16, and every test with one ran in fp32.
One row of every temperament in one call: V = 300 is more than one tile of a warp, and no multiple of one.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rows import DTYPES, KINDS, gradient_excess, loss_excess, make
from torch import Tensor

from deft_kernels import deft_loss, fused_linear_deft_loss, objectives

V = 300
OPTIONS = {
    "softcap": {"softcap": 30.0},
    "softcap, saturated": {"softcap": 2.5},
    "temperature below 1": {"temperature": 0.6},
    "temperature above 1": {"temperature": 2.5},
    "label smoothing": {"label_smoothing": 0.1},
    "class weights": {"weight": True},
    "z-loss": {"z_loss": 1e-3},
    "softcap and temperature": {"softcap": 7.0, "temperature": 0.6},
    "all": {"softcap": 30.0, "temperature": 1.3, "label_smoothing": 0.1, "weight": True, "z_loss": 1e-3},
}
OBJECTIVES = {
    "nll": objectives.nll(),
    "deft": objectives.deft(),
    "eaft": objectives.eaft(),
    "deft, exact": objectives.deft(math.inf, detach=False),
    "deft 1, exact": objectives.deft(1, detach=False),
}


def every_kind(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = [make(kind, 1, V, dtype, seed=i) for i, kind in enumerate(KINDS)]
    return torch.cat([z for z, _ in made]), torch.cat([y for _, y in made])


def placed(name: str, device: str) -> dict[str, object]:
    """The option's keywords; among the class weights every seventh is 0."""
    options = dict(OPTIONS[name])
    if options.pop("weight", False):
        weight = torch.linspace(0.25, 2.0, V, device=device)
        weight[::7] = 0.0
        options["weight"] = weight
    return options


def cases():
    """Every option in every dtype with the default objective; with the others the two that say most."""
    for name in OPTIONS:
        for dtype in DTYPES:
            yield "deft", name, dtype
    for objective in OBJECTIVES:
        if objective != "deft":
            yield objective, "softcap", torch.float16
            yield objective, "all", torch.bfloat16


@pytest.mark.sampled
@pytest.mark.parametrize(("objective", "name", "dtype"), list(cases()), ids=str)
def test_options_within_the_stated_bounds(objective, name, dtype, backend, device):
    """Loss and gradient by both ways of making it; bounds as in `test_accuracy`."""
    on = device if backend == "triton" else "cpu"
    z, y = every_kind(dtype)
    scale = torch.linspace(-0.8, 1.0, len(y))
    options = placed(name, on)
    mine = z.to(on, copy=True).requires_grad_()
    loss = deft_loss(
        mine, y.to(on), objective=OBJECTIVES[objective], reduction="none", backend=backend, **options
    )
    loss.backward(scale.to(on))
    fused = z.to(on, copy=True).requires_grad_()
    total = deft_loss(
        fused, y.to(on), objective=OBJECTIVES[objective], reduction="sum", token_weight=scale.to(on),
        grad_in_forward=True, backend=backend, **options,
    )  # fmt: skip
    total.backward()

    exact = z.double().requires_grad_()
    oracle, stats = deft_loss(
        exact, y, objective=OBJECTIVES[objective], reduction="none", return_stats=True, backend="reference",
        **placed(name, "cpu"),
    )  # fmt: skip
    oracle.backward(scale.double())
    assert mine.grad is not None and fused.grad is not None and exact.grad is not None
    assert loss_excess(loss.detach().cpu().double(), oracle.detach(), stats.gate) <= 1.0
    assert gradient_excess(mine.grad.cpu(), exact.grad) <= 1.0
    assert gradient_excess(fused.grad.cpu(), exact.grad) <= 1.0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_options_in_float64(objective, name):
    """The PyTorch backend alone has it: twelve digits of the loss, and of the gradient by both ways."""
    z, y = every_kind(torch.float64)
    keywords = {"objective": OBJECTIVES[objective], **placed(name, "cpu")}
    outcomes = []
    for own in ({"grad_in_forward": True}, {"grad_in_forward": False}, {"backend": "reference"}):
        x = z.clone().requires_grad_()
        loss = deft_loss(x, y, **{"reduction": "sum", **keywords, **own})
        loss.backward(torch.tensor(1.7, dtype=torch.float64))
        outcomes.append((loss.detach(), x.grad))
    exact_loss, exact = outcomes.pop()
    assert exact is not None
    for loss, gradient in outcomes:
        torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=0.0)
        assert gradient is not None and gradient_excess(gradient, exact) <= 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softcap_of_the_linear_call_in_half_precision(dtype, backend, device):
    """As in Gemma 2. The logits are those of F.linear, in its dtype; so the loss is held to the same bound,
    and the gradient of hidden to one rounding of each of dlogits' entries and one of the result."""
    on = device if backend == "triton" else "cpu"
    generator = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, 24, generator=generator) * 2 for n in (5, 131))
    hidden, head = hidden.to(dtype), head.to(dtype)
    y = torch.tensor([3, 77, 130, 0, 64])
    x = hidden.to(on, copy=True).requires_grad_()
    loss = fused_linear_deft_loss(
        x, head.to(on), y.to(on), softcap=30.0, objective="nll", reduction="none", backend=backend
    )
    loss.sum().backward()
    logits = F.linear(hidden.to(on), head.to(on)).cpu().double().requires_grad_()
    exact, stats = deft_loss(
        logits, y, softcap=30.0, objective="nll", reduction="none", return_stats=True, backend="reference"
    )
    exact.sum().backward()
    assert x.grad is not None and logits.grad is not None
    assert loss_excess(loss.detach().cpu().double(), exact.detach(), stats.gate) <= 1.0
    step = torch.finfo(dtype).eps
    allowed = step * (logits.grad.abs() @ head.double().abs() + (logits.grad @ head.double()).abs())
    assert ((x.grad.cpu().double() - logits.grad @ head.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", ["nll", "deft"])
def test_slope_of_a_saturated_softcap(objective, dtype, backend, device):
    """1 - tanh^2 where tanh rounds to 1: the slope 1 / cosh^2 is small but not 0, and a large upstream (a
    loss scale, a sum of many rows) makes it count. Held to the relative bound alone, at |logits| / softcap up
    to 8, as the oracle itself takes the difference, in float64."""
    on = device if backend == "triton" else "cpu"
    z = (torch.linspace(-16.0, 16.0, 3 * 200).reshape(200, 3).t() + 0.05).to(dtype)
    y = torch.tensor([7, 99, 180])
    x, exact = z.to(on, copy=True).requires_grad_(), z.double().requires_grad_()
    # What the slope makes small stays among the normal numbers of every dtype.
    for source, labels, own in ((x, y.to(on), backend), (exact, y, "reference")):
        loss = deft_loss(
            source, labels, objective=OBJECTIVES[objective], softcap=2.0, reduction="sum", backend=own
        )
        (loss * 2.0**16).backward()
    assert x.grad is not None and exact.grad is not None
    relative = 3e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    normal = exact.grad.abs() > torch.finfo(dtype).tiny
    error = (x.grad.cpu().double() - exact.grad).abs() / exact.grad.abs()
    assert normal.sum() > 250
    assert error[normal].max() <= relative
