"""Labels that no class has: dtypes that cannot hold ignore_index, and values out of range on a device."""

from __future__ import annotations

import math

import pytest
import torch
from rows import make
from torch import Tensor

from deft_kernels import deft_loss, fused_linear_deft_loss, objectives, row_statistics
from deft_kernels.core import checks

N, V = 4, 37


def rows(device: str) -> tuple[Tensor, Tensor]:
    logits, labels = make("plain", N, V, torch.float32, seed=6)
    return logits.to(device), labels.to(device)


# uint8 turns the -100 of ignored rows into class 156 before any loss can see it -----------------------------


@pytest.mark.parametrize("own", ["torch", "triton", "reference"])
def test_labels_that_cannot_hold_ignore_index(own, device):
    logits, labels = rows(device)
    head = torch.eye(V, device=device)
    narrow = {torch.uint8: (-100, -1, 256), torch.int8: (-129, 128), torch.int32: (2**31,)}
    for dtype, wrong in narrow.items():
        for ignore_index in wrong:
            for call in (deft_loss, row_statistics):
                with pytest.raises(ValueError, match=f"^labels: {dtype} holds .*{ignore_index}"):
                    call(logits, labels.to(dtype), ignore_index=ignore_index, backend=own)
            with pytest.raises(ValueError, match=f"^labels: {dtype} holds .*{ignore_index}"):
                fused_linear_deft_loss(logits, head, labels.to(dtype), ignore_index=ignore_index, backend=own)


@pytest.mark.parametrize("ignore_index", [0, 3, 255])
@pytest.mark.parametrize("shift", [False, True])
def test_uint8_with_an_ignore_index_of_its_own(shift, ignore_index, backend, device):
    logits, labels = rows(device)
    labels[1] = ignore_index
    options = {"ignore_index": ignore_index, "shift": shift, "backend": backend}
    expected = deft_loss(logits, labels, **options)
    assert torch.equal(deft_loss(logits, labels.to(torch.uint8), **options), expected)


# Out of range where no host looks, as on a GPU --------------------------------------------------------------

OBJECTIVES = {
    name: objectives.TABLE[name]()
    for name in ("nll", "neg_prob", "deft", "cayley", "rational", "dft", "eaft")
} | {
    "tsallis": objectives.tsallis(0.5),
    "deft 1, exact": objectives.deft(1, detach=False),
    "deft inf, exact": objectives.deft(math.inf, detach=False),
    "eaft, exact": objectives.eaft(detach=False),
    "nll in a band": objectives.nll().within("p>=0.0001"),
    "function": lambda r: -r.logp * (1 + r.entropy),
}
OPTIONS = {
    "none": {},
    "options": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "temperature": 1.3},
    "in forward": {"grad_in_forward": True},
}


def cases():
    for name in OBJECTIVES:
        for option in OPTIONS:
            # Those two need the rows' statistics before the gradient.
            if option != "in forward" or name not in ("cayley", "function"):
                yield name, option, V
    for wrong in (-1, 2**40):
        yield "nll", "none", wrong


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "option", "wrong"), list(cases()))
def test_loss_and_gradient_are_nan_together(name, option, wrong, backend, device, monkeypatch):
    """In that row alone, and in all of it: where the gate is 1 or made of the entropy, too."""
    objective, options = OBJECTIVES[name], dict(OPTIONS[option])
    in_forward = option == "in forward"
    if callable(objective) and "label_smoothing" in options:
        del options["label_smoothing"]
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    logits, labels = rows(device)
    good = [0, 1, 3]

    def run(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = z.clone().requires_grad_()
        reduction = "sum" if in_forward else "none"
        loss = deft_loss(x, y, objective=objective, reduction=reduction, backend=backend, **options)
        loss.sum().backward()
        return loss.detach(), x.grad

    expected = run(logits[good], labels[good])
    labels[2] = wrong
    loss, gradient = run(logits, labels)
    assert loss.isnan() if in_forward else loss[2].isnan()
    assert gradient[2].isnan().all()
    torch.testing.assert_close(gradient[good], expected[1])
    if not in_forward:
        torch.testing.assert_close(loss[good], expected[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["nll", "deft", "eaft", "function"])
def test_of_the_linear_call(name, reduction, backend, device, monkeypatch):
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    hidden, labels = rows(device)
    hidden.requires_grad_()
    labels[2] = V
    loss = fused_linear_deft_loss(
        hidden, torch.eye(V, device=device), labels, objective=OBJECTIVES[name], reduction=reduction,
        backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.isnan().sum() == 1
    assert hidden.grad[2].isnan().all()
    assert hidden.grad[[0, 1, 3]].isfinite().all()


def test_statistics_that_ask_no_label_keep_their_gradient(backend, device, monkeypatch):
    """The entropy of a row does not depend on its label, and neither does its derivative."""
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    logits, labels = rows(device)
    gradients = []
    for label in (int(labels[2]), V):
        labels[2] = label
        x = logits.clone().requires_grad_()
        stats = row_statistics(x, labels, backend=backend)
        assert stats.logp[2].isnan() == (label == V)
        stats.entropy.sum().backward()
        gradients.append(x.grad)
    if backend == "torch":
        assert torch.equal(*gradients)
    else:
        torch.testing.assert_close(*gradients)
