"""Plain eager calls go by autograd Functions; whoever traces sees one operator (`operators.eager`)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from deft_kernels import deft_loss, fused_linear_deft_loss, row_statistics
from deft_kernels.core.statistics import Field
from deft_kernels.operators import hidden as hidden_operators
from deft_kernels.operators import in_place
from deft_kernels.operators import logits as logits_operators
from deft_kernels.operators.eager import watched

MODES = {
    "default": {"grad_in_forward": False},
    "in forward": {"grad_in_forward": True},
    "in place": {"inplace": True, "grad_in_forward": False},
    "in place, in forward": {"inplace": True, "grad_in_forward": True},
}


def inputs() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 50, (6,))
    labels[2] = -100
    return torch.randn(6, 50), labels


class Watch(TorchDispatchMode):
    """Names of the package's operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "deft_kernels":
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def every_operator() -> list[torch._library.custom_ops.CustomOpDef]:
    modules = (logits_operators, in_place, hidden_operators)
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, torch._library.custom_ops.CustomOpDef)]


def step(logits: Tensor, labels: Tensor, keywords: dict) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = deft_loss(leaf, labels, **keywords)
    (loss * 0.5).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("mode", MODES)
def test_functions_and_operators_agree(mode, backend, device):
    """Bit for bit, but for the mean of the kernels, which is summed in another order."""
    logits, labels = (t.to(device) for t in inputs())
    keywords = MODES[mode] | {"backend": backend}
    plain = step(logits, labels, keywords)
    with Watch() as watch:
        seen = step(logits, labels, keywords)
    assert watch.seen
    torch.testing.assert_close(plain[0], seen[0], rtol=0.0 if backend == "torch" else 3e-7, atol=0.0)
    assert torch.equal(plain[1], seen[1])


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 9000])
def test_the_kernels_of_the_batch(count, device):
    """They take 4,096 rows at a time. Rows that are not kept hold what would show."""
    from deft_kernels.backends.triton import backend as triton_backend

    labels = torch.randint(0, 3, (count,), device=device)
    labels[::3] = -100
    kept = labels != -100
    scale = triton_backend.mean_scale(labels, -100)
    assert scale.shape == (count,)
    if count:
        assert scale[0] == 1.0 / kept.sum().clamp(min=1).float()
    rows = torch.full((len(Field), count), torch.nan, device=device)
    rows[Field.KEPT] = kept.float()
    loss = torch.rand(count, device=device)
    row_scale = torch.rand(count, device=device).masked_fill(~kept, torch.inf)
    expected = (loss.double() * row_scale.double())[kept].sum()
    total = triton_backend.weighted_total(loss, row_scale, rows)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0.0)
    mean, its_scale = triton_backend.mean(loss, rows, labels, -100)
    assert torch.equal(its_scale, scale)
    assert torch.equal(mean, triton_backend.weighted_total(loss, scale, rows))
    expected = loss.double()[kept].sum() / kept.sum().clamp(min=1)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_call_uses_no_operator(mode, backend, device, monkeypatch):
    def fail(*_):
        raise AssertionError("an operator was called")

    for operator in every_operator():
        monkeypatch.setattr(operator, "_opoverload", fail)
    logits, labels = (t.to(device) for t in inputs())
    loss, gradient = step(logits, labels, MODES[mode] | {"backend": backend})
    assert loss.isfinite() and gradient.any()


OTHERS = {
    "row_statistics": lambda x, w, y, k: row_statistics(x, y, **k).collision.sum(),
    "linear": lambda x, w, y, k: fused_linear_deft_loss(x, w, y, **k),
    "linear, rows": lambda x, w, y, k: fused_linear_deft_loss(x, w, y, reduction="none", **k).sum(),
    "linear, function": lambda x, w, y, k: fused_linear_deft_loss(x, w, y, objective=lambda r: -r.logp, **k),
}


@pytest.mark.parametrize("call", OTHERS)
def test_the_other_calls(call, backend, device, monkeypatch):
    """The same bit for bit by the operators, of which a plain call uses none."""

    def step() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (logits, head)]
        loss = OTHERS[call](*leaves, labels, {"backend": backend})
        (loss * 0.5).backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    logits, labels = (t.to(device) for t in inputs())
    head = torch.randn(50, 50, device=device)
    with Watch() as watch:
        seen = step()
    assert watch.seen

    def fail(*_: object) -> None:
        raise AssertionError("an operator was called")

    for operator in every_operator():
        monkeypatch.setattr(operator, "_opoverload", fail)
    plain = step()
    assert len(plain) == len(seen) > 1
    for one, other in zip(plain, seen, strict=True):
        assert torch.equal(one, other)


FIRST = """
import sys, torch
before = set(sys.modules)
from deft_kernels import deft_loss, fused_linear_deft_loss, row_statistics
x, w = (torch.randn(4, 7, requires_grad=True) for _ in range(2))
y = torch.tensor([1, 2, 3, 0])
deft_loss(x, y).backward()
deft_loss(x, y, reduction="none").sum().backward()
deft_loss(x * 1.0, y, inplace=True).backward()
row_statistics(x, y).entropy.sum().backward()
fused_linear_deft_loss(x, w, y).backward()
large = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton", "sympy")
print(*(name for name in large if name in set(sys.modules) - before))
"""


def test_first_calls_import_nothing_large():
    """torch._dynamo alone takes more than a second, and an operator's first call imports it."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_who_is_watched():
    logits, labels = inputs()
    assert not watched(logits, labels, None)
    assert not watched(torch.nn.Parameter(logits), labels)
    assert watched(logits.to("meta"), labels)
    with FakeTensorMode() as mode:
        assert watched(logits, labels)
    assert watched(mode.from_tensor(logits), labels)
    seen = []
    torch.vmap(lambda z: seen.append(watched(z)) or z)(logits)
    assert seen == [True]


def test_a_trace_holds_one_operator_and_its_backward():
    logits, labels = inputs()

    def gradient(z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(deft_loss(leaf, labels, grad_in_forward=False), leaf)[0]

    graph = make_fx(gradient)(logits)
    names = [str(node.target) for node in graph.graph.nodes if "deft_kernels" in str(node.target)]
    assert names == ["deft_kernels.row_loss.default", "deft_kernels.logits_gradient.default"]
    assert torch.equal(graph(logits), gradient(logits))


@pytest.mark.parametrize("mode", ["in place", "in place, in forward"])
def test_the_logits_version_moves(mode, backend, device):
    logits, labels = (t.to(device) for t in inputs())
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1.0
    squares = (hidden * hidden).sum()
    loss = deft_loss(hidden, labels, backend=backend, **MODES[mode])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()
