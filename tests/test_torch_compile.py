"""torch.compile, the operators' registration, numerical derivatives, autocast, and what an import costs.

V = 11 to 23 and a handful of rows: tracing and finite differences are about code paths, not sizes.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rows import make
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from deft_kernels import DEFTLoss, deft_loss, objectives, row_statistics
from deft_kernels.backends.pytorch.finish import gradient_fields
from deft_kernels.core.spec import Spec
from deft_kernels.operators import in_place
from deft_kernels.operators import logits as logits_operators

N, V = 6, 23


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def focal(r):
    return -((1 - r.logp.exp()) ** 2) * r.logp + 0.1 * r.entropy


CALLS = {
    "mean": {},
    "none": {"reduction": "none"},
    "backward": {"grad_in_forward": False},
    "statistics": {"return_stats": True},
    "shift": {"shift": True},
    "function": {"objective": focal},
    "function and weights": {"objective": focal, "weight": torch.linspace(0.5, 2, V), "z_loss": 0.01},
    "inplace": {"inplace": True},
    "inplace forward": {"inplace": True, "grad_in_forward": True},
    "transforms": {"softcap": 5.0, "temperature": 1.3, "z_loss": 1e-2, "label_smoothing": 0.1},
    "weights": {"weight": torch.linspace(0.5, 2, V), "token_weight": torch.linspace(0, 2, N).reshape(2, 3)},
    "num_items": {"num_items": torch.tensor([9.0])},
    "cayley": {"objective": "cayley"},
    "through the gate": {"objective": objectives.deft(1, detach=False), "reduction": "sum"},
    "band": {"objective": objectives.eaft().within("p>=0.01")},
}


def graph_backend() -> str:
    """The graph is captured and AutogradFunction, functionalisation and decompositions run: "aot_eager".
    Code generation is PyTorch's, and takes a C++ compiler and a minute."""
    return "aot_eager"


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name):
    """No graph break, and the same loss, statistics and gradient, twice in a row."""
    keywords = {"backend": "torch", **CALLS[name]}
    logits, labels = make("plain", N, V, torch.float32)
    labels = labels.reshape(2, 3)
    labels[1, 0] = -100

    def step(x: Tensor) -> tuple[Tensor, ...]:
        # a step of a model between parameter and logits, as an in-place gradient expects
        out = deft_loss((x * 1.5).reshape(2, 3, V), labels, **keywords)
        return (out[0], *(s for s in out[1] if s is not None)) if isinstance(out, tuple) else (out,)

    compiled = torch.compile(step, fullgraph=True, backend=graph_backend())
    for scale in (1.0, 0.7):
        results = []
        for function in (step, compiled):
            x = (logits * scale).requires_grad_()
            loss, *stats = function(x)
            loss.backward(torch.linspace(-1, 2, loss.numel()).reshape(loss.shape) if loss.dim() else None)
            results.append([loss.detach(), x.grad, *stats])
        assert len(results[0]) == len(results[1])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


def test_compiled_row_statistics_and_module():
    logits, labels = make("plain", N, V, torch.float32)
    module = DEFTLoss(torch.linspace(0.5, 2, V), backend="torch")

    def step(x: Tensor) -> Tensor:
        stats = row_statistics(x, labels, backend="torch")
        return module(x, labels) + (stats.logp * stats.entropy).sum() + stats.max_prob.mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=graph_backend())):
        x = logits.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_compiled_with_a_dynamic_batch():
    def step(x: Tensor, labels: Tensor) -> Tensor:
        return deft_loss(x, labels, backend="torch")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=graph_backend())
    for n in (3, 5, 8):
        logits, labels = make("plain", n, V, torch.float32)
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        compiled(x, labels).backward()
        step(y, labels).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_in_place_with_a_dynamic_batch(dynamic):
    def step(x: Tensor, labels: Tensor) -> Tensor:
        return deft_loss((x * 1.5).transpose(0, 1), labels, backend="torch", inplace=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=graph_backend())
    for n in (3, 5, 8):
        logits, labels = torch.randn(2, n, V), torch.randint(V, (n, 2))
        x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        compiled(x, labels).backward()
        step(y, labels).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=1e-7)


def test_compiled_reference():
    logits, labels = make("plain", N, V, torch.float32)

    def step(x: Tensor) -> Tensor:
        return deft_loss(x, labels, objective="cayley", backend="reference")

    compiled = torch.compile(step, fullgraph=True, backend=graph_backend())
    torch.testing.assert_close(compiled(logits), step(logits))


def test_compiled_through_the_code_generator():
    """Once through the default backend, so that the operators' layouts meet generated code.

    Where there is no C++ compiler PyTorch cannot generate any, and the graph is what can be tried.
    """
    generator = "inductor" if any(map(shutil.which, ("g++", "clang++", "c++"))) else graph_backend()
    logits, labels = make("plain", N, V, torch.float32)

    def step(x: Tensor) -> Tensor:
        return deft_loss(torch.tanh(x) * 3, labels, backend="torch")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=generator)):
        x = logits.clone().requires_grad_()
        loss = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# The operators ---------------------------------------------------------------------------------------------


def arguments(backend: str, device: str, dtype: torch.dtype, weighted: bool):
    logits, labels = (t.to(device) for t in make("plain", 4, V, dtype))
    labels[1] = -100
    code, numbers = Spec(objectives.deft(), backend=backend).encode()
    weight = torch.linspace(0.5, 2, V, device=device) if weighted else None
    return logits, labels, weight, torch.linspace(0.1, 1, 4, device=device), code, numbers


OPERATORS = {
    name: value
    for module in (logits_operators, in_place)
    for name, value in vars(module).items()
    if isinstance(value, torch._library.custom_ops.CustomOpDef)
}


@pytest.mark.sampled
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [
    "row_loss", "row_loss_with_gradient", "row_loss_with_gradient_", "logits_gradient", "logits_gradient_",
    "match_upstream_", "row_statistics"])  # fmt: skip
def test_opcheck(name, weighted, backend, device):
    """Schema, shape functions, autograd registration and tracing of every operator."""
    logits, labels, weight, scale, code, numbers = arguments(backend, device, torch.float32, weighted)
    operator = OPERATORS[name]
    _, rows = logits_operators.row_loss(logits, labels, weight, -100, code, numbers)
    leaf = logits.clone().requires_grad_()
    args = {
        "row_loss": (leaf, labels, weight, -100, code, numbers),
        "row_loss_with_gradient": (leaf, labels, scale, weight, -100, code, numbers),
        "row_loss_with_gradient_": (logits, labels, scale, weight, -100, code, numbers),
        "logits_gradient": (logits, labels, weight, rows, scale, code, numbers),
        "logits_gradient_": (logits, labels, weight, rows, scale, code, numbers),
        "match_upstream_": (logits.clone(), torch.tensor(0.5, device=device), logits, labels, scale, weight,
                            rows, code, numbers),
        "row_statistics": (leaf, labels, -100, code, numbers),
    }[name]  # fmt: skip
    if name == "row_statistics":
        statistics = Spec(objectives.of_statistics(), statistics=True, backend=backend)
        args = (*args[:-2], *statistics.encode())
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    result = torch.library.opcheck(operator, args, test_utils=tests)
    assert set(result) == set(tests)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    """A new operator has to join the list above."""
    marks = dict(mark.args[:2] for mark in test_opcheck.pytestmark if mark.name == "parametrize")
    assert set(OPERATORS) == set(marks["name"])


@pytest.mark.parametrize(
    "objective", [objectives.of_statistics(), objectives.deft(), objectives.eaft(detach=False)]
)
def test_settings_survive_the_schema(objective):
    from deft_kernels.core.spec import decode

    spec = Spec(objective.within("0.1<=p<=0.7"), 3.0, 0.7, 0.01, 0.1, 0.2, True, True, "triton")
    assert decode(*spec.encode()) == replace(spec, objective=replace(spec.objective, name=objective.family))


@pytest.mark.parametrize("name", ["mesh:tp", "100%", "a%3Ab:", ""])
def test_a_group_of_any_name_survives_the_schema(name):
    """A DeviceMesh gives its groups names of its own, which may hold what separates the code's fields."""
    from deft_kernels.core.groups import Shard
    from deft_kernels.core.spec import decode

    spec = Spec(objectives.Objective("cayley", "deformed", "cayley", batch_group=name))
    for shard in (None, Shard(3, 10, 2, name or "a", 4)):
        given = replace(spec, shard=shard)
        found = decode(*given.encode())
        assert (found.shard, found.objective.batch_group) == (shard, name)


def test_gradient_fields_leave_their_argument_alone(backend, device):
    logits, labels, _, scale, _, _ = arguments(backend, device, torch.float32, False)
    code, numbers = Spec(objectives.of_statistics(), statistics=True, backend=backend).encode()
    *_, rows = logits_operators.row_statistics(logits, labels, -100, code, numbers)
    before = rows.clone()
    gradient_fields(rows, scale, scale, scale, scale, scale, 1.0)
    assert torch.equal(rows, before)


# Derivatives -----------------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "nll": objectives.nll(),
    "neg_prob": objectives.neg_prob(),
    "tsallis": objectives.tsallis(0.4),
    "deft 2": objectives.deft(detach=False),
    "deft 1": objectives.deft(1, detach=False),
    "deft inf": objectives.deft(math.inf, detach=False),
    "deft eps": objectives.deft(detach=False, eps=0.05),
    "cayley": objectives.cayley(detach=False, mean_prob=0.3),
    "rational": objectives.rational(0.6),
    "rational collision": objectives.rational(detach=False),
    "dft": objectives.dft(detach=False),
    "eaft": objectives.eaft(1.5, detach=False),
    "function": focal,
}
OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "all": {"softcap": 4.0, "temperature": 1.4, "z_loss": 0.02, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("own", ["torch", "reference"])
def test_gradcheck(own, name, options):
    """The gradient is that of the loss, by finite differences in float64, with an ignored row and class and
    token weights. Objectives that hold their gate have another rule (test_semantics, test_held_gate_rule)."""
    keywords = {**OPTIONS[options], "objective": DIFFERENTIABLE[name], "backend": own}
    if name == "function":
        keywords.pop("label_smoothing", None)
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, -100, 10])
    weight = torch.linspace(0.5, 2, 11, dtype=torch.float64)
    token_weight = torch.tensor([0.7, 1.0, -1.3], dtype=torch.float64, requires_grad=options == "none")

    def call(x: Tensor, w: Tensor) -> Tensor:
        return deft_loss(x, labels, weight=weight, token_weight=w, **keywords)

    assert torch.autograd.gradcheck(call, (logits, token_weight))


@pytest.mark.parametrize("own", ["torch", "reference"])
def test_gradcheck_of_the_statistics(own):
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, -100, 10])

    def call(x: Tensor) -> tuple[Tensor, ...]:
        stats = row_statistics(x, labels, softcap=4.0, temperature=1.4, backend=own)
        return stats.logp, stats.lse, stats.collision, stats.entropy, stats.max_prob

    assert torch.autograd.gradcheck(call, (logits,))


@pytest.mark.parametrize("name", ["deft", "cayley", "dft", "eaft", "rational"])
def test_a_held_gate_is_another_gradient(name):
    """And so gradcheck must refuse it; otherwise `detach` would mean nothing."""
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0, 10])
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: deft_loss(x, labels, objective=name, backend="torch"), (logits,))


# Autocast and imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", ["deft", focal], ids=["deft", "function"])
def test_autocast(objective, dtype, backend, device):
    """Autocast casts nothing here: loss and gradient are what they are without it."""
    logits, labels = (t.to(device) for t in make("plain", 3, V, dtype))
    results = []
    for enabled in (False, True):
        x = logits.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            loss = deft_loss(x, labels, objective=objective, backend=backend)
        loss.backward()
        assert loss.dtype == torch.float32 and x.grad.dtype == dtype
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_autocast_of_a_model(backend, device):
    linear = torch.nn.Linear(8, V, device=device)
    labels = torch.tensor([1, 2, 22], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = linear(torch.randn(3, 8, device=device))
        loss = deft_loss(logits, labels, backend=backend)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.any()


NO_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch
import deft_kernels as dk
logits = torch.randn(4, 9, requires_grad=True)
labels = torch.tensor([1, 2, -100, 8])
for name in ("deft", "nll", "neg_prob", "cayley", "rational", "dft", "eaft"):
    dk.deft_loss(logits, labels, objective=name).backward()
dk.row_statistics(logits, labels).entropy.sum().backward()
dk.DEFTLoss(reduction="none", objective=lambda r: -r.logp)(logits, labels).sum().backward()
dk.gated_loss(torch.tensor([-1.0]), torch.tensor([-0.5]))
assert logits.grad.isfinite().all()
"""
LAZY = """
import sys
import torch
import deft_kernels
assert "triton" not in sys.modules, "triton was imported"
# PyTorch itself may import Triton when an operator first runs; the package's kernels must not.
deft_kernels.deft_loss(torch.randn(2, 5, requires_grad=True), torch.tensor([0, 4])).backward()
assert not [m for m in sys.modules if m.startswith("deft_kernels.backends.triton")]
"""


@pytest.mark.parametrize("program", [NO_TRITON, LAZY], ids=["no triton", "lazy"])
def test_import(program):
    """A CPU user needs no Triton, and pays for none."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
