"""Calls in other modes of PyTorch, and misuse that has to raise: inference mode, batched gradients, copies of
an objective, logits that were overwritten, functions that return what no loss can be made of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from formulas import head, problem, step
from torch import Tensor

from deft_kernels import deft_loss, fused_linear_deft_loss, objectives
from deft_kernels.operators import in_place

NAMED = {
    "chord": objectives.chord,
    "infosft": objectives.infosft,
    "dft": lambda: objectives.dft(0.5),
    "mile": lambda: objectives.mile(2.0),
}


@pytest.mark.parametrize("name", NAMED)
def test_in_inference_mode(name, backend, device):
    """Its tensors have no version counter."""
    logits, labels, _ = problem(device)
    hidden, weight, bias = head(device)
    expected = deft_loss(logits, labels, objective=NAMED[name](), backend=backend)
    of_head = fused_linear_deft_loss(hidden, weight, labels, bias, objective=NAMED[name](), backend=backend)
    with torch.inference_mode():
        for z in (logits, logits.clone()):
            assert torch.equal(deft_loss(z, labels, objective=NAMED[name](), backend=backend), expected)
        found = fused_linear_deft_loss(
            hidden.clone(), weight, labels, bias, objective=NAMED[name](), backend=backend
        )
    assert torch.equal(found, of_head)


@pytest.mark.parametrize("again", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy])
@pytest.mark.parametrize("name", NAMED)
def test_a_copy_of_an_objective(name, again):
    logits, labels, _ = problem("cpu")
    objective = NAMED[name]()
    expected = deft_loss(logits, labels, objective=objective)
    assert torch.equal(deft_loss(logits, labels, objective=again(objective)), expected)


OBJECTIVES = {"of a backend": "deft", "of rows": objectives.chord()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_in_place_that_was_overwritten(objective, backend, device):
    """The logits' storage holds it from the forward on. A write there is noticed, and a read does no harm."""
    logits, labels, _ = problem(device)
    keywords = {"objective": OBJECTIVES[objective], "inplace": True, "grad_in_forward": True}

    def call(z: Tensor) -> Tensor:
        return deft_loss(z, labels, backend=backend, **keywords)

    leaf = logits.clone().requires_grad_()
    copied = leaf * 1.0
    twice = call(copied) + call(copied)
    with pytest.raises(RuntimeError, match="^inplace: "):
        twice.backward()
    for change in (Tensor.zero_, lambda z: z.mul_(2.0)):
        copied = leaf * 1.0
        loss = call(copied)
        change(copied.detach())
        with pytest.raises(RuntimeError, match="^inplace: "):
            loss.backward()
    copied = leaf * 1.0
    loss = call(copied)
    copied.detach().sum()
    loss.backward()
    plain = {"objective": OBJECTIVES[objective], "grad_in_forward": True}
    _, expected = step(
        lambda z: deft_loss(z, labels, backend=backend, **plain), logits.clone().requires_grad_()
    )
    torch.testing.assert_close(leaf.grad, expected / 0.5)


def test_a_gradient_in_place_that_was_overwritten_under_a_mode():
    """There another Function does it."""

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    logits, labels, _ = problem("cpu")
    leaf = logits.clone().requires_grad_()
    keywords = {"inplace": True, "grad_in_forward": True}
    with Mode():
        deft_loss(leaf * 1.0, labels, **keywords).backward()
    expected = leaf.grad
    leaf.grad = None
    deft_loss(leaf, labels).backward()
    torch.testing.assert_close(expected, leaf.grad)
    with Mode():
        copied = leaf * 1.0
        loss = deft_loss(copied, labels, **keywords)
    copied.detach().zero_()
    with pytest.raises(RuntimeError, match="^inplace: "):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_with_parameters_are_refused(reduction, backend, device):
    """They would not be trained: the weights are held constant."""
    _, labels, _ = problem(device)
    inputs = [t.requires_grad_() for t in head(device)[:2]]
    parameter = torch.nn.Parameter(torch.ones((), device=device))
    objective = objectives.weighted(lambda r: parameter * r.logp.exp())
    with pytest.raises(ValueError, match="^objective: .* require a gradient"):
        fused_linear_deft_loss(*inputs, labels, objective=objective, reduction=reduction, backend=backend)
    detached = objectives.weighted(lambda r: (parameter * r.logp.exp()).detach())
    fused_linear_deft_loss(*inputs, labels, objective=detached, backend=backend).backward()
    assert parameter.grad is None and inputs[0].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_of_a_function_has_the_dtype_of_the_statistics(dtype, backend, device):
    """Of 70,000 rows, which fp16 cannot count."""
    z = torch.zeros(70_000, 5, device=device, requires_grad=True)
    labels = torch.zeros(70_000, dtype=torch.int64, device=device)
    loss = deft_loss(z, labels, objective=lambda r: (-r.logp).to(dtype), backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(5.0, device=device).log(), rtol=4e-3, atol=0.0)
    loss.backward()
    assert z.grad.isfinite().all() and z.grad.any(-1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_function_that_returns_no_floating_losses(dtype):
    """Integers have no gradient."""
    logits, labels, _ = problem("cpu")
    inputs = [t.requires_grad_() for t in head("cpu")[:2]]

    def objective(r) -> Tensor:
        return (-r.logp).to(dtype)

    with pytest.raises(TypeError, match="^objective: .*floating"):
        deft_loss(logits, labels, objective=objective)
    with pytest.raises(TypeError, match="^objective: .*floating"):
        fused_linear_deft_loss(*inputs, labels, objective=objective)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float16_in_place_in_the_forward_warns(name, backend, device):
    logits, labels, _ = problem(device, torch.float16)
    in_place.warn_of_underflow.cache_clear()
    leaf = logits.clone().requires_grad_()
    keywords = {"objective": OBJECTIVES[name], "inplace": True, "grad_in_forward": True}
    with pytest.warns(RuntimeWarning, match="float16 before the loss scale"):
        deft_loss(leaf * 1.0, labels, backend=backend, **keywords)


BATCHED = {
    "rows": lambda h, w, y: deft_loss(h @ w.T, y, reduction="none"),
    "mean": lambda h, w, y: deft_loss(h @ w.T, y)[None],
    "in the backward": lambda h, w, y: deft_loss(h @ w.T, y, grad_in_forward=False)[None],
    "weighted": lambda h, w, y: deft_loss(h @ w.T, y, objective=objectives.mile(), grad_in_forward=True)[
        None
    ],
    "function": lambda h, w, y: deft_loss(h @ w.T, y, objective=lambda r: r.entropy, reduction="none"),
    "linear": lambda h, w, y: fused_linear_deft_loss(h, w, y)[None],
    "linear, rows": lambda h, w, y: fused_linear_deft_loss(h, w, y, reduction="none"),
    "linear, weighted": lambda h, w, y: fused_linear_deft_loss(h, w, y, objective=objectives.mile())[None],
}


# vmap tells that it goes through an operator row by row.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("name", BATCHED)
def test_batched_gradients(name):
    """The rows of a Jacobian, as is_grads_batched gives them."""
    _, labels, _ = problem("cpu")
    inputs = [t.requires_grad_() for t in head("cpu")[:2]]
    losses = BATCHED[name](*inputs, labels)
    found = torch.autograd.grad(losses, inputs, torch.eye(len(losses)), is_grads_batched=True)
    for i, loss in enumerate(BATCHED[name](*inputs, labels)):
        expected = torch.autograd.grad(loss, inputs, retain_graph=True)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], theirs)
