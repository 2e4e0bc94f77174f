"""The recipes of docs/recipes.md, taken from the page, against eager PyTorch over whole logits in float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from documents import execute, text
from torch import Tensor

from deft_kernels import deft_loss, objectives

B, T, D, V = 2, 6, 5, 23


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, labels, other_logp, advantage); padding holds what must not be met."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator)
    own = torch.log_softmax(hidden.detach() @ weight.detach().T, -1).gather(-1, labels.unsqueeze(-1))[..., 0]
    # Near the policy's own, so that some ratios are clipped on either side and some are not.
    other = own + 0.4 * torch.randn(B, T, generator=generator).to(dtype)
    advantage = torch.randn(B, T, generator=generator).to(dtype)
    labels[0, 0] = labels[1, 5] = -100
    return hidden, weight, labels, other, advantage


def statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, valid) the plain way."""
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    valid = labels != -100
    logp = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1))[..., 0]
    return logp, -(log_p.exp() * log_p).sum(-1), valid


def clipped(hidden, weight, labels, old_logp, advantage):
    logp, entropy, valid = statistics(hidden, weight, labels)
    ratio = (logp - old_logp).exp()
    surrogate = torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
    return -(surrogate + 0.01 * entropy)[valid].mean()


def proximal(hidden, weight, labels, old_logp, advantage):
    logp, _, valid = statistics(hidden, weight, labels)
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio, ratio.clip(0.72, 1.28))[valid].mean()


def anchored(hidden, weight, labels, reference_logp, advantage):
    logp, _, valid = statistics(hidden, weight, labels)
    distance = reference_logp - logp
    return (-logp + 0.1 * (distance.exp() - distance - 1))[valid].mean()


def above_a_threshold(hidden, weight, labels, other_logp, advantage):
    logp, _, valid = statistics(hidden, weight, labels)
    selected = valid & (logp.exp() >= 0.1)
    assert selected.any() and (valid & ~selected).any()
    return -logp[selected].mean()


def of_most_excess(hidden, weight, labels, reference_logp, advantage):
    logp, _, valid = statistics(hidden, weight, labels)
    excess = (reference_logp - logp)[valid]
    best = excess.topk(math.ceil(0.6 * len(excess))).indices
    assert 0 < len(best) < len(excess)
    return -logp[valid][best].mean()


RECIPES: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "clipped_policy_loss": (0, clipped),
    "proximal_sft_loss": (1, proximal),
    "anchored_loss": (2, anchored),
    "profit_loss": (4, above_a_threshold),
    "selective_loss": (5, of_most_excess),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients(name, dtype):
    names: dict[str, object] = {"torch": torch}
    for block in range(RECIPES[name][0] + 1):
        names = execute("docs/recipes.md", block, names)
    hidden, weight, labels, other, advantage = given(dtype)
    given_too = {"clipped_policy_loss": (other, advantage), "profit_loss": ()}.get(name, (other,))
    loss = names[name](hidden, weight, labels, *given_too)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = RECIPES[name][1](*exact, labels, other.double(), advantage.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6)
    found, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)
    for ours, wanted in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    # Some rows are clipped and some are not: else the test would not see the clipping.
    if name in ("clipped_policy_loss", "proximal_sft_loss"):
        ratio = (statistics(*exact, labels)[0] - other.double()).exp()[labels != -100]
        assert (ratio > 1.28).any() and (ratio < 0.72).any() and ((ratio > 0.8) & (ratio < 1.2)).any()


def test_the_example_of_a_weight():
    """With a number for each token, aligned as token_weight is."""
    names: dict[str, object] = {"torch": torch}
    for block in range(7):
        names = execute("docs/recipes.md", block, names)
    hidden, weight, labels, _, _ = given(torch.float64)
    trust = torch.rand(B, T, dtype=torch.float64)
    loss = deft_loss(hidden @ weight.T, labels, objective=names["trusted"](labels, trust), reduction="none")
    p = torch.softmax(hidden @ weight.T, -1).amax(-1)
    logp, _, valid = statistics(hidden, weight, labels)
    torch.testing.assert_close(loss, torch.where(valid, -trust * (1 - p) * logp, 0.0))


def test_the_table_names_what_there_is():
    """Every weight of the table is made by the words in its first cell."""
    rows = re.findall(r"^\| `(objectives\.(\w+)\((\w*)\))` \|", text("docs/recipes.md"), flags=re.MULTILINE)
    assert [name for _, name, _ in rows] == ["chord", "mile", "infosft", "dft"]
    for call, name, argument in rows:
        made = eval(call, {"objectives": objectives, argument: 0.75})
        assert isinstance(made, objectives.Weighted) and made.name == name


def test_domains_with_gates_of_their_own() -> None:
    """Each token by the formula with its domain's alpha, 0 among them."""
    names: dict[str, object] = {"torch": torch}
    for block in range(4):
        names = execute("docs/recipes.md", block, names)
    hidden, weight, labels, _, _ = given(torch.float64)
    domain = torch.arange(B * T).reshape(B, T) % 3
    table = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    loss = names["mixed_loss"](hidden @ weight.T, labels, domain, table)  # type: ignore[operator]
    logp, _, valid = statistics(hidden, weight, labels)
    p = logp.exp()
    rows = torch.stack([-logp, (1 - p.sqrt()) / 0.5, 1 - p])
    torch.testing.assert_close(loss, rows.gather(0, domain.unsqueeze(0))[0][valid].mean())
