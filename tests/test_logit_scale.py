"""`logit_scale`: softcap tanh(scale x / softcap) / temperature, folded and so without a pass of its own."""

from __future__ import annotations

import pytest
import torch
from rows import gradient_excess
from torch.nn.functional import linear

from deft_kernels import DEFTLoss, deft_loss, fused_linear_deft_loss, objectives, reference, row_statistics

N, D, V = 6, 5, 37

SETTINGS = {
    "alone": {},
    "temperature": {"temperature": 1.5},
    "softcap": {"softcap": 4.0},
    "both": {"softcap": 4.0, "temperature": 0.7},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 6.0},
    "exact gates": {"objective": objectives.deft(1, detach=False), "temperature": 1.3},
    "a function": {"objective": lambda r: -r.logp * r.entropy + 0.1 * r.lse},
    "in the forward": {"grad_in_forward": True},
    "in place": {"inplace": True, "softcap": 4.0},
}


def rows(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, V, (N,))
    labels[1] = -100
    return (3 * torch.randn(N, V)).to(dtype), labels


def oracle(logits, labels, scale, keywords):
    """The loss of logits that were multiplied beforehand, in float64, and its gradient by those given."""
    x = logits.double().requires_grad_()
    keywords = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    objective = keywords.pop("objective", "deft")
    if callable(objective):
        z = reference.transformed(scale * x, keywords.get("softcap"), keywords.get("temperature", 1.0))
        found = reference.statistics(z, labels)
        valid = labels != -100
        stats = type("Rows", (), {name: value[valid] for name, value in found.items()})
        loss = objective(stats).mean()
    else:
        loss, _ = reference.loss(scale * x, labels, objective=objectives.resolve(objective), **keywords)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("scale", [0.0625, 2.5])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, name) for name in SETTINGS]
    + [(torch.bfloat16, name) for name in SETTINGS if "softcap" not in SETTINGS[name]],
)
def test_against_logits_multiplied_beforehand(dtype, name, scale, backend, device):
    keywords = dict(SETTINGS[name])
    logits, labels = rows(dtype)
    expected, gradient = oracle(logits, labels, scale, keywords)
    x = logits.to(device).requires_grad_()
    y = x * 1.0 if keywords.get("inplace") else x
    loss = deft_loss(y, labels.to(device), logit_scale=scale, backend=backend, **keywords)
    loss.backward()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=3e-5, atol=1e-6)
    assert gradient_excess(x.grad.cpu(), gradient) <= 1.0


def test_as_the_linear_call_has_it(backend, device):
    hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
    labels = rows()[1].to(device)
    keywords = {"logit_scale": 0.3, "softcap": 5.0, "temperature": 1.2, "backend": backend}
    expected = fused_linear_deft_loss(hidden, weight, labels, **keywords)
    torch.testing.assert_close(deft_loss(linear(hidden, weight), labels, **keywords), expected)


def test_of_one_changes_nothing(backend, device):
    logits, labels = (x.to(device) for x in rows())
    for keywords in ({}, {"softcap": 5.0, "temperature": 1.3}):
        plain = deft_loss(logits, labels, backend=backend, **keywords)
        assert torch.equal(deft_loss(logits, labels, logit_scale=1.0, backend=backend, **keywords), plain)


def test_of_the_reference_the_statistics_and_the_module(backend, device):
    logits, labels = (x.to(device) for x in rows())
    keywords = {"softcap": 5.0, "temperature": 1.3}
    for chosen in (backend, "reference"):
        expected = deft_loss(2.0 * logits, labels, backend=chosen, **keywords)
        own = deft_loss(logits, labels, logit_scale=2.0, backend=chosen, **keywords)
        torch.testing.assert_close(own, expected)
        module = DEFTLoss(logit_scale=2.0, backend=chosen, **keywords)
        assert torch.equal(module(logits, labels), own)
        stats = row_statistics(logits, labels, logit_scale=2.0, backend=chosen, **keywords)
        multiplied = row_statistics(2.0 * logits, labels, backend=chosen, **keywords)
        for name in ("logp", "lse", "collision", "entropy", "max_prob"):
            torch.testing.assert_close(getattr(stats, name), getattr(multiplied, name), msg=name)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), (None, TypeError), (True, TypeError)],
)
def test_what_is_no_scale(value, error):
    logits, labels = rows()
    for call in (deft_loss, row_statistics):
        with pytest.raises(error, match="^logit_scale: "):
            call(logits, labels, logit_scale=value)
