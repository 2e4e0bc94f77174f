"""Settings that would train something else than they say, or nothing: refused, or said aloud."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from rows import make
from torch import Tensor

from deft_kernels import deft_loss, fused_linear_deft_loss, gated_loss, objectives, reference
from deft_kernels.objectives import Objective
from deft_kernels.operators import in_place

N, V = 4, 19


def rows(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, labels = make("plain", N, V, dtype, seed=8)
    return logits.to(device), labels.to(device)


# Objectives put together by hand ---------------------------------------------------------------------------

WRONG = [
    ("family", ("deft", "deformd", "collision"), {}),
    ("family", ("deft", "", "collision"), {}),
    ("focus", ("deft", "deformed", "colision"), {}),
    ("focus", ("deft", "deformed", "prob"), {}),
    ("focus", ("deft", "rational", "shannon"), {}),
    ("focus", ("eaft", "weighted", "collision"), {}),
    ("alpha", ("tsallis", "deformed", "fixed"), {"alpha": -0.5}),
    ("alpha", ("tsallis", "deformed", "fixed"), {"alpha": math.nan}),
    ("alpha", ("deft", "deformed", "collision"), {"alpha": 0.5}),
    ("alpha", ("dft", "weighted", "prob"), {}),
    ("eps", ("deft", "deformed", "collision"), {"eps": -1e-6}),
    ("eps", ("tsallis", "deformed", "fixed"), {"alpha": 0.5, "eps": 1e-6}),
    ("eps", ("rational", "rational", "collision"), {"eps": 1e-6}),
    ("power", ("eaft", "weighted", "entropy"), {"power": 0.0}),
    ("power", ("deft", "deformed", "collision"), {"power": 2.0}),
    ("top_k", ("eaft", "weighted", "entropy"), {"top_k": 1.0}),
    ("top_k", ("deft", "deformed", "shannon"), {"top_k": 50.0}),
    ("detach", ("deft", "deformed", "collision"), {"detach": 0}),
    ("low", ("deft", "deformed", "collision"), {"low": -0.1}),
    ("high", ("deft", "deformed", "collision"), {"low": 0.5, "high": 0.4}),
    ("high", ("deft", "deformed", "collision"), {"high": 1.5}),
    ("mean_prob", ("cayley", "deformed", "cayley"), {"mean_prob": 1.5}),
    ("mean_prob", ("deft", "deformed", "collision"), {"mean_prob": 0.5}),
    ("batch_group", ("deft", "deformed", "collision"), {"batch_group": "0"}),
    ("batch_group", ("cayley", "deformed", "cayley"), {"batch_group": "0", "mean_prob": 0.5}),
]


@pytest.mark.parametrize(("field", "given", "others"), WRONG)
def test_objectives_that_are_none(field, given, others):
    """`Objective("deft", "deformd", "collision")` trained the rational form."""
    with pytest.raises((TypeError, ValueError), match=f"^{field}: "):
        Objective(*given, **others)


def test_a_changed_objective_is_checked_again():
    with pytest.raises(ValueError, match="^focus: "):
        replace(objectives.deft(), family="weighted")
    with pytest.raises(ValueError, match="^high: "):
        replace(objectives.deft(), low=0.5, high=0.2)


def test_statistics_are_no_loss(backend, device):
    """The description behind `row_statistics` has loss 0 and would train nothing."""
    logits, labels = rows(device)
    for call in (
        lambda o: deft_loss(logits, labels, objective=o, backend=backend),
        lambda o: fused_linear_deft_loss(logits, torch.eye(V, device=device), labels, objective=o),
        lambda o: gated_loss(torch.zeros(N), objective=o),
    ):
        with pytest.raises(ValueError, match="^objective: .*row_statistics"):
            call(objectives.of_statistics())


@pytest.mark.parametrize("made", [
    objectives.nll(), objectives.neg_prob(), objectives.tsallis(0.3), objectives.deft(), objectives.deft(1),
    objectives.cayley(), objectives.rational(), objectives.rational(0.4), objectives.dft(),
    objectives.eaft(2.0),
], ids=lambda o: f"{o.name} {o.focus} {o.alpha}")  # fmt: skip
def test_the_name_decides_nothing(made, backend, device):
    """Every backend reads the same fields, the oracle included."""
    logits, labels = rows(device)
    named = replace(made, name="mine")
    for own in (backend, "reference"):
        expected = deft_loss(logits, labels, objective=made, reduction="none", backend=own)
        loss = deft_loss(logits, labels, objective=named, reduction="none", backend=own)
        assert torch.equal(loss, expected)
    stats = reference.statistics(logits.double(), labels)
    valid = torch.ones(N, dtype=torch.bool, device=device)
    exact, _, _ = reference.row_objective(named, stats, valid)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


# Gradient in the forward -----------------------------------------------------------------------------------

IMPOSSIBLE = {
    "none": {"reduction": "none"},
    "cayley": {"objective": "cayley"},
    "band": {"objective": objectives.deft().within("p>=0.1")},
}


@pytest.mark.parametrize("evaluation", ["no_grad", "inference", "constant"])
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_gradient_in_the_forward_that_cannot_be(name, evaluation, backend, device):
    """It raises before the first training step too, in the evaluation with the same settings."""
    logits, labels = rows(device)
    logits.requires_grad_(evaluation != "constant")
    with torch.set_grad_enabled(evaluation == "constant"), torch.inference_mode(evaluation == "inference"):
        with pytest.raises(ValueError, match="^grad_in_forward: "):
            deft_loss(logits, labels, grad_in_forward=True, backend=backend, **IMPOSSIBLE[name])
        for wanted in (None, False):
            deft_loss(logits, labels, grad_in_forward=wanted, backend=backend, **IMPOSSIBLE[name])


def test_an_evaluation_that_can(backend, device):
    """What can be honoured raises nothing where no gradient is wanted."""
    logits, labels = rows(device)
    with torch.no_grad():
        loss = deft_loss(logits, labels, grad_in_forward=True, backend=backend)
    assert torch.equal(loss, deft_loss(logits, labels, grad_in_forward=False, backend=backend))


# float16 ---------------------------------------------------------------------------------------------------


def test_float16_in_place_in_the_forward_warns_once(backend, device):
    """The gradient is rounded before the loss scale is known: what is 0 by then stays 0."""
    in_place.warn_of_underflow.cache_clear()
    options = {"inplace": True, "grad_in_forward": True, "num_items": 2**16, "backend": backend}
    logits, labels = rows(device, torch.float16)

    def scaled(**options) -> Tensor:
        x = logits.clone().requires_grad_()
        (deft_loss(x, labels, **options) * 2.0**16).backward()
        return x.grad

    with pytest.warns(RuntimeWarning, match="float16 before the loss scale"):
        lossy = scaled(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scaled(**options), lossy)
        for other in ({"inplace": False}, {"grad_in_forward": False}):
            exact = scaled(**options | other)
            assert ((lossy == 0) & (exact != 0)).any()
    for dtype in (torch.bfloat16, torch.float32):
        in_place.warn_of_underflow.cache_clear()
        x = logits.to(dtype).requires_grad_()
        deft_loss(x * 1.0, labels, **options)


@pytest.mark.parametrize("upstream", [0.3, 1.7, -3.1, 1000.0])
def test_rounded_twice_stays_within_one_and_a_half_ulp(upstream, backend, device):
    """Gradient in the forward in place, in bf16, an upstream that is not 1: the bound that the docs state."""
    logits, labels = make("plain", 16, 199, torch.bfloat16, seed=9)
    x = logits.to(device, copy=True).requires_grad_()
    options = {"inplace": True, "grad_in_forward": True, "backend": backend}
    deft_loss(x, labels.to(device), **options).backward(torch.tensor(upstream, device=device))
    exact = logits.double().requires_grad_()
    # As the backend gets it.
    deft_loss(exact, labels, backend="reference").backward(torch.tensor(upstream).double())
    assert x.grad is not None and exact.grad is not None
    ulp = torch.exp2(exact.grad.abs().log2().floor() - 7)
    error = ((x.grad.cpu().double() - exact.grad).abs() / ulp).max()
    assert error <= 1.5 + 0.01
