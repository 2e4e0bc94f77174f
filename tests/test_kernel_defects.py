"""What the compiled kernels did wrong and the interpreter could not show, each as the case that showed it."""

from __future__ import annotations

import math

import pytest
import torch
from rows import gradient_excess, make
from torch import Tensor

from deft_kernels import deft_loss, objectives, row_statistics
from deft_kernels.core import checks
from deft_kernels.objectives import Objective


def masked_start(masked: int, vocabulary: int = 2000) -> tuple[Tensor, Tensor]:
    """fp16 rows whose first columns are -inf: lanes that see nothing else in the head and the first turn."""
    z, y = make("plain", 2, vocabulary, torch.float16)
    z[:, :masked] = -math.inf
    y = y.clamp(min=masked)
    return z, y


@pytest.mark.sampled
@pytest.mark.parametrize("masked", [1, 300, 1300, 1500, 1999])
@pytest.mark.parametrize("name", ["eaft", "deft", "statistics"])
def test_fp16_entropy_of_masked_logits(name: str, masked: int, device: str) -> None:
    """A stand-in for -inf that is safe in bf16 and fp32 and not in fp16: 2^x overflowed, and the row was
    NaN."""
    z, y = masked_start(masked)
    if name == "statistics":
        ours = row_statistics(z.to(device), y.to(device), backend="triton")
        exact = row_statistics(z.double(), y, backend="reference")
        for field in ("logp", "lse", "collision", "entropy", "max_prob"):
            got, expected = getattr(ours, field).cpu().double(), getattr(exact, field)
            torch.testing.assert_close(got, expected, rtol=3e-5, atol=3e-7, msg=field)
        return
    objective = objectives.eaft() if name == "eaft" else objectives.deft(1, detach=False)
    x, exact_x = z.to(device).clone().requires_grad_(), z.double().requires_grad_()
    loss = deft_loss(x, y.to(device), objective=objective, backend="triton")
    expected = deft_loss(exact_x, y, objective=objective, backend="reference")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), rtol=3e-5, atol=3e-7)
    assert x.grad is not None and exact_x.grad is not None
    assert gradient_excess(x.grad.cpu(), exact_x.grad) <= 1.0


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_softcap_in_place_over_several_programs(dtype: torch.dtype, in_forward: bool, device: str) -> None:
    """Two programs a row: one read the target's logit while the other overwrote it. The emulator reports
    it."""
    z, y = make("plain", 2, 20_001, dtype)
    y[:] = torch.tensor([3, 20_000])
    exact = z.double().requires_grad_()
    deft_loss(exact, y, softcap=15.0, backend="reference").backward()
    x = z.to(device).clone().requires_grad_()
    keywords = {"softcap": 15.0, "inplace": True, "grad_in_forward": in_forward, "backend": "triton"}
    deft_loss(x, y.to(device), **keywords).backward()
    assert x.grad is not None and exact.grad is not None
    assert gradient_excess(x.grad.cpu(), exact.grad) <= 1.0


OBJECTIVES = {
    "nll": objectives.nll(),
    "deft": objectives.deft(),
    "eaft": objectives.eaft(),
    "rational": objectives.rational(),
    "deft-exact": objectives.deft(detach=False),
    "cayley": objectives.cayley(mean_prob=0.4),
}


@pytest.mark.sampled
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("wrong", [-1, 1281, 2**40])
def test_label_out_of_range_shows_alike_in_every_gradient(
    wrong: int, in_forward: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the host's check: the loss is NaN for every objective; so is the row's gradient, or for none."""
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    z, y = make("plain", 3, 1281, torch.float32)
    y[1] = wrong

    def gradient(objective: Objective) -> tuple[bool, bool, bool]:
        x = z.to(device).clone().requires_grad_()
        loss = deft_loss(
            x,
            y.to(device),
            objective=objective,
            reduction="sum",
            grad_in_forward=in_forward,
            backend="triton",
        )
        loss.backward()
        assert x.grad is not None
        assert x.grad[[0, 2]].isfinite().all()
        return bool(loss.isnan()), bool(x.grad[1].isnan().any()), bool(x.grad[1].isnan().all())

    found = {name: gradient(objective) for name, objective in OBJECTIVES.items()}
    assert all(loss for loss, _, _ in found.values())
    assert len(set(found.values())) == 1, found


@pytest.mark.filterwarnings("ignore:.*rounds the gradient to float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_the_forward_in_place_under_an_upstream(dtype: torch.dtype, device: str) -> None:
    """The gradient stands for an upstream of 1 where the logits were, and another upstream scales what was
    rounded: half an ulp of the first rounding is a whole one where the product ends a binade lower, and half
    of one comes from the second."""
    z, y = make("plain", 64, 777, dtype, seed=5)
    for upstream in (0.37, 1.9, 3.0):
        exact = z.double().requires_grad_()
        (deft_loss(exact, y, reduction="sum", backend="reference") * upstream).backward()
        x = z.to(device).clone().requires_grad_()
        keywords = {"reduction": "sum", "inplace": True, "grad_in_forward": True, "backend": "triton"}
        (deft_loss(x, y.to(device), **keywords) * upstream).backward()
        assert x.grad is not None and exact.grad is not None
        assert gradient_excess(x.grad.cpu(), exact.grad) <= 1.5
