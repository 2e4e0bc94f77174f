"""Rows that do not count: zero loss and zero gradient, whatever stands in them and whatever arrives at them.

N = 5 rows, of which two are ignored; V = 19. Poison is NaN or infinity. In such rows F.cross_entropy does not
see it either.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rows import make
from torch import Tensor

from deft_kernels import RowStatistics, deft_loss, fused_linear_deft_loss, objectives, row_statistics

N, V = 5, 19
IGNORED, COUNTED = [1, 3], [0, 2, 4]
POISON = [math.nan, math.inf, -math.inf]


def rows(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits, labels = make("plain", N, V, dtype, seed=4)
    labels[IGNORED] = -100
    return logits.to(device), labels.to(device)


# An upstream of inf or NaN ---------------------------------------------------------------------------------

MODES = {
    "backward": {"grad_in_forward": False},
    "forward": {"grad_in_forward": True},
    "inplace backward": {"grad_in_forward": False, "inplace": True},
    "inplace forward": {"grad_in_forward": True, "inplace": True},
    "band": {"objective": objectives.deft().within("p>=0.0001")},
    "exact": {"objective": objectives.deft(1, detach=False)},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "function": {"objective": lambda r: -((1 - r.logp.exp()) ** 2) * r.logp},
}


@pytest.mark.parametrize("upstream", POISON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_scalar_upstream_that_overflowed(mode, dtype, upstream, backend, device):
    """What a loss scale too large sends; `F.cross_entropy` gives 0 at ignored rows as well."""
    logits, labels = rows(device, dtype)
    x = logits.clone().requires_grad_()
    deft_loss(x, labels, backend=backend, **MODES[mode]).backward(torch.tensor(upstream, device=device))
    y = logits.float().requires_grad_()
    F.cross_entropy(y, labels).backward(torch.tensor(upstream, device=device))
    assert torch.equal(y.grad[IGNORED], torch.zeros(2, V, device=device))
    assert torch.equal(x.grad[IGNORED].float(), y.grad[IGNORED])
    assert not x.grad[COUNTED].isfinite().all(-1).any()


@pytest.mark.parametrize("upstream", POISON)
@pytest.mark.parametrize("mode", ["backward", "inplace backward", "band", "exact", "smoothed", "function"])
def test_upstream_of_ignored_rows(mode, upstream, backend, device):
    """Poison at the ignored rows alone: the others have the gradient that they have without it."""
    logits, labels = rows(device)
    sent = torch.linspace(-1.0, 2.0, N, device=device)
    poisoned = sent.clone()
    poisoned[IGNORED] = upstream
    gradients = []
    for own in (sent, poisoned):
        x = logits.clone().requires_grad_()
        deft_loss(x, labels, reduction="none", backend=backend, **MODES[mode]).backward(own)
        gradients.append(x.grad)
    assert not gradients[0][IGNORED].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("upstream", POISON)
def test_upstream_of_ignored_statistics(upstream, backend, device):
    logits, labels = rows(device)
    gradients = []
    for own in (1.0, upstream):
        x = logits.clone().requires_grad_()
        stats = row_statistics(x, labels, backend=backend)
        sent = torch.ones(N, device=device)
        sent[IGNORED] = own
        torch.autograd.backward([stats.logp, stats.entropy, stats.collision], [sent] * 3)
        gradients.append(x.grad)
    assert not gradients[0][IGNORED].any()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("upstream", POISON)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("objective", ["deft", lambda r: -((1 - r.logp.exp()) ** 2) * r.logp])
def test_linear_upstream(objective, reduction, upstream, backend, device):
    """hidden's gradient is 0 at ignored rows; that of the head is a sum over the others."""
    _, labels = rows(device)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, 7, generator=generator).to(device).requires_grad_()
    head = torch.randn(V, 7, generator=generator).to(device).requires_grad_()
    loss = fused_linear_deft_loss(
        hidden, head, labels, objective=objective, reduction=reduction, backend=backend
    )
    if reduction == "mean":
        loss.backward(torch.tensor(upstream, device=device))
        assert not hidden.grad[COUNTED].isfinite().all(-1).any()
    else:
        sent = torch.ones(N, device=device)
        sent[IGNORED] = upstream
        loss.backward(sent)
        assert hidden.grad.isfinite().all() and head.grad.isfinite().all()
        assert hidden.grad[COUNTED].any(-1).all()
    assert torch.equal(hidden.grad[IGNORED], torch.zeros(2, 7, device=device))


@pytest.mark.parametrize("keywords", [{}, {"bias": True}, {"chunk_bytes": 2 * V * 4}, {"objective": "cayley"},
                                      {"objective": objectives.mile()}, {"reduction": "none"},
                                      {"objective": lambda r: -r.logp * r.entropy}])  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("poison", POISON)
def test_hidden_states_of_ignored_rows(poison, skip, keywords, backend, device):
    """A product meets them where the host does not ask which rows count; the head's gradient must not."""
    _, labels = rows(device)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, 7, generator=generator).to(device)
    head, bias = (torch.randn(*shape, generator=generator).to(device) for shape in ((V, 7), (V,)))
    poisoned = hidden.clone()
    poisoned[IGNORED] = poison
    given = {"skip_ignored": skip, "backend": backend, **keywords}
    with_bias = given.pop("bias", False)
    outcomes = []
    for states in (hidden, poisoned):
        leaves = [t.clone().requires_grad_() for t in (states, head, bias)]
        loss = fused_linear_deft_loss(*leaves[:2], labels, leaves[2] if with_bias else None, **given)
        loss.sum().backward()
        outcomes.append((loss.detach(), *(x.grad for x in leaves[: 2 + with_bias])))
    assert not outcomes[0][1][IGNORED].any() and outcomes[0][2].any()
    for plain, other in zip(*outcomes, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("own", ["torch", "triton", "reference"])
def test_token_weights_of_ignored_rows(reduction, own, device):
    """NaN in the token weights of padding, and the gradient that these weights get."""
    logits, labels = rows(device)
    weight = torch.linspace(0.5, 2.0, N, device=device)
    weight[IGNORED] = math.nan
    weight.requires_grad_()
    loss = deft_loss(logits, labels, token_weight=weight, reduction=reduction, backend=own)
    assert loss.isfinite().all()
    sent = torch.full_like(loss, 2.0)
    if reduction == "none":
        sent[IGNORED] = math.inf
    loss.backward(sent)
    assert torch.equal(weight.grad[IGNORED], torch.zeros(2, device=device))
    assert weight.grad[COUNTED].isfinite().all() and weight.grad[COUNTED].all()


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("poison", POISON)
def test_token_weights_of_rows_outside_a_band(poison, in_forward, backend, device):
    logits, labels = rows(device)
    p = deft_loss(logits, labels, return_stats=True, backend=backend)[1].logp[COUNTED].exp()
    objective = objectives.deft().within(f"p>={p.median().item() / 2}")
    weight = torch.linspace(0.5, 2.0, N, device=device)
    outcomes = []
    for own in (weight, weight.where((labels >= 0) & (weight != weight[COUNTED[int(p.argmin())]]), poison)):
        x = logits.clone().requires_grad_()
        loss = deft_loss(
            x, labels, objective=objective, token_weight=own, num_items=3.0, grad_in_forward=in_forward,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        outcomes.append((loss.detach(), x.grad))
    assert not own.isfinite().all()
    for plain, poisoned in zip(*outcomes, strict=True):
        assert torch.equal(plain, poisoned)


# A function with a parameter -------------------------------------------------------------------------------


def by_power(r: RowStatistics, a: Tensor) -> Tensor:
    return -(r.entropy**a) * r.logp


def by_logarithm(r: RowStatistics, a: Tensor) -> Tensor:
    return a * r.collision.log() * r.logp


def by_quotient(r: RowStatistics, a: Tensor) -> Tensor:
    return -r.logp / (a * r.max_prob) + a / (r.max_prob - r.collision)


def by_root(r: RowStatistics, a: Tensor) -> Tensor:
    return (a * (1 - r.logp.exp())).sqrt() + (a * r.entropy).sqrt()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", [by_power, by_logarithm, by_quotient, by_root])
@pytest.mark.parametrize("own", ["torch", "triton", "reference", "linear"])
def test_learnable_parameter(own, function, reduction, device):
    """Its gradient, and that of the logits, are those of the rows that count, had they been given alone."""
    logits, labels = rows(device)
    if own == "linear":
        logits = logits.double()
    eye = torch.eye(V, device=device, dtype=torch.float64)

    def run(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = torch.tensor(0.7, device=device, requires_grad=True)
        x = z.clone().requires_grad_()
        keywords = {"objective": lambda r: function(r, a), "reduction": reduction}
        if own == "linear":
            loss = fused_linear_deft_loss(x, eye, y, backend="torch", **keywords)
        else:
            loss = deft_loss(x, y, backend=own, **keywords)
        loss.sum().backward()
        return loss.detach(), x.grad, a.grad

    loss, gradient, of_parameter = run(logits, labels)
    expected = run(logits[COUNTED], labels[COUNTED])
    if reduction == "none":
        assert not loss[IGNORED].any()
        loss = loss[COUNTED]
    torch.testing.assert_close(loss, expected[0])
    assert not gradient[IGNORED].any()
    torch.testing.assert_close(gradient[COUNTED], expected[1])
    assert of_parameter.isfinite()
    torch.testing.assert_close(of_parameter, expected[2])


def test_learnable_parameter_without_rows(backend, device):
    logits, labels = rows(device)
    a = torch.tensor(0.7, device=device, requires_grad=True)
    loss = deft_loss(
        logits, labels.fill_(-100), objective=lambda r: by_power(r, a), z_loss=1e-3, backend=backend
    )
    loss.backward()
    assert loss == 0 and a.grad == 0


# Denominators ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["backward", "forward", "inplace forward", "smoothed", "function"])
@pytest.mark.parametrize("items", [torch.tensor(0), torch.tensor([0.0]), torch.tensor(3)], ids=str)
@pytest.mark.parametrize("own", ["torch", "triton", "reference"])
def test_num_items_of_a_batch_without_rows(own, items, mode, device):
    """Counted from the labels of all ranks or micro-batches it is 0 where none counts: no 0 / 0."""
    if own == "reference" and mode.endswith("forward"):
        mode = "backward"
    logits, labels = rows(device)
    options = {} if own == "reference" and mode == "backward" else MODES[mode]
    x = logits.requires_grad_()
    loss = deft_loss(x, labels.fill_(-100), num_items=items.to(device), backend=own, **options)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("items", [torch.tensor(0), torch.tensor([0.0])], ids=str)
def test_num_items_of_a_linear_batch_without_rows(items, backend, device):
    hidden, head = torch.randn(N, 7, device=device, requires_grad=True), torch.randn(V, 7, device=device)
    labels = torch.full((N,), -100, device=device)
    loss = fused_linear_deft_loss(hidden, head, labels, num_items=items.to(device), backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("own", ["torch", "triton", "reference"])
def test_class_weights_that_sum_to_zero(own, in_forward, smoothing, device):
    """With rows that count: NaN, as in F.cross_entropy, and neither a sum nor 0. With num_items it is said
    what to divide by."""
    logits, labels = rows(device)
    weight = torch.ones(V, device=device)
    weight[labels[COUNTED]] = 0.0
    options = {"objective": "nll", "weight": weight, "label_smoothing": smoothing, "backend": own}
    if own != "reference":
        options["grad_in_forward"] = in_forward
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = deft_loss(x, labels, **options)
    expected = F.cross_entropy(y, labels, weight=weight, label_smoothing=smoothing)
    assert expected.isnan() and loss.isnan()
    loss.backward()
    expected.backward()
    assert torch.equal(x.grad[COUNTED].isnan(), y.grad[COUNTED].isnan())
    assert torch.equal(x.grad[IGNORED], torch.zeros(2, V, device=device))
    given = deft_loss(logits, labels, num_items=3, **options)
    total = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(given, total / 3)


@pytest.mark.parametrize("own", ["torch", "triton", "reference"])
def test_class_weights_without_rows(own, device):
    logits, labels = rows(device)
    x = logits.requires_grad_()
    loss = deft_loss(x, labels.fill_(-100), weight=torch.zeros(V, device=device), backend=own)
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
