"""`gated_loss` where rows do not count, and where its derivative is asked for a second time.

Its values are held in `test_semantics`, against the rows of `deft_loss`.
"""

from __future__ import annotations

import math

import pytest
import torch

from deft_kernels import gated_loss, objectives

N = 5
POISON = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(
    "objective",
    [objectives.deft(detach=False), objectives.deft(1, detach=False), objectives.deft(math.inf, detach=False),
     objectives.rational(detach=False), objectives.eaft(detach=False), objectives.cayley(detach=False),
     objectives.deft(), objectives.cayley(), objectives.nll()],
    ids=lambda o: f"{o.name} {o.focus} {o.detach}",
)  # fmt: skip
def test_gated_loss_of_rows_that_are_not_valid(objective, poison):
    """Poison in every statistic of such a row and in its upstream."""
    valid = torch.tensor([True, False, True, False, True])
    given = (-torch.rand(N), -torch.rand(N), torch.rand(N) + 0.1, torch.rand(N))
    sent = torch.linspace(-1.0, 2.0, N)

    def run(statistics, valid, sent):
        leaves = [s.clone().requires_grad_() for s in statistics]
        logp, collision, entropy, largest = leaves
        loss = gated_loss(
            logp, collision, entropy=entropy, max_prob=largest, objective=objective, valid=valid
        )
        loss.backward(sent)
        return loss.detach(), [leaf.grad for leaf in leaves]

    loss, gradients = run([s.where(valid, poison) for s in given], valid, sent.where(valid, poison))
    alone = run([s[valid] for s in given], None, sent[valid])
    assert not loss[~valid].any()
    torch.testing.assert_close(loss[valid], alone[0])
    for ours, expected in zip(gradients, alone[1], strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert torch.equal(ours[~valid], torch.zeros(2))
            torch.testing.assert_close(ours[valid], expected)


def test_gated_loss_outside_a_band_takes_any_upstream():
    logp = torch.tensor([-0.1, -5.0]).requires_grad_()
    gated_loss(logp, objective=objectives.nll().within("p>=0.5")).backward(torch.tensor([1.0, math.inf]))
    assert torch.equal(logp.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("detach", [True, False])
def test_second_derivative_is_refused(detach):
    """A gradient penalty would contribute 0 without a word: the hand-written backward has no derivative."""
    logp = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = gated_loss(logp, logp.detach() - 1.0, objective=objectives.deft(detach=detach)).sum()
    with pytest.raises(RuntimeError, match=r"^gated_loss: .*create_graph=True.*reference"):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_backward_in_a_compiled_call():
    logp = torch.tensor([-0.5, -2.0, math.nan], requires_grad=True)
    collision = torch.tensor([-1.0, -0.2, math.nan], requires_grad=True)
    valid = torch.tensor([True, True, False])
    objective = objectives.deft(detach=False)

    def call(logp, collision):
        return gated_loss(logp, collision, objective=objective, valid=valid)

    gradients = []
    for run in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        gradients.append(torch.autograd.grad(run(logp, collision).sum(), (logp, collision)))
    for plain, compiled in zip(*gradients, strict=True):
        assert torch.equal(plain, compiled) and plain[2] == 0
