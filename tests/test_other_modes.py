"""Plain eager calls in what else PyTorch does with a graph: hooks on saved tensors, checkpointing, export,
compiled autograd. The autograd Functions have to behave as the registered operators do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deft_kernels import (
    deft_loss,
    fused_linear_deft_loss,
    fused_linear_row_statistics,
    objectives,
    row_statistics,
)

N, D, V = 6, 5, 23
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "default": lambda h, w, y: deft_loss(h @ w.T, y),
    "in the backward": lambda h, w, y: deft_loss(h @ w.T, y, grad_in_forward=False),
    "rows": lambda h, w, y: deft_loss(h @ w.T, y, reduction="none").square().sum(),
    "statistics": lambda h, w, y: row_statistics(h @ w.T, y).entropy.sum(),
    "function": lambda h, w, y: deft_loss(h @ w.T, y, objective=lambda r: -r.logp * (1 - r.collision)),
    "weighted": lambda h, w, y: deft_loss(h @ w.T, y, objective=objectives.mile()),
    "linear": lambda h, w, y: fused_linear_deft_loss(h, w, y, chunk_bytes=2 * V * 4),
    "linear, rows": lambda h, w, y: fused_linear_deft_loss(h, w, y, reduction="none").square().sum(),
    "linear, statistics": lambda h, w, y: fused_linear_row_statistics(h, w, y).logp.sum(),
    "linear, weighted": lambda h, w, y: fused_linear_deft_loss(h, w, y, objective=objectives.mile()),
}


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2] = -100
    return torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator), labels


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, labels = given()
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def step(call: Callable[..., Tensor]) -> list[Tensor]:
    hidden, weight, labels = leaves()
    loss = call(hidden, weight, labels)
    (loss * 0.5).backward()
    return [loss.detach(), hidden.grad, weight.grad]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
def test_hooks_on_saved_tensors(name):
    """What is saved for the backward goes through the hooks, the logits among it."""
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor.shape)
        return (tensor.detach().clone(),)

    expected = step(CALLS[name])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held[0]):
        found = step(CALLS[name])
    same(found, expected)
    assert torch.Size([N]) in packed


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_checkpointing(name, reentrant):
    expected = step(CALLS[name])
    found = step(lambda h, w, y: checkpoint(CALLS[name], h, w, y, use_reentrant=reentrant))
    same(found, expected)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "linear, weighted"])
def test_export(name):
    """One program, which holds the package's operators and gives the same numbers."""

    class Model(nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return CALLS[name](hidden, weight, labels)

    hidden, weight, labels = given()
    program = torch.export.export(Model(), (hidden, weight, labels))
    assert any("deft_kernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(hidden, weight, labels), CALLS[name](hidden, weight, labels))


# Its own look at the graph warns of gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd(name):
    """The backward of an eager forward, compiled."""
    expected = step(CALLS[name])
    torch.compiler.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        found = step(CALLS[name])
    same(found, expected)
