"""The linear call under torch.compile, and its operators' registration. Sizes as in test_torch_compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deft_kernels import FusedLinearDEFTLoss, fused_linear_deft_loss, objectives
from deft_kernels.core.spec import Spec
from deft_kernels.operators import hidden as hidden_operators

N, D, V = 6, 4, 23
BUDGET = 2 * V * 4


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((2, 3, D), (V, D), (V,))
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    labels = torch.randint(0, V, (2, 3), generator=generator)
    labels[1, 0] = -100
    return hidden, weight, bias, labels


def focal(r):
    return -((1 - r.logp.exp()) ** 2) * r.logp + 0.1 * r.entropy


CALLS = {
    "mean": {},
    "none": {"reduction": "none"},
    "statistics": {"return_stats": True, "shift": True},
    "function": {"objective": focal, "class_weight": torch.linspace(0.5, 2, V)},
    "transforms": {"softcap": 5.0, "temperature": 1.3, "logit_scale": 0.5, "label_smoothing": 0.1},
    "num_items": {"num_items": torch.tensor([9.0])},
    "cayley": {"objective": "cayley"},
    "band": {"objective": objectives.eaft().within("p>=0.01")},
}


FROZEN_HEAD, FROZEN_TRUNK = (1,), (0, 2)
CASES = [(name, ()) for name in CALLS]
CASES += [(name, frozen) for name in ("mean", "none") for frozen in (FROZEN_HEAD, FROZEN_TRUNK)]


@pytest.mark.parametrize(("name", "frozen"), CASES)
def test_compiled_equals_eager(name, frozen):
    """No graph break, and the same loss, statistics and gradients, twice in a row."""
    *tensors, labels = problem()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        # a step of a model before the call and an upstream other than 1 after it
        keywords = {"backend": "torch", "chunk_bytes": BUDGET, **CALLS[name]}
        out = fused_linear_deft_loss(hidden * 1.5, weight, labels, bias, **keywords)
        loss, stats = out if isinstance(out, tuple) else (out, ())
        return (loss * 3.0, *(s for s in stats if s is not None))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 0.7):
        results = []
        for function in (step, compiled):
            inputs = [(x * scale).requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
            loss, *stats = function(*inputs)
            loss.backward(torch.linspace(-1, 2, loss.numel()).reshape(loss.shape) if loss.dim() else None)
            gradients = [x.grad for x in inputs if x.requires_grad]
            results.append([loss.detach(), *gradients, *stats])
        assert len(results[0]) == len(results[1])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


def test_compiled_module_under_autocast_with_a_dynamic_batch():
    module = FusedLinearDEFTLoss(backend="torch", chunk_bytes=BUDGET)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(hidden, weight, labels)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    _, weight, _, _ = problem()
    for n in (3, 5, 8):
        hidden, labels = torch.randn(n, D), torch.arange(n) % V
        results = []
        for function in (step, compiled):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = function(*inputs, labels)
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in inputs)])
        for eager, traced in zip(*results, strict=True):
            assert traced.dtype == eager.dtype == torch.float32
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.sampled
@pytest.mark.parametrize(("backend", "bias"), [("torch", True), ("torch", False), ("triton", True)])
@pytest.mark.parametrize(
    "name", ["linear_row_loss", "linear_loss_with_gradient", "linear_gradient", "linear_statistics"]
)
def test_opcheck(name, bias, backend, device):
    """Schema, shape function, autograd registration and a traced graph of each operator."""
    hidden, weight, own, labels = (x.to(device) for x in problem())
    hidden = hidden.reshape(N, D)
    flat = labels.reshape(-1)
    plain = Spec(objectives.deft(), statistics=True, backend=backend)
    of_rows = Spec(objectives.of_statistics(), statistics=True, backend=backend)
    scale = torch.linspace(0.1, 1.0, N, device=device)
    wanted, settings = [True, True, bias], (torch.float32, BUDGET, -100)
    tensors = (hidden, weight, own if bias else None)
    leaves = tuple(None if x is None else x.clone().requires_grad_() for x in tensors)
    _, rows = hidden_operators.linear_row_loss(*tensors, flat, None, wanted, *settings, *plain.encode())
    args = {
        "linear_row_loss": (*leaves, flat, None, wanted, *settings, *plain.encode()),
        "linear_loss_with_gradient": (*leaves, flat, scale, None, wanted, *settings, *plain.encode()),
        "linear_gradient": (*tensors, flat, None, rows, scale, wanted, *settings[:2], *plain.encode()),
        "linear_statistics": (*leaves, flat, wanted, *settings, *of_rows.encode()),
    }[name]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    result = torch.library.opcheck(getattr(hidden_operators, name), args, test_utils=tests)
    assert set(result) == set(tests)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    """A new operator has to join the list above."""
    marks = dict(mark.args[:2] for mark in test_opcheck.pytestmark if mark.name == "parametrize")
    kind = torch._library.custom_ops.CustomOpDef
    definitions = {value for value in vars(hidden_operators).values() if isinstance(value, kind)}
    assert {definition._name for definition in definitions} == set(marks["name"])
