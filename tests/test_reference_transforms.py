"""torch.func's transforms of backend="reference", which takes any: by logits, by hidden states, batched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, func

from deft_kernels import deft_loss, fused_linear_deft_loss, objectives, row_statistics

N, D, V = 4, 5, 7
LABELS = torch.tensor([0, 3, 6, -100])
CALLS = {
    "deft": {},
    "cayley": {"objective": "cayley"},
    "band": {"objective": objectives.eaft().within("p>=0.01")},
    "function": {"objective": lambda r: -r.logp * r.logp.exp()},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-2, "weight": torch.linspace(0.5, 2, V).double()},
    "shift": {"shift": True},
    "num_items": {"num_items": torch.tensor(3.0)},
    "rows' alpha": {"objective": objectives.tsallis(torch.tensor(0.5))},
}


def logits() -> Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
def test_of_logits(name):
    z = logits()

    def call(z: Tensor, y: Tensor) -> Tensor:
        return deft_loss(z, y, backend="reference", **CALLS[name])

    x = z.clone().requires_grad_()
    call(x, LABELS).backward()
    torch.testing.assert_close(func.grad(call)(z, LABELS), x.grad)
    torch.testing.assert_close(func.jvp(lambda z: call(z, LABELS), (z,), (z,))[1], (x.grad * z).sum())
    batched = func.vmap(func.grad(call))(torch.stack([z, 2 * z]), torch.stack([LABELS, LABELS]))
    torch.testing.assert_close(batched[0], x.grad)
    losses = func.vmap(call, in_dims=(0, None))(torch.stack([z, 2 * z]), LABELS)
    torch.testing.assert_close(losses[1], call(2 * z, LABELS))


def test_each_row_by_itself():
    z = logits()[:3]
    x = z.clone().requires_grad_()
    deft_loss(x, LABELS[:3], reduction="sum", backend="reference").backward()
    rows = func.vmap(func.grad(lambda z, y: deft_loss(z, y, backend="reference")))(z, LABELS[:3])
    torch.testing.assert_close(rows, x.grad)


def test_num_items_of_each_of_a_batch():
    z, counts = logits().expand(2, N, V), torch.tensor([3.0, 6.0])

    def call(z: Tensor, count: Tensor) -> Tensor:
        return deft_loss(z, LABELS, num_items=count, backend="reference")

    losses = func.vmap(call)(z, counts)
    torch.testing.assert_close(losses[0], 2 * losses[1])


def test_statistics():
    z = logits()

    def call(z: Tensor, y: Tensor) -> Tensor:
        return row_statistics(z, y, backend="reference").entropy

    jacobian = func.vmap(func.jacrev(call))(z.expand(2, N, V), LABELS.expand(2, N))
    torch.testing.assert_close(jacobian[0], torch.autograd.functional.jacobian(lambda z: call(z, LABELS), z))


@pytest.mark.parametrize("objective", ["deft", "cayley", lambda r: -r.logp])
def test_of_hidden_states(objective):
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_deft_loss(hidden, weight, LABELS, objective=objective, backend="reference")

    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    call(*inputs).backward()
    for ours, x in zip(func.grad(call, argnums=(0, 1))(hidden, weight), inputs, strict=True):
        torch.testing.assert_close(ours, x.grad)
    assert func.hessian(call)(hidden, weight).shape == (N, D, N, D)
    tangent = func.jvp(lambda h: call(h, weight), (hidden,), (hidden,))[1]
    torch.testing.assert_close(tangent, (inputs[0].grad * hidden).sum())


def test_a_wrong_label_is_seen_where_labels_are_no_batch():
    with pytest.raises(IndexError, match="^labels: 9 at flat position 1"):
        func.grad(lambda z: deft_loss(z, torch.tensor([0, 9, 2, 3]), backend="reference"))(logits())
