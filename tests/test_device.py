"""What only a device can show: no wait of the host, CUDA graphs, logits past 2^31 elements.

Each promise has a counterpart without a GPU: the launchers are watched for host reads in test_traps, offsets
are int64 by test_traps, and what a captured call computes is what any call computes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rows import gradient_excess, make
from torch import Tensor
from waits import refusing_waits

from deft_kernels import deft_loss, fused_linear_deft_loss, row_statistics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MODES: dict[str, dict[str, object]] = {
    "default": {},
    "in place": {"inplace": True},
    "in forward": {"grad_in_forward": True},
    "in place, in forward": {"inplace": True, "grad_in_forward": True},
    "none": {"reduction": "none"},
    "cayley": {"objective": "cayley"},
    "eaft": {"objective": "eaft"},
    "weights": {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0},
}


def keywords_of(mode: str, vocabulary: int) -> dict[str, object]:
    keywords = dict(MODES[mode])
    if keywords.get("weight"):
        keywords["weight"] = torch.linspace(0.5, 2.0, vocabulary, device="cuda")
    return keywords


def step(z: Tensor, y: Tensor, keywords: dict[str, object]) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    loss = deft_loss(leaf, y, **keywords)
    (loss.sum() * 0.5).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("mode", MODES)
def test_the_host_waits_for_nothing(mode: str) -> None:
    z, y = (t.cuda() for t in make("plain", 8, 1531, torch.bfloat16))
    keywords = keywords_of(mode, 1531)
    step(z, y, keywords)  # compiles
    with refusing_waits():
        step(z, y, keywords)
        stats = row_statistics(z.requires_grad_(), y)
        (stats.logp + stats.entropy).sum().backward()


def captured(run: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of `run`, warmed up beside the default stream as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_step_replays_on_new_logits(mode: str) -> None:
    z, y = (t.cuda() for t in make("plain", 8, 1531, torch.bfloat16))
    other, labels = (t.cuda() for t in make("peaked", 8, 1531, torch.bfloat16, seed=1))
    labels[3] = -100
    keywords = keywords_of(mode, 1531)
    expected = step(other, labels, keywords)
    graph, got = captured(lambda: step(z, y, keywords))
    z.copy_(other)
    y.copy_(labels)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_captured_linear_step_replays_on_new_rows() -> None:
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1531, 32, device="cuda", dtype=torch.bfloat16).mul_(0.3).requires_grad_()
    labels = torch.randint(0, 1531, (64,), device="cuda")

    def run() -> tuple[Tensor, Tensor, Tensor]:
        leaf = hidden.detach().clone().requires_grad_()
        weight.grad = None
        loss = fused_linear_deft_loss(leaf, weight, labels)
        loss.backward()
        assert leaf.grad is not None and weight.grad is not None
        return loss.detach(), leaf.grad, weight.grad

    graph, got = captured(run)
    hidden.normal_()
    labels[::3] = -100
    graph.replay()
    torch.cuda.synchronize()
    got = tuple(t.clone() for t in got)
    for mine, expected in zip(got, run(), strict=True):
        # The captured call works on every row, this one leaves the ignored rows out: other products.
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("mode", ["default", "in place, in forward"])
def test_logits_past_two_to_the_31_elements(mode: str) -> None:
    """17,000 rows of a Llama 3 vocabulary, 2.18e9 bf16 logits: the last rows lie beyond any int32 offset."""
    n, vocabulary = 17_000, 128_256
    tail, y = make("plain", 3, vocabulary, torch.bfloat16)
    z = torch.zeros(n, vocabulary, dtype=torch.bfloat16, device="cuda")
    z[-3:] = tail.cuda()
    labels = torch.full((n,), -100, device="cuda")
    labels[-3:] = y.cuda()
    leaf = z.requires_grad_()
    loss = deft_loss(leaf, labels, **MODES[mode])
    loss.backward()
    exact = tail.double().requires_grad_()
    expected = deft_loss(exact, y, backend="reference")
    expected.backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(loss.double().cpu(), expected.detach(), rtol=3e-5, atol=1e-7)
    assert gradient_excess(leaf.grad[-3:].cpu(), exact.grad) <= 1.0
    assert not leaf.grad[:-3].any()
