"""torch.func's transforms and forward-mode differentiation: refused here, and left to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad

from deft_kernels import deft_loss, fused_linear_deft_loss, gated_loss, objectives, row_statistics

N, D, V = 4, 5, 7
LABELS = torch.tensor([0, 3, 6, 2])


def of_logits(backend, **keywords):
    return lambda z: deft_loss(z, LABELS.to(z.device), backend=backend, **keywords)


def of_hidden(backend, device):
    weight = torch.randn(V, D, device=device)
    return lambda h: fused_linear_deft_loss(h, weight, LABELS.to(device), backend=backend)


def calls(backend, device):
    logits, hidden = torch.randn(N, V, device=device), torch.randn(N, D, device=device)
    yield "logits", of_logits(backend), logits
    yield "logits", of_logits(backend, grad_in_forward=True), logits
    yield "logits", of_logits(backend, objective=lambda r: -r.logp), logits
    yield "logits", lambda z: row_statistics(z, LABELS.to(device), backend=backend).logp.sum(), logits
    yield "hidden", of_hidden(backend, device), hidden
    yield "logp", lambda logp: gated_loss(logp, torch.zeros_like(logp)).sum(), -torch.rand(N, device=device)


REVERSE = {
    "grad": lambda call, x: func.grad(call)(x),
    "grad_and_value": lambda call, x: func.grad_and_value(call)(x),
    "vjp": lambda call, x: func.vjp(call, x)[1](torch.ones((), device=x.device)),
    "jacrev": lambda call, x: func.jacrev(call)(x),
    "hessian": lambda call, x: func.hessian(call)(x),
    "of a batch": lambda call, x: func.vmap(func.grad(call))(x.expand(2, *x.shape)),
    "through a batch": lambda call, x: func.grad(lambda x: func.vmap(call)(x).sum())(x.expand(2, *x.shape)),
}
FORWARD = {
    "jvp": lambda call, x: func.jvp(call, (x,), (x,)),
    "jacfwd": lambda call, x: func.jacfwd(call)(x),
    "linearize": lambda call, x: func.linearize(call, x),
}


# vmap tells that it goes through an operator row by row.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", REVERSE)
def test_reverse_mode_of_torch_func(transform, backend, device):
    for name, call, x in calls(backend, device):
        with pytest.raises(RuntimeError, match=rf"^{name}: torch\.func.*reference"):
            REVERSE[transform](call, x)


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_of_torch_func(transform, backend, device):
    for name, call, x in calls(backend, device):
        with pytest.raises(RuntimeError, match=f"^{name}: forward-mode.*reference"):
            FORWARD[transform](call, x)


def test_forward_mode_by_hand(backend, device):
    for name, call, x in calls(backend, device):
        with forward_ad.dual_level():
            call(x.clone())
            with pytest.raises(RuntimeError, match=f"^{name}: forward-mode"):
                call(forward_ad.make_dual(x, x))


def test_the_reference_has_them():
    z = torch.randn(N, V, dtype=torch.float64)
    reference = of_logits("reference", objective=objectives.deft(detach=False))
    x = z.clone().requires_grad_()
    reference(x).backward()
    torch.testing.assert_close(func.grad(reference)(z), x.grad)
    torch.testing.assert_close(func.jvp(reference, (z,), (z,))[1], (x.grad * z).sum())
    assert func.hessian(reference)(z).shape == (N, V, N, V)


def test_a_loss_that_is_not_differentiated_inside_a_transform(backend, device):
    """A teacher's loss, a number to log: no gradient goes through it."""
    logits, labels = torch.randn(N, V, device=device), LABELS.to(device)
    expected = deft_loss(logits, labels, backend=backend)
    seen = []

    def call(x):
        seen.append(deft_loss(logits, labels, backend=backend))
        with torch.no_grad():
            deft_loss(x, labels, backend=backend)
        return x.sum()

    assert torch.equal(func.grad(call)(logits), torch.ones_like(logits))
    assert torch.equal(seen[0], expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_alone(backend, device):
    logits, labels = torch.randn(N, V, device=device), LABELS.to(device)
    losses = func.vmap(lambda z, y: deft_loss(z, y, backend=backend))(logits, labels)
    torch.testing.assert_close(losses, deft_loss(logits, labels, reduction="none", backend=backend))
