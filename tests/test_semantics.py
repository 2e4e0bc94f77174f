"""What the calls mean, against PyTorch's own functions and formulas written out here, in float64.

Sizes: V = 37 is odd, so no row but the first begins on a 16-byte boundary; N = 6 gives every option a row
it changes and one that it leaves. The interpreter costs tens of milliseconds a row and kernel.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rows import make
from torch import Tensor

from deft_kernels import DEFTLoss, RowStatistics, deft_loss, gated_loss, objectives, reference, row_statistics

N, V = 6, 37
LOSS = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}


def rows(device: str, n: int = N, vocabulary: int = V) -> tuple[Tensor, Tensor]:
    logits, labels = make("plain", n, vocabulary, torch.float32, seed=3)
    return logits.to(device), labels.to(device)


def with_gradient(function, logits: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(loss, gradient by the logits); the upstream of a vector is random unless given."""
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(x)
    if upstream is None:
        upstream = torch.ones_like(loss) * 1.7 if loss.dim() == 0 else spread(loss.shape, loss)
    loss.backward(upstream.to(loss))
    return loss.detach(), x.grad


def spread(shape: torch.Size, like: Tensor) -> Tensor:
    """A reproducible upstream without pattern, negative values and a zero included."""
    values = torch.linspace(-1.0, 2.0, max(1, math.prod(shape)), dtype=torch.float64)
    return (values * torch.cos(7 * values)).reshape(shape).to(like)


def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), **LOSS)
    torch.testing.assert_close(ours[1].double(), theirs[1].double(), **GRADIENT)


# Against F.cross_entropy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [(1, 4), (0, 1, 2, 4, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_is_cross_entropy(reduction, weighted, smoothing, ignored, backend, device):
    logits, labels = rows(device)
    labels[list(ignored)] = -7
    weight = torch.linspace(0.0, 2.0, V, device=device) if weighted else None
    options = {"reduction": reduction, "ignore_index": -7, "label_smoothing": smoothing}
    agree(
        with_gradient(
            lambda x: deft_loss(x, labels, objective="nll", weight=weight, backend=backend, **options), logits
        ),
        with_gradient(
            lambda x: F.cross_entropy(
                x, labels, weight=None if weight is None else weight.double(), **options
            ),
            logits.double(),
        ),
    )


def test_ignore_index_inside_the_vocabulary(backend, device):
    logits, labels = rows(device)
    options = {"ignore_index": int(labels[2]), "label_smoothing": 0.1}
    agree(
        with_gradient(lambda x: deft_loss(x, labels, objective="nll", backend=backend, **options), logits),
        with_gradient(lambda x: F.cross_entropy(x, labels, **options), logits.double()),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (1, 2, 3), (3, 1, 2, 1)])
def test_leading_dimensions_are_free(shape, reduction, backend, device):
    logits, labels = rows(device, max(1, math.prod(shape)))
    shaped, own = logits.reshape(*shape, V), labels.reshape(shape)
    loss, gradient = with_gradient(lambda x: deft_loss(x, own, reduction=reduction, backend=backend), shaped)
    upstream = torch.tensor([1.7]) if shape == () and reduction == "none" else None
    flat = with_gradient(
        lambda x: deft_loss(x, labels, reduction=reduction, backend=backend), logits, upstream
    )
    assert loss.shape == (shape if reduction == "none" else ())
    assert torch.equal(loss.reshape(-1), flat[0].reshape(-1))
    assert torch.equal(gradient.reshape(-1, V), flat[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_of_any_integer_dtype(dtype, backend, device):
    logits, labels = rows(device)
    expected = deft_loss(logits, labels, backend=backend)
    assert torch.equal(deft_loss(logits, labels.to(dtype), backend=backend), expected)


# shift -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_is_manual_slicing(reduction, backend, device):
    logits, labels = rows(device)
    logits, labels = logits.reshape(2, 3, V), labels.reshape(2, 3)
    labels[1, 1] = -100
    loss, gradient = with_gradient(
        lambda x: deft_loss(x, labels, shift=True, reduction=reduction, backend=backend),
        logits,
        upstream=torch.ones(2, 3) if reduction == "none" else None,
    )
    expected = with_gradient(
        lambda x: deft_loss(x[:, :-1], labels[:, 1:], reduction=reduction, backend="reference"),
        logits.double(),
        upstream=torch.ones(2, 2) if reduction == "none" else None,
    )
    if reduction == "none":
        assert loss.shape == (2, 3)
        assert not loss[:, -1].any()
        loss = loss[:, :-1]
    assert not gradient[:, -1].any()
    agree((loss, gradient), expected)


def test_shift_of_statistics(backend, device):
    logits, labels = rows(device)
    logits, labels = logits.reshape(2, 3, V), labels.reshape(2, 3)
    shifted = row_statistics(logits, labels, shift=True, backend=backend)
    sliced = row_statistics(logits[:, :-1], labels[:, 1:], backend=backend)
    for ours, theirs in zip(shifted[:6], sliced[:6], strict=True):
        assert torch.equal(ours[:, :-1], theirs)
        assert not ours[:, -1].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_does_not_copy_the_logits(reduction, backend, device):
    """Every [N, V] tensor that the forward saves is the logits themselves."""
    logits, labels = rows(device)
    logits = logits.reshape(2, 3, V).requires_grad_()
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        deft_loss(logits, labels.reshape(2, 3), shift=True, reduction=reduction, backend=backend)
    large = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
    assert large and all(tensor.data_ptr() == logits.data_ptr() for tensor in large)


# Weights and denominators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "in forward", "weight by gradient"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight(reduction, mode, backend, device):
    """It scales a row and leaves the denominator; its own gradient is the row's share of the loss."""
    if mode == "in forward" and reduction == "none":
        reduction = "mean"
    logits, labels = rows(device)
    labels[3] = -100
    token_weight = torch.linspace(-0.5, 2.0, N, device=device)
    options = {"reduction": reduction, "backend": backend}
    if mode == "in forward":
        options["grad_in_forward"] = True
    mine = token_weight.clone().requires_grad_(mode == "weight by gradient")
    ours = with_gradient(lambda x: deft_loss(x, labels, token_weight=mine, **options), logits)
    double = token_weight.double().requires_grad_()

    def plain(x: Tensor) -> Tensor:
        per_row = deft_loss(x, labels, reduction="none", backend="reference") * double
        return {"mean": per_row.sum() / (N - 1), "sum": per_row.sum(), "none": per_row}[reduction]

    agree(ours, with_gradient(plain, logits.double()))
    if mode == "weight by gradient":
        torch.testing.assert_close(mine.grad.double(), double.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_token_weight_of_any_dtype(dtype, backend, device):
    logits, labels = rows(device)
    token_weight = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    expected = deft_loss(logits, labels, token_weight=token_weight.float(), backend=backend)
    loss = deft_loss(logits, labels, token_weight=token_weight.to(dtype), backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("kind", [float, int, "scalar", "one", "integer", "float64"])
@pytest.mark.parametrize("in_forward", [False, True])
def test_num_items_replaces_the_denominator(in_forward, kind, backend, device):
    logits, labels = rows(device)
    build = {
        "scalar": lambda: torch.tensor(11.0, device=device),
        "one": lambda: torch.tensor([11.0], device=device),
        "integer": lambda: torch.tensor(11, device=device),
        "float64": lambda: torch.tensor([11.0], device=device, dtype=torch.float64),
    }
    num_items = build[kind]() if isinstance(kind, str) else kind(11)
    options = {"num_items": num_items, "grad_in_forward": in_forward, "backend": backend}
    ours = with_gradient(lambda x: deft_loss(x, labels, **options), logits)
    assert ours[0].shape == () and ours[0].dtype == torch.float32
    agree(
        ours,
        with_gradient(
            lambda x: deft_loss(x, labels, reduction="sum", backend="reference") / 11, logits.double()
        ),
    )


@pytest.mark.parametrize("objective", ["deft", objectives.deft().within("p>=0.02")])
@pytest.mark.parametrize("in_forward", [False, True])
def test_gradient_accumulation(in_forward, objective, backend, device):
    """Eight rows at once equal two times four, the denominator being known beforehand."""
    logits, labels = rows(device, 8)
    labels[[1, 6, 7]] = -100
    options = {"num_items": 5, "grad_in_forward": in_forward, "objective": objective, "backend": backend}
    whole = with_gradient(lambda x: deft_loss(x, labels, **options), logits)
    parts = [
        with_gradient(lambda x, s=s: deft_loss(x, labels[s], **options), logits[s])
        for s in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])


# Transforms ------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("in_forward", [None, True])
@pytest.mark.parametrize("keywords", [{"softcap": 3.0}, {"temperature": 0.7}, {"temperature": 2.5},
                                      {"softcap": 3.0, "temperature": 0.7}, {"z_loss": 1e-2},
                                      {"softcap": 3.0, "temperature": 2.5, "z_loss": 1e-2},
                                      {"softcap": 3.0, "temperature": 0.7, "label_smoothing": 0.2},
                                      ])  # fmt: skip
def test_transforms(keywords, in_forward, backend, device):
    logits, labels = rows(device)
    labels[2] = -100
    valid = labels != -100

    def plain(x: Tensor) -> Tensor:
        z = x
        if "softcap" in keywords:
            z = keywords["softcap"] * torch.tanh(z / keywords["softcap"])
        z = z / keywords.get("temperature", 1.0)
        logp = torch.log_softmax(z, -1)
        alpha = logp.exp().square().sum(-1).detach()
        target = logp.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        per_row = (1 - torch.exp(alpha * target)) / alpha
        epsilon = keywords.get("label_smoothing", 0.0)
        per_row = (1 - epsilon) * per_row + epsilon * -logp.mean(-1)
        per_row = per_row + keywords.get("z_loss", 0.0) * torch.logsumexp(z, -1) ** 2
        return per_row[valid].mean()

    options = {**keywords, "grad_in_forward": in_forward, "backend": backend}
    agree(
        with_gradient(lambda x: deft_loss(x, labels, **options), logits),
        with_gradient(plain, logits.double()),
    )


# Strides ---------------------------------------------------------------------------------------------------


def transposed(z: Tensor) -> Tensor:
    return z.reshape(2, 3, V).transpose(0, 1)


VIEWS = {
    "transposed": transposed,
    "sliced": lambda z: z.reshape(2, 3, V)[:, :-1, :],
    "every other row": lambda z: z[::2],
    "padded vocabulary": lambda z: F.pad(z, (0, 11))[:, :V],
    "expanded rows": lambda z: z[:1].expand(4, V),
    "expanded inner": lambda z: z[:2, None].expand(2, 3, V),
    "expanded outer": lambda z: z[None, :3].expand(2, 3, V),
    "odd offset": lambda z: F.pad(z.reshape(-1), (1, 0))[1:].reshape(N, V),
    "vocabulary first": lambda z: z.t().contiguous().t(),
    "every other column": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "four dimensions": lambda z: z[:4].reshape(2, 2, 1, V),
    "four scattered": lambda z: z.repeat(4, 1).reshape(2, 2, 6, V)[:, ::2].transpose(0, 2)[:2],
}


@pytest.mark.sampled
@pytest.mark.parametrize(("mode", "dtype"), [("none", torch.float32), ("in forward", torch.bfloat16)])
@pytest.mark.parametrize("name", VIEWS)
def test_strides(name, mode, dtype, backend, device):
    """A view gives what a contiguous copy of it gives the PyTorch backend, and stays as it is."""
    view = VIEWS[name](rows(device)[0].to(dtype))
    labels = torch.arange(math.prod(view.shape[:-1]), device=device).reshape(view.shape[:-1]) * 5 % V
    options = {"reduction": "none"} if mode == "none" else {"grad_in_forward": True}
    before = view.clone()

    def run(source: Tensor, own: str) -> tuple[Tensor, Tensor]:
        x = source.detach().requires_grad_()
        loss = deft_loss(x, labels, backend=own, **options)
        (gradient,) = torch.autograd.grad(loss, x, spread(loss.shape, loss) if loss.dim() else None)
        return loss.detach(), gradient

    loss, gradient = run(view, backend)
    expected_loss, expected = run(view.contiguous(), "torch")
    torch.testing.assert_close(loss, expected_loss, **LOSS)
    torch.testing.assert_close(gradient, expected, rtol=0.008 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert torch.equal(view, before)


@pytest.mark.parametrize("in_forward", [False, True])
def test_labels_and_weights_of_any_stride(in_forward, backend, device):
    """One-dimensional and strided is what `.reshape(-1)` leaves alone; a kernel that counts in ones reads
    its neighbours."""
    logits, labels = rows(device)
    token_weight, weight = torch.rand(N, device=device), torch.rand(V, device=device)
    options = {"grad_in_forward": in_forward, "label_smoothing": 0.1, "backend": backend}
    expected = with_gradient(
        lambda x: deft_loss(x, labels, token_weight=token_weight, weight=weight, **options), logits
    )
    labels = torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0]
    token_weight = torch.stack([token_weight, torch.zeros_like(token_weight)], 1)[:, 0]
    weight = torch.stack([weight, torch.zeros_like(weight)], 1)[:, 0]
    assert {labels.stride(), token_weight.stride(), weight.stride()} == {(2,)}
    ours = with_gradient(
        lambda x: deft_loss(x, labels, token_weight=token_weight, weight=weight, **options), logits
    )
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    stats = row_statistics(logits, labels, backend=backend)
    assert torch.equal(stats.logp, row_statistics(logits, labels.contiguous(), backend=backend).logp)


@pytest.mark.parametrize("name", ["transposed", "sliced", "padded vocabulary", "odd offset"])
@pytest.mark.parametrize("in_forward", [False, True])
def test_inplace_into_a_view(in_forward, name, backend, device):
    """The gradient stands where the logits stood, and nothing around them changes."""
    storage = VIEWS[name](rows(device)[0])
    base = storage._base if storage._base is not None else storage
    outside = base.clone()
    view = storage.detach().requires_grad_()
    outside_view = torch.as_strided(outside, view.shape, view.stride(), view.storage_offset())
    labels = torch.arange(math.prod(view.shape[:-1]), device=device).reshape(view.shape[:-1]) * 5 % V
    _, expected = with_gradient(
        lambda x: deft_loss(x, labels, backend=backend), view.detach().contiguous(), torch.tensor(1.0)
    )
    deft_loss(view, labels, inplace=True, grad_in_forward=in_forward, backend=backend).backward()
    torch.testing.assert_close(view.detach(), expected)
    torch.testing.assert_close(view.grad, expected)
    outside_view.copy_(view.detach())
    assert torch.equal(base, outside)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_are_unchanged(reduction, backend, device):
    logits, labels = rows(device)
    token_weight, weight = torch.rand(N, device=device), torch.rand(V, device=device)
    tensors = (logits, labels, token_weight, weight)
    copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    options = {"shift": False, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3, "backend": backend}
    loss = deft_loss(
        logits.requires_grad_(),
        labels,
        token_weight=token_weight,
        weight=weight,
        reduction=reduction,
        **options,
    )
    loss.sum().backward()
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))
    assert [t._version for t in tensors] == versions


# Statistics ------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "nll": objectives.nll(),
    "neg_prob": objectives.neg_prob(),
    "tsallis": objectives.tsallis(0.3),
    "deft": objectives.deft(),
    "deft 1": objectives.deft(1),
    "deft inf": objectives.deft(math.inf),
    "cayley": objectives.cayley(),
    "rational": objectives.rational(),
    "rational 2": objectives.rational(2.0),
    "dft": objectives.dft(),
    "eaft": objectives.eaft(1.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_return_stats(name, backend, device):
    shape = (2, 3)
    logits, labels = rows(device)
    labels[4] = -100
    labels[0] = logits[0].argmax()
    logits, labels = logits.reshape(*shape, V), labels.reshape(shape)
    objective = OBJECTIVES[name]
    options = {"objective": objective, "softcap": 8.0, "temperature": 1.3}
    x = logits.clone().requires_grad_()
    loss, stats = deft_loss(x, labels, return_stats=True, backend=backend, **options)
    expected_loss, expected = reference.loss(logits.double(), labels, **options)
    torch.testing.assert_close(loss.detach().double(), expected_loss, **LOSS)
    assert isinstance(stats, RowStatistics)
    for field, value in stats._asdict().items():
        assert value.shape == shape, field
        exact = {"correct": torch.bool, "predicted": torch.int64}
        assert value.dtype == exact.get(field, torch.float32), field
        assert not value.requires_grad, field
        if field in exact:
            assert torch.equal(value, expected[field]), field
        else:
            torch.testing.assert_close(value.double(), expected[field], **LOSS, msg=field)


def test_statistics_by_hand(backend, device):
    """Two rows whose numbers can be worked out: uniform over 8, and three tokens at 1/2, 1/4, 1/4."""
    logits = torch.tensor([[0.5] * 8, [math.log(2), 0, 0, *[-math.inf] * 5]], device=device)
    labels = torch.tensor([3, 1], device=device)
    _, stats = deft_loss(logits, labels, return_stats=True, backend=backend)
    expected = {
        "logp": [-math.log(8), -math.log(4)],
        "lse": [0.5 + math.log(8), math.log(4)],
        "collision": [1 / 8, 3 / 8],
        "entropy": [math.log(8), 1.5 * math.log(2)],
        "max_prob": [1 / 8, 1 / 2],
        "correct": [True, False],
        "alpha": [1 / 8, 3 / 8],
        "gate": [8 ** (-1 / 8), 4 ** (-3 / 8)],
    }
    for name, values in expected.items():
        wanted = torch.tensor(values, device=device)
        torch.testing.assert_close(getattr(stats, name), wanted, msg=name)


@pytest.mark.parametrize("name", ["logp", "lse", "collision", "entropy", "max_prob", "all"])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 4.0, "temperature": 0.8}])
def test_row_statistics_are_differentiable(keywords, name, backend, device):
    logits, labels = rows(device)
    labels[1] = -100
    names = ("logp", "lse", "collision", "entropy", "max_prob")
    chosen = names if name == "all" else (name,)

    def total(x: Tensor, own: str) -> Tensor:
        stats = row_statistics(x, labels, backend=own, **keywords)
        values = [getattr(stats, field) for field in chosen]
        return sum((value * spread(value.shape, value) * (k + 1) for k, value in enumerate(values)))

    ours = with_gradient(lambda x: total(x, backend), logits)
    agree(ours, with_gradient(lambda x: total(x, "reference"), logits.double()))
    assert not ours[1][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_prob_shares_its_gradient_among_ties(dtype, backend, device):
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0]], device=device).to(dtype)
    labels = torch.tensor([2], device=device)
    ours = with_gradient(lambda x: row_statistics(x, labels, backend=backend).max_prob.sum(), logits)
    theirs = with_gradient(lambda x: torch.softmax(x, -1).amax(-1).sum(), logits.double())
    torch.testing.assert_close(
        ours[1].double(), theirs[1], rtol=1e-5 if dtype == torch.float32 else 0.008, atol=1e-6
    )


def focal(r: RowStatistics) -> Tensor:
    return -((1 - r.logp.exp()) ** 2) * r.logp


def sharpened(r: RowStatistics) -> Tensor:
    return -r.logp * r.collision + 0.1 * r.entropy.sqrt() - 0.2 * r.max_prob * r.lse


@pytest.mark.parametrize("function", [focal, sharpened])
@pytest.mark.parametrize("keywords", [
    {}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 9}, {"z_loss": 0.01}, {"weighted": True},
    {"token": True, "softcap": 5.0, "temperature": 1.5}])  # fmt: skip
def test_function_objective(keywords, function, backend, device):
    keywords = dict(keywords)
    logits, labels = rows(device)
    labels[2] = -100
    valid = labels != -100
    weight = (
        torch.linspace(0.2, 2.0, V, device=device, dtype=torch.float64)
        if keywords.pop("weighted", 0)
        else None
    )
    token = (
        torch.linspace(-0.5, 2.0, N, device=device, dtype=torch.float64) if keywords.pop("token", 0) else None
    )

    def plain(x: Tensor) -> Tensor:
        z = reference.transformed(x, keywords.get("softcap"), keywords.get("temperature", 1.0))[valid]
        stats = reference.statistics(z, labels[valid])
        own = RowStatistics(**stats)
        per_row = function(own)
        scale = torch.ones_like(per_row) if weight is None else weight[labels[valid]]
        per_row = per_row * scale + keywords.get("z_loss", 0.0) * own.lse**2
        if token is not None:
            per_row = per_row * token[valid]
        reduction = keywords.get("reduction", "mean")
        if reduction == "none":
            return torch.zeros(N, dtype=x.dtype, device=device).index_put((valid.nonzero()[:, 0],), per_row)
        return per_row.sum() / (1 if reduction == "sum" else keywords.get("num_items", scale.sum()))

    options = {**keywords, "weight": weight, "token_weight": token, "objective": function}
    agree(
        with_gradient(lambda x: deft_loss(x, labels, backend=backend, **options), logits),
        with_gradient(plain, logits.double()),
    )


def test_function_objective_and_statistics(backend, device):
    logits, labels = rows(device)
    loss, stats = deft_loss(
        logits.requires_grad_(), labels, objective=focal, return_stats=True, reduction="none", backend=backend
    )
    assert torch.equal(loss, focal(stats))
    assert stats.alpha is None and stats.gate is None
    assert not stats.logp.requires_grad and loss.requires_grad


# gated_loss and the module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gated_loss_equals_the_rows_of_deft_loss(name, device):
    logits, labels = rows(device)
    labels[1] = -100
    objective = OBJECTIVES[name]
    losses, stats = deft_loss(
        logits, labels, objective=objective, reduction="none", return_stats=True, backend="torch"
    )
    logp = stats.logp.clone().requires_grad_()
    gated = gated_loss(
        logp,
        stats.collision.clamp(min=1e-30).log(),
        entropy=stats.entropy,
        max_prob=stats.max_prob,
        objective=objective,
        valid=labels != -100,
    )
    torch.testing.assert_close(gated.detach(), losses)
    upstream = spread(logp.shape, logp)
    gated.backward(upstream)
    gate = {"dft": stats.gate, "eaft": stats.gate}.get(name, stats.gate)
    torch.testing.assert_close(logp.grad, -gate * upstream * (labels != -100))


@pytest.mark.parametrize(
    "objective",
    [objectives.deft(detach=False), objectives.deft(1, detach=False), objectives.deft(math.inf, detach=False),
     objectives.rational(detach=False), objectives.eaft(detach=False), objectives.dft(detach=False),
     objectives.cayley(detach=False), objectives.deft(detach=False, eps=1e-2)],
)  # fmt: skip
def test_gated_loss_through_the_gate(objective, device):
    torch.manual_seed(1)
    logits = torch.randn(5, 9, device=device, dtype=torch.float64)
    stats = row_statistics(logits, torch.arange(5, device=device), backend="reference")
    values = [stats.logp, stats.collision.log(), stats.entropy, stats.max_prob]
    values = [value.detach().clone().requires_grad_() for value in values]

    def call(logp, log_collision, entropy, max_prob):
        return gated_loss(logp, log_collision, entropy=entropy, max_prob=max_prob, objective=objective)

    # cayley's batch mean is held, so its gradient is that of the loss only with a given mean
    if objective.focus == "cayley":
        objective = objectives.cayley(detach=False, mean_prob=0.3)
    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gated_loss_dtype(dtype):
    logp = torch.tensor([-0.5, -2.0], dtype=dtype)
    loss = gated_loss(logp, torch.tensor([-1.0, -0.3], dtype=dtype))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_module_is_the_function(backend, device):
    logits, labels = rows(device)
    weight = torch.linspace(0.5, 2.0, V, device=device)
    token_weight = torch.rand(N, device=device)
    options = {"objective": "cayley", "label_smoothing": 0.1, "ignore_index": 5, "softcap": 6.0}
    module = DEFTLoss(weight, backend=backend, **options)
    assert "weight" in dict(module.named_buffers())
    for call in ({}, {"token_weight": token_weight}, {"num_items": 3}):
        expected = deft_loss(logits, labels, weight=weight, backend=backend, **options, **call)
        assert torch.equal(module(logits, labels, **call), expected)
    loss, stats = DEFTLoss(reduction="none", return_stats=True, backend=backend)(logits, labels)
    assert loss.shape == stats.gate.shape == labels.shape
    assert "cayley" in repr(module) and "mean" in repr(module)
    assert module.state_dict()["weight"].equal(weight)


def test_module_replaces_cross_entropy(backend, device):
    logits, labels = rows(device)
    weight = torch.linspace(0.5, 2.0, V, device=device)
    ours = DEFTLoss(weight, objective="nll", label_smoothing=0.1, backend=backend)
    theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels), **LOSS)


# Bands and the Cayley floor --------------------------------------------------------------------------------


def graded(device: str) -> tuple[Tensor, Tensor]:
    """Rows whose target has p = 0.02, 0.1, 0.3, 0.6, 0.95 and an ignored one, over V = 37."""
    p = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.95, 0.5], dtype=torch.float64)
    logits = torch.log((1 - p) / (V - 1))[:, None].repeat(1, V)
    labels = torch.arange(6) * 3
    logits[torch.arange(6), labels] = p.log()
    labels[5] = -100
    return (logits + 2.0).float().to(device), labels.to(device)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("keep", "inside", "reduction"),
    [("p>=0.2", [2, 3, 4], "mean"), ("p<=0.2", [0, 1], "sum"), ("0.05<=p<=0.7", [1, 2, 3], "none")],
)
@pytest.mark.parametrize("name", ["nll", "deft", "cayley", "eaft"])
def test_bands(name, keep, inside, reduction, backend, device):
    """Rows outside are zero, have no gradient and leave the mean's denominator; the Cayley floor is the mean
    over every valid row, dropped or not, as in the authors' trainer."""
    logits, labels = graded(device)
    objective = objectives.TABLE[name]().within(keep)
    whole, stats = deft_loss(
        logits.double(), labels, objective=name, reduction="none", return_stats=True, backend="reference"
    )
    ours = with_gradient(
        lambda x: deft_loss(x, labels, objective=objective, reduction=reduction, backend=backend),
        logits,
        upstream=torch.ones(6) if reduction == "none" else torch.tensor(1.0),
    )
    mask = torch.zeros(6, dtype=torch.bool, device=device)
    mask[inside] = True
    scale = 1 / len(inside) if reduction == "mean" else 1.0
    kept = torch.where(mask, whole, 0.0) * scale
    onehot = F.one_hot(labels.clamp(min=0), V)
    gradient = (stats["gate"] if isinstance(stats, dict) else stats.gate)[:, None] * (
        torch.softmax(logits.double(), -1) - onehot
    )
    expected = torch.where(mask[:, None], gradient, 0.0) * scale
    agree(ours, (kept if reduction == "none" else kept.sum(), expected))
    _, own = deft_loss(logits, labels, objective=objective, return_stats=True, backend=backend)
    assert torch.equal(own.gate != 0, mask)
    assert (own.logp[:5] != 0).all()


def test_band_with_class_weights(backend, device):
    """The denominator is the sum of the kept rows' weights."""
    logits, labels = graded(device)
    weight = torch.linspace(0.5, 2.0, V, device=device, dtype=torch.float64)
    loss = deft_loss(
        logits, labels, objective=objectives.nll().within("p>=0.2"), weight=weight.float(), backend=backend
    )
    expected = F.cross_entropy(logits[2:5].double(), labels[2:5], weight=weight)
    torch.testing.assert_close(loss.double(), expected, **LOSS)


def test_given_cayley_mean_equals_the_batch(backend, device):
    logits, labels = graded(device)
    mean = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.95], dtype=torch.float64).mean().item()
    batch = with_gradient(lambda x: deft_loss(x, labels, objective="cayley", backend=backend), logits)
    for in_forward in (False, True):
        given = with_gradient(
            lambda x, f=in_forward: deft_loss(
                x, labels, objective=objectives.cayley(mean_prob=mean), grad_in_forward=f, backend=backend
            ),
            logits,
        )
        agree(given, batch)


# The authors' trainer, written as they write it ------------------------------------------------------------


def authors_deft(logp: Tensor, p_all: Tensor) -> tuple[Tensor, Tensor]:
    alpha = p_all.pow(2).sum(-1).detach()
    return -(torch.exp(alpha * logp) - 1) / (alpha + 1e-6), torch.ones_like(logp)


def authors_cayley(logp: Tensor, p_all: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.exp(logp).detach()
    floor = 0.5 * p.mean()
    distance = 1 - p + 1e-8
    local = (1 - distance) / (1 + distance + 1e-8)
    alpha = (floor + (1 - floor) * local).clamp(0.001, 1).detach()
    return -(torch.exp(alpha * logp) - 1) / (alpha + 1e-8), torch.ones_like(logp)


def authors_p(logp: Tensor, p_all: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - torch.exp(logp), torch.ones_like(logp)


def authors_family(q: float):
    return lambda logp, p_all: (-(torch.exp(q * logp) - 1) / q, torch.ones_like(logp))


def authors_only_top(t: float):
    return lambda logp, p_all: (1 - torch.exp(logp), (torch.exp(logp) >= t).to(logp))


def authors_only_bottom(t: float):
    return lambda logp, p_all: (-logp, (torch.exp(logp) <= t).to(logp))


AUTHORS = {
    "DEFT": (authors_deft, objectives.deft(eps=1e-6)),
    "Cayley": (authors_cayley, objectives.cayley(eps=1e-8)),
    "p": (authors_p, objectives.neg_prob()),
    "GeneralFamily-0.5": (authors_family(0.5), objectives.tsallis(0.5)),
    "GeneralFamily-2": (authors_family(2.0), objectives.tsallis(2.0)),
    "OnlyTopP-0.2": (authors_only_top(0.2), objectives.neg_prob().within("p>=0.2")),
    "OnlyBottomLogP-0.2": (authors_only_bottom(0.2), objectives.nll().within("p<=0.2")),
}


@pytest.mark.parametrize("kind", ["graded", "conflict", "wide"])
@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_trainer(name, kind, backend, device):
    """Loss and gradient of the published objectives, in float64 as they are written, eps included.

    wide: a uniform row at V = 9,973, where their eps of 1e-6 takes 1 % of the loss.
    """
    if kind == "graded":
        logits, labels = graded(device)
    elif kind == "wide":
        logits, labels = torch.full((2, 9973), 0.25, device=device), torch.tensor([0, 9972], device=device)
    else:
        logits, labels = (t.to(device) for t in make(kind, N, V, torch.float32, seed=5))
    theirs, objective = AUTHORS[name]

    def plain(x: Tensor) -> Tensor:
        valid = labels != -100
        logp_all = torch.log_softmax(x[valid], -1)
        logp = logp_all.gather(1, labels[valid][:, None])[:, 0]
        values, mask = theirs(logp, logp_all.exp())
        return (values * mask).sum() / mask.sum().clamp(min=1)

    expected = with_gradient(plain, logits.double())
    ours = with_gradient(lambda x: deft_loss(x, labels, objective=objective, backend=backend), logits)
    agree(ours, expected)
    if kind == "wide" and name == "DEFT":
        exact = deft_loss(logits, labels, backend=backend).double()
        torch.testing.assert_close(exact * (1 / 9973) / (1 / 9973 + 1e-6), expected[0], rtol=1e-5, atol=0)
        assert abs(exact / expected[0] - 1) > 5e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_held_gate_rule(name, backend, device):
    """Every objective with a held gate has the gradient gate (p - onehot)."""
    logits, labels = rows(device)
    labels[3] = -100
    upstream = torch.linspace(-1.0, 2.0, N, device=device)
    x = logits.clone().requires_grad_()
    loss, stats = deft_loss(
        x, labels, objective=OBJECTIVES[name], reduction="none", return_stats=True, backend=backend
    )
    loss.backward(upstream)
    error = torch.softmax(logits.double(), -1) - F.one_hot(labels.clamp(min=0), V)
    torch.testing.assert_close(x.grad.double(), (stats.gate * upstream).double()[:, None] * error, **GRADIENT)
    assert (stats.gate != 0).tolist() == (labels != -100).tolist()
