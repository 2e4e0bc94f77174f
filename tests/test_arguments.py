"""What is accepted where a number, a dense tensor or an objective is meant, and how the rest is refused."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from deft_kernels import (
    DEFTLoss,
    FusedLinearDEFTLoss,
    VocabShard,
    deft_loss,
    fused_linear_deft_loss,
    gated_loss,
    objectives,
    row_statistics,
)
from deft_kernels.core import groups

N, D, V = 4, 5, 7


def rows(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, V, device=device), torch.tensor([0, 3, 6, 2], device=device)


def head() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, D), torch.randn(V, D)


# Numbers ---------------------------------------------------------------------------------------------------

NUMBERS = [
    ("ignore_index", np.int64(3), 3),
    ("ignore_index", np.int8(-1), -1),
    ("num_items", np.int32(3), 3),
    ("num_items", np.float32(2.5), 2.5),
    ("softcap", np.float64(3.0), 3.0),
    ("temperature", np.float32(1.5), 1.5),
    ("temperature", np.int64(2), 2.0),
    ("z_loss", np.float16(0.5), 0.5),
    ("label_smoothing", np.float32(0.125), 0.125),
    ("logit_scale", np.float32(0.5), 0.5),
]


@pytest.mark.parametrize(("name", "value", "plain"), NUMBERS)
def test_numbers_of_numpy(name, value, plain, backend, device):
    logits, labels = rows(device)
    loss = deft_loss(logits, labels, backend=backend, **{name: value})
    assert torch.equal(loss, deft_loss(logits, labels, backend=backend, **{name: plain}))
    hidden, weight = head()
    linear = fused_linear_deft_loss(hidden, weight, labels.cpu(), **{name: value})
    assert torch.equal(linear, fused_linear_deft_loss(hidden, weight, labels.cpu(), **{name: plain}))


def test_numbers_of_numpy_elsewhere():
    hidden, weight = head()
    labels = rows()[1]
    expected = fused_linear_deft_loss(hidden, weight, labels, chunk_bytes=100)
    assert torch.equal(fused_linear_deft_loss(hidden, weight, labels, chunk_bytes=np.int64(100)), expected)
    assert objectives.tsallis(np.float64(0.5)) == objectives.tsallis(0.5)
    assert objectives.tsallis(q=np.float32(0.5)) == objectives.tsallis(0.5)
    assert objectives.deft(np.int64(1)) == objectives.deft(1)
    assert objectives.deft(np.float32(math.inf)) == objectives.deft(math.inf)
    assert objectives.eaft(np.float32(2), top_k=np.int64(8)) == objectives.eaft(2, top_k=8)
    assert objectives.cayley(mean_prob=np.float32(0.5)) == objectives.cayley(mean_prob=0.5)
    assert type(objectives.tsallis(np.float32(0.5)).alpha) is float


def test_a_shard_counted_by_numpy(monkeypatch):
    class Group:
        def size(self):
            return 2

    monkeypatch.setattr(groups, "group_name", lambda group, name="group": "ranks")
    start, size = np.array([5, 12])
    shard = groups.resolved(VocabShard(Group(), start, size), 7, torch.device("cpu"))
    assert shard[:4] == (5, 12, 2, "ranks") and type(shard.start) is int
    for field, place in (("start", (5.0, 12)), ("size", (5, True))):
        with pytest.raises(TypeError, match=f"^group: VocabShard.{field}: expected an int"):
            groups.resolved(VocabShard(Group(), *place), 7, torch.device("cpu"))


NO_NUMBERS = [
    ("temperature", np.array(1.0), "numpy.ndarray"),
    ("temperature", np.bool_(True), r"numpy.bool"),
    ("temperature", 1j, "complex"),
    ("ignore_index", np.float32(1.0), "numpy.float32"),
    ("ignore_index", np.bool_(True), r"numpy.bool"),
    ("num_items", np.bool_(True), r"numpy.bool"),
    ("shift", np.bool_(True), r"numpy.bool"),
]


@pytest.mark.parametrize(("name", "value", "got"), NO_NUMBERS)
def test_what_is_no_number(name, value, got):
    logits, labels = rows()
    with pytest.raises(TypeError, match=f"^{name}: expected .*got {got}"):
        deft_loss(logits, labels, **{name: value})


@pytest.mark.parametrize("beyond", [2**63, -(2**63) - 1])
def test_ignore_index_beyond_int64(beyond):
    logits, labels = rows()
    hidden, weight = head()
    for call in (
        lambda k: deft_loss(logits, labels, ignore_index=k),
        lambda k: row_statistics(logits, labels, ignore_index=k),
        lambda k: fused_linear_deft_loss(hidden, weight, labels, ignore_index=k),
        lambda k: deft_loss(logits, labels, ignore_index=k, backend="reference"),
    ):
        with pytest.raises(ValueError, match=f"^ignore_index: .*int64.*{beyond}"):
            call(beyond)


@pytest.mark.parametrize("extreme", [2**63 - 1, -(2**63)])
def test_the_outermost_ignore_index(extreme, backend, device):
    logits, labels = rows(device)
    labels[1] = extreme
    loss = deft_loss(logits, labels, ignore_index=extreme, backend=backend)
    kept = [0, 2, 3]
    torch.testing.assert_close(loss, deft_loss(logits[kept], labels[kept], backend=backend))


# Tensors that are not dense --------------------------------------------------------------------------------


def nested(layout: torch.layout, *tail: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(n, *tail, dtype=dtype) for n in (2, 3)], layout=layout)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout):
    logits, labels = torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.long)
    whole, ragged = nested(layout, V), nested(layout, dtype=torch.long)
    weights = nested(layout)
    hidden, weight = torch.randn(2, 3, D), torch.randn(V, D)
    refused = {
        "logits": lambda: deft_loss(whole, ragged),
        "labels": lambda: deft_loss(logits, ragged),
        "token_weight": lambda: deft_loss(logits, labels, token_weight=weights),
        "hidden": lambda: fused_linear_deft_loss(nested(layout, D), weight, ragged),
        "logp": lambda: gated_loss(weights, weights),
    }
    for name, call in refused.items():
        with pytest.raises(
            TypeError, match=rf"^{name}: expected a dense tensor, got a nested one.*values\(\)"
        ):
            call()
    with pytest.raises(TypeError, match="^labels: expected a dense tensor"):
        fused_linear_deft_loss(hidden, weight, ragged)


def test_what_is_said_for_jagged_tensors_is_right():
    logits, labels = nested(torch.jagged, V), nested(torch.jagged, dtype=torch.long)
    assert deft_loss(logits.values(), labels.values(), reduction="none").shape == (5,)


def test_sparse_tensors():
    logits, labels = rows()
    hidden, weight = head()
    refused = {
        "logits": lambda: deft_loss(logits.to_sparse(), labels),
        "labels": lambda: deft_loss(logits, labels.to_sparse()),
        "token_weight": lambda: deft_loss(logits, labels, token_weight=torch.ones(N).to_sparse()),
        "weight": lambda: deft_loss(logits, labels, weight=torch.ones(V).to_sparse()),
        "num_items": lambda: deft_loss(logits, labels, num_items=torch.ones(1).to_sparse()),
        "hidden": lambda: fused_linear_deft_loss(hidden.to_sparse(), weight, labels),
        "bias": lambda: fused_linear_deft_loss(hidden, weight, labels, torch.ones(V).to_sparse()),
        "class_weight": lambda: fused_linear_deft_loss(
            hidden, weight, labels, class_weight=torch.ones(V).to_sparse()
        ),
        "log_collision": lambda: gated_loss(logits[:, 0], logits[:, 0].to_sparse()),
        "valid": lambda: gated_loss(
            logits[:, 0], logits[:, 0], valid=torch.ones(N, dtype=torch.bool).to_sparse()
        ),
    }
    for name, call in refused.items():
        with pytest.raises(TypeError, match=f"^{name}: expected a dense .*sparse"):
            call()


# Shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, V, 5), (2, V, 5, 6), (0, V, 3)])
def test_classes_in_the_second_dimension(shape):
    """[N, C, T], as F.cross_entropy wants them."""
    logits, labels = torch.randn(shape), torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    with pytest.raises(ValueError, match=r"^labels: .*move the classes last: logits\.movedim\(1, -1\)"):
        deft_loss(logits, labels)
    loss = deft_loss(logits.movedim(1, -1), labels, objective="nll", reduction="sum")
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_another_wrong_shape_says_nothing_of_classes():
    with pytest.raises(ValueError, match="^labels: expected shape") as raised:
        deft_loss(torch.randn(2, 3, V), torch.zeros(3, 2, dtype=torch.long))
    assert "movedim" not in str(raised.value)


EMPTY = [s for n in (3, 4) for s in itertools.product((0, 2), repeat=n) if 0 in s] + [(2, 0, 3, 0, 2)]


@pytest.mark.parametrize(
    "keywords",
    [{}, {"inplace": True}, {"grad_in_forward": True}, {"reduction": "none"}, {"objective": "cayley"}],
    ids=str,
)
def test_no_rows_in_many_dimensions(keywords, backend, device):
    for shape in EMPTY:
        logits = torch.randn(*shape, V, device=device, requires_grad=True)
        labels = torch.zeros(shape, dtype=torch.long, device=device)
        loss, stats = deft_loss(logits, labels, backend=backend, return_stats=True, **keywords)
        loss.sum().backward()
        assert loss.sum() == 0
        assert stats.logp.shape == shape
        assert logits.grad.shape == logits.shape


def test_no_rows_of_a_transposed_tensor(backend, device):
    logits = torch.randn(3, 0, 2, V, device=device).transpose(0, 2).requires_grad_()
    labels = torch.zeros(2, 0, 3, dtype=torch.long, device=device)
    deft_loss(logits, labels, backend=backend).backward()
    assert logits.grad.shape == (2, 0, 3, V)


# Devices without data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"objective": "cayley"}], ids=str)
def test_the_linear_call_on_the_meta_device(keywords):
    hidden, weight = (x.to("meta").requires_grad_() for x in head())
    bias = torch.zeros(V, device="meta", requires_grad=True)
    labels = torch.zeros(N, dtype=torch.long, device="meta")
    loss, stats = fused_linear_deft_loss(hidden, weight, labels, bias, return_stats=True, **keywords)
    assert loss.device.type == "meta" and loss.dtype == torch.float32
    assert loss.shape == ((N,) if keywords.get("reduction") == "none" else ())
    assert stats.logp.shape == (N,)
    loss.sum().backward()
    for tensor in (hidden, weight, bias):
        assert tensor.grad.shape == tensor.shape and tensor.grad.device.type == "meta"


# Objectives ------------------------------------------------------------------------------------------------


def test_cross_entropy_by_its_usual_names(backend, device):
    logits, labels = rows(device)
    expected = deft_loss(logits, labels, objective="nll", backend=backend)
    for name in ("ce", "cross_entropy"):
        assert objectives.resolve(name) == objectives.nll()
        assert torch.equal(deft_loss(logits, labels, objective=name, backend=backend), expected)
    assert torch.equal(DEFTLoss(objective="ce", backend=backend)(logits, labels), expected)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rational_without_curvature(reduction, detach, backend, device):
    """alpha = 0 is cross-entropy, a target of probability 0 included."""
    logits, labels = rows(device)
    logits[0, 0] = -math.inf
    results = []
    for objective in (objectives.rational(0.0, detach=detach), objectives.nll()):
        x = logits.clone().requires_grad_()
        loss, stats = deft_loss(
            x, labels, objective=objective, reduction=reduction, backend=backend, return_stats=True
        )
        (loss if reduction == "mean" else loss[1:].sum()).backward()
        results.append((loss, stats.alpha, stats.gate, x.grad[1:]))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    own, stats = deft_loss(
        logits, labels, objective=objectives.rational(0.0), backend="reference",
        reduction=reduction, return_stats=True,
    )  # fmt: skip
    torch.testing.assert_close(results[0][0], own)
    torch.testing.assert_close(results[0][2], stats.gate)


class Focal(nn.Module):
    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(2.0))

    def forward(self, r):
        return -((1 - r.logp.exp()) ** self.power) * r.logp


NO_OBJECTIVES = [
    (objectives.deft, r"objectives\.deft\(\.\.\.\)"),
    (objectives.nll, r"objectives\.nll\(\.\.\.\)"),
    (objectives.tsallis, r"objectives\.tsallis\(\.\.\.\)"),
    (objectives.chord, r"objectives\.chord\(\.\.\.\)"),
    (objectives.mile, r"objectives\.mile\(\.\.\.\)"),
    (objectives.infosft, r"objectives\.infosft\(\.\.\.\)"),
    (objectives.weighted, r"objectives\.weighted\(\.\.\.\)"),
    (functools.partial(objectives.deft, order=1), r"objectives\.deft\(\.\.\.\)"),
    (Focal, "the class Focal"),
    (nn.CrossEntropyLoss(), 'CrossEntropyLoss is none.*"nll"'),
    (type("Own", (nn.CrossEntropyLoss,), {})(), 'Own is none.*"nll"'),
    (nn.Linear(2, 2), "Linear is none"),
    (DEFTLoss(), "DEFTLoss is none"),
    (3, "expected a name, an Objective or a function of RowStatistics, got int"),
]


@pytest.mark.parametrize(("objective", "message"), NO_OBJECTIVES)
def test_what_is_no_objective(objective, message, monkeypatch):
    logits, labels = rows()
    hidden, weight = head()
    for call in (
        lambda: deft_loss(logits, labels, objective=objective),
        lambda: fused_linear_deft_loss(hidden, weight, labels, objective=objective),
        lambda: DEFTLoss(objective=objective),
        lambda: FusedLinearDEFTLoss(objective=objective),
    ):
        with pytest.raises(TypeError, match=f"^objective: .*{message}"):
            call()


@pytest.mark.parametrize("name", ["log_collision", "entropy", "max_prob", "valid"])
def test_gated_loss_takes_tensors(name):
    logp = -torch.rand(N)
    with pytest.raises(TypeError, match=f"^{name}: expected a Tensor, got list"):
        gated_loss(logp, **{"log_collision": logp, name: [0.5] * N})


@pytest.mark.parametrize("objective", [objectives.deft, Focal(), lambda r: r.logp, 3])
def test_gated_loss_takes_no_function(objective):
    logp = -torch.rand(N)
    with pytest.raises(TypeError, match="^objective: expected a name or an Objective"):
        gated_loss(logp, logp, objective=objective)


def test_a_module_as_objective_is_trained_moved_and_saved_with_the_loss():
    logits, labels = rows()
    focal = Focal()
    expected = deft_loss(logits, labels, objective=focal)
    for loss in (DEFTLoss(objective=focal), FusedLinearDEFTLoss(objective=focal)):
        assert [name for name, _ in loss.named_parameters()] == ["objective.power"]
        assert "objective.power" in loss.state_dict()
    loss = DEFTLoss(objective=focal)
    value = loss(logits, labels)
    assert torch.equal(value, expected)
    value.backward()
    assert loss.objective.power.grad is not None
    assert loss.double().objective.power.dtype == torch.float64
    assert "objective=deft, reduction=mean" in repr(DEFTLoss())
    assert not list(DEFTLoss().parameters())
