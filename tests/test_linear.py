"""The loss from hidden states: everything equals the loss of the logits that F.linear makes, in float64.

Sizes: V = 37 and D = 5 are odd; N = 7 rows in chunks of 2 (BUDGET) leave a last chunk of one row with no row
ignored, and with rows ignored chunks that skip some. The interpreter costs tens of milliseconds a row.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deft_kernels import FusedLinearDEFTLoss, RowStatistics, deft_loss, fused_linear_deft_loss, objectives
from deft_kernels.operators import chunks

N, D, V = 7, 5, 37
BUDGET = 2 * V * 4
LOSS = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-6}
IGNORED = {"none": (), "some": (1, 4, 6), "all": tuple(range(N))}


def focal(r: RowStatistics) -> Tensor:
    return -((1 - r.logp.exp()) ** 2) * r.logp + 0.1 * r.entropy + 0.01 * r.max_prob


OBJECTIVES = {
    "nll": "nll",
    "neg_prob": "neg_prob",
    "tsallis": objectives.tsallis(0.4),
    "deft": "deft",
    "deft, exact": objectives.deft(detach=False),
    "deft, order 1": objectives.deft(1),
    "deft, order inf, exact": objectives.deft(math.inf, detach=False),
    "cayley": "cayley",
    "cayley, mean given": objectives.cayley(mean_prob=0.3),
    "rational": "rational",
    "dft": "dft",
    "eaft": "eaft",
    "band": objectives.deft().within("p>=0.02"),
    "function": focal,
}


class Problem:
    """hidden, weight, bias and labels; `run` gives a call's loss, statistics and gradients."""

    def __init__(self, device: str, ignored: tuple[int, ...] = (), n: int = N, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.hidden, self.weight, self.bias = normal(n, D), normal(V, D), normal(V)
        self.labels = torch.randint(0, V, (n,), generator=generator).to(device)
        self.labels[list(ignored)] = -100

    def run(self, call, upstream=None, wanted=(True, True, True), double=False):
        tensors = (self.hidden, self.weight, self.bias)
        inputs = [
            (x.double() if double else x).clone().requires_grad_(w)
            for x, w in zip(tensors, wanted, strict=True)
        ]
        out = call(*inputs[:2], self.labels, inputs[2])
        loss, stats = out if isinstance(out, tuple) else (out, None)
        if upstream is None:
            upstream = random_upstream(loss)
        if any(wanted):
            loss.backward(upstream.to(loss))
        for x, before in zip(inputs, tensors, strict=True):
            assert torch.equal(x.detach().to(before), before), "an input was overwritten"
        return loss.detach(), [x.grad for x in inputs], stats


def random_upstream(loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(loss.shape, generator=generator, dtype=torch.float64)


def fused(**keywords):
    keywords = {"chunk_bytes": BUDGET, **keywords}
    return lambda hidden, weight, labels, bias: fused_linear_deft_loss(
        hidden, weight, labels, bias, **keywords
    )


def unfused(class_weight=None, logit_scale=1.0, **keywords):
    """The oracle on F.linear's logits."""

    def call(hidden, weight, labels, bias):
        logits = F.linear(hidden, weight, bias) * logit_scale
        own = None if class_weight is None else class_weight.to(logits)
        return deft_loss(logits, labels, weight=own, backend="reference", **keywords)

    return call


def agree(ours, theirs) -> None:
    torch.testing.assert_close(ours[0].double(), theirs[0], **LOSS)
    for mine, expected in zip(ours[1], theirs[1], strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine.double(), expected, **GRADIENT)
    if ours[2] is not None:
        for name in RowStatistics._fields:
            mine, expected = getattr(ours[2], name), getattr(theirs[2], name)
            assert (mine is None) == (expected is None), name
            if mine is not None:
                torch.testing.assert_close(mine.to(expected), expected, **LOSS)


# Against the unfused loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_the_unfused_loss(name, reduction, ignored, device):
    problem = Problem(device, IGNORED[ignored])
    keywords = {"objective": OBJECTIVES[name], "reduction": reduction, "return_stats": True}
    agree(problem.run(fused(backend="torch", **keywords)), problem.run(unfused(**keywords), double=True))


@pytest.mark.sampled
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["deft", "deft, exact", "cayley", "eaft", "band", "function"])
def test_is_the_unfused_loss_by_the_kernels(name, reduction, device):
    problem = Problem(device, IGNORED["some"])
    keywords = {"objective": OBJECTIVES[name], "reduction": reduction, "return_stats": True}
    agree(problem.run(fused(backend="triton", **keywords)), problem.run(unfused(**keywords), double=True))


def weights(device: str, n: int) -> Tensor:
    return torch.linspace(0.0, 2.0, n, device=device)


OPTIONS = {
    "token_weight": lambda d: {"token_weight": weights(d, N)},
    "class_weight": lambda d: {"class_weight": weights(d, V)},
    "class_weight, smoothing": lambda d: {"class_weight": weights(d, V), "label_smoothing": 0.1},
    "num_items": lambda d: {"num_items": torch.tensor(11.0, device=d)},
    "softcap": lambda d: {"softcap": 2.0},
    "logit_scale": lambda d: {"logit_scale": 0.0625},
    "all transforms": lambda d: {"softcap": 3.0, "temperature": 1.3, "logit_scale": 2.5},
    "z_loss": lambda d: {"z_loss": 0.01},
    "cayley": lambda d: {"objective": "cayley", "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 0.5},
    "function": lambda d: {"objective": focal, "class_weight": weights(d, V), "z_loss": 0.01, "softcap": 3.0},
    "everything": lambda d: {
        "token_weight": weights(d, N),
        "class_weight": weights(d, V),
        "softcap": 3.0,
        "temperature": 1.3,
        "logit_scale": 2.5,
        "z_loss": 0.01,
        "label_smoothing": 0.1,
    },
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_keyword(name, reduction, device):
    problem = Problem(device, IGNORED["some"])
    keywords = {"reduction": reduction, "return_stats": True, **OPTIONS[name](device)}
    if reduction == "none":
        keywords.pop("num_items", None)
    agree(problem.run(fused(backend="torch", **keywords)), problem.run(unfused(**keywords), double=True))


@pytest.mark.parametrize("name", ["class_weight, smoothing", "all transforms"])
def test_keywords_by_the_kernels(name, device):
    problem = Problem(device, IGNORED["some"])
    keywords = OPTIONS[name](device)
    agree(problem.run(fused(backend="triton", **keywords)), problem.run(unfused(**keywords), double=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_frozen_inputs(wanted, reduction, device):
    """A frozen head, a frozen trunk, a frozen bias, and all of them: each gets its gradient or none."""
    problem = Problem(device, IGNORED["some"])
    agree(
        problem.run(fused(backend="torch", reduction=reduction), wanted=wanted),
        problem.run(unfused(reduction=reduction), wanted=wanted, double=True),
    )


@pytest.mark.parametrize("budget", [1, 3 * V * 4, 10**9])
def test_any_size_of_chunk(budget, device):
    """Less than a row, uneven, and more than all."""
    problem = Problem(device, IGNORED["some"])
    agree(problem.run(fused(backend="torch", chunk_bytes=budget)), problem.run(unfused(), double=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_shift_and_leading_dimensions(reduction, device):
    """hidden [B, T, D] in another order of strides; position t is scored against the label of t + 1."""
    problem = Problem(device, n=12)
    stored = problem.hidden.reshape(3, 4, D).transpose(0, 1).contiguous()
    labels = problem.labels.reshape(3, 4)
    labels[1, 2] = -100
    results = []
    for double in (False, True):
        hidden = (stored.double() if double else stored).clone().requires_grad_()
        weight = (problem.weight.double() if double else problem.weight).clone().requires_grad_()
        args = {"shift": True, "reduction": reduction}
        shaped = hidden.transpose(0, 1)
        if double:
            loss = deft_loss(F.linear(shaped, weight), labels, backend="reference", **args)
        else:
            loss = fused_linear_deft_loss(shaped, weight, labels, backend="torch", chunk_bytes=BUDGET, **args)
        assert loss.shape == (labels.shape if reduction == "none" else ())
        loss.backward(random_upstream(loss).to(loss))
        results.append((loss.detach(), [hidden.grad, weight.grad], None))
    agree(*results)


def test_one_row_without_dimensions(device):
    problem = Problem(device)
    loss = fused_linear_deft_loss(
        problem.hidden[0], problem.weight, problem.labels[0], reduction="none", backend="torch"
    )
    expected = deft_loss(problem.weight @ problem.hidden[0], problem.labels[0], reduction="none")
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, **LOSS)


def test_reference_backend(device):
    problem = Problem(device, IGNORED["some"])
    keywords = {"softcap": 3.0, "logit_scale": 0.5, "class_weight": weights(device, V), "return_stats": True}
    ours = problem.run(fused(backend="reference", **keywords))
    agree(ours, problem.run(unfused(**keywords), double=True))


def test_module(device):
    problem = Problem(device, IGNORED["some"])
    module = FusedLinearDEFTLoss(weights("cpu", V), objective="nll", logit_scale=0.5, chunk_bytes=BUDGET)
    module.to(device)
    num_items = torch.tensor(3.0, device=device)
    ours = problem.run(lambda *args: module(*args, num_items=num_items))
    keywords = {"class_weight": weights(device, V), "logit_scale": 0.5, "num_items": num_items}
    agree(ours, problem.run(unfused(objective="nll", **keywords), double=True))
    assert "nll" in repr(module)
    with pytest.raises(TypeError, match="inplace"):
        FusedLinearDEFTLoss(inplace=True)


def test_under_graph_capture_every_row_is_worked_on(monkeypatch, backend, device):
    """What a CUDA graph may not wait for, the number of rows that count, is not asked for; same results."""
    monkeypatch.setattr(chunks, "_capturing", lambda device: True)
    problem = Problem(device, IGNORED["some"])
    agree(problem.run(fused(backend=backend)), problem.run(unfused(), double=True))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["deft", "band", "function"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_are_not_counted_without_skipping(reduction, name, monkeypatch, backend, device):
    """`skip_ignored=False` asks for no number of rows, in the forward or the backward; same results."""

    def asked(*_: object) -> None:
        raise AssertionError("the host asked which rows count")

    problem = Problem(device, IGNORED["some"])
    keywords = {"objective": OBJECTIVES[name], "reduction": reduction}
    expected = problem.run(unfused(**keywords), double=True)
    monkeypatch.setattr(Tensor, "nonzero", asked)
    agree(problem.run(fused(backend=backend, skip_ignored=False, **keywords)), expected)


# No row to count -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, N])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["deft", "cayley", "band", "function"])
def test_no_row_to_count(name, reduction, n, backend, device):
    problem = Problem(device, tuple(range(n)), n=n)
    keywords = {"objective": OBJECTIVES[name], "reduction": reduction, "backend": backend}
    loss, gradients, _ = problem.run(fused(**keywords), upstream=torch.ones(n if reduction == "none" else ()))
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient, x in zip(gradients, (problem.hidden, problem.weight, problem.bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


# Upstreams and passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 0.0, -1.7, 65536.0])
def test_upstream_scales_once(value, backend, device):
    problem = Problem(device, IGNORED["some"])
    upstream = torch.tensor(value)
    agree(
        problem.run(fused(backend=backend), upstream=upstream),
        problem.run(unfused(), upstream=upstream, double=True),
    )


def test_a_second_backward_is_the_first(device):
    problem = Problem(device, IGNORED["some"])
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    loss = fused_linear_deft_loss(*inputs[:2], problem.labels, inputs[2], backend="torch", chunk_bytes=BUDGET)
    first = torch.autograd.grad(loss * 3.0, inputs, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss * 3.0, inputs)
    for one, before, two in zip(first, kept, second, strict=True):
        assert torch.equal(one, before), "the second backward wrote into the first one's gradient"
        torch.testing.assert_close(two, one)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction, device):
    problem = Problem(device)
    hidden = problem.hidden.clone().requires_grad_()
    loss = fused_linear_deft_loss(
        hidden, problem.weight, problem.labels, reduction=reduction, backend="torch"
    ).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        gradient.sum().backward()


def test_differentiable_token_weight_and_num_items(device):
    problem = Problem(device, IGNORED["some"])
    results = []
    for call, double in ((fused(backend="torch"), False), (unfused(), True)):
        dtype = torch.float64 if double else torch.float32
        tensors = (problem.hidden, problem.weight, problem.bias)
        inputs = [x.to(dtype).requires_grad_() for x in (x.clone() for x in tensors)]
        token_weight = weights(device, N).to(dtype).requires_grad_()
        num_items = torch.tensor(5.0, dtype=dtype, device=device, requires_grad=True)
        keywords = {"token_weight": token_weight, "num_items": num_items}
        make = fused if not double else unfused
        call = make(**({"backend": "torch"} if not double else {}), **keywords)
        loss = call(*inputs[:2], problem.labels, inputs[2])
        loss.backward()
        results.append((loss.detach(), [x.grad for x in (*inputs, token_weight, num_items)], None))
    agree(*results)


def products(call) -> int:
    """Matrix products that a call runs, by PyTorch's own record of its operators."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:
        call()
    counted = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
    return sum(event.count for event in profile.key_averages() if event.key in counted)


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, 3),
        ({"reduction": "sum"}, 3),
        ({"reduction": "none"}, 4),
        ({"objective": objectives.deft().within("p<=0.999")}, 4),
        ({"objective": focal}, 4),
        ({"objective": "cayley"}, 4),
        ({"objective": objectives.cayley(mean_prob=0.2)}, 3),
        ({"objective": "cayley", "reduction": "none"}, 5),
    ],
)
def test_number_of_products(keywords, expected):
    """As documented, for two chunks; one without gradients; two with a frozen head or trunk."""
    problem = Problem("cpu", IGNORED["some"])
    call = fused(backend="torch", **keywords)
    assert products(lambda: problem.run(call)) == 2 * expected
    own = 1 if keywords.get("objective") != "cayley" else 2
    assert products(lambda: problem.run(call, wanted=(False, False, False))) == 2 * own
    for wanted in ((True, False, False), (False, True, False)):
        assert products(lambda wanted=wanted: problem.run(call, wanted=wanted)) == 2 * (expected - 1)


# Precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_errs_no_more_than_unfused(reduction, dtype, backend, device):
    """Against float64 of the same rounded inputs; the dtype's rounding of logits and dlogits is in both."""
    problem = Problem(device, IGNORED["some"], dtype=dtype)
    keywords = {"reduction": reduction, "backend": backend}
    upstream = torch.ones(N if reduction == "none" else ())
    oracle = problem.run(unfused(reduction=reduction), upstream, double=True)

    def by_linear(hidden, weight, labels, bias):
        return deft_loss(F.linear(hidden, weight, bias), labels, **keywords)

    ours, theirs = problem.run(fused(**keywords), upstream), problem.run(by_linear, upstream)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    for mine, other, exact in zip(ours[1], theirs[1], oracle[1], strict=True):
        assert mine.dtype == dtype
        ulp = torch.finfo(dtype).eps * exact.abs().max().item()
        error = (other.double() - exact).abs().max().item()
        assert (mine.double() - exact).abs().max().item() <= error + ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_is_summed_in_fp32(dtype, device):
    """1024 chunks of equal sign: a sum in bf16 stands still once it is 256 times a chunk's part."""
    n = 1024
    hidden = torch.ones(n, 2, dtype=dtype, device=device)
    weight = torch.zeros(3, 2, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(3, dtype=dtype, device=device, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    keywords = {"objective": "nll", "reduction": "sum", "chunk_bytes": 3 * 2, "backend": "torch"}
    fused_linear_deft_loss(hidden, weight, labels, bias, **keywords).backward()
    exact = torch.tensor([-2 / 3, 1 / 3, 1 / 3], dtype=torch.float64) * n
    # One ulp for the rounding of dlogits, which is the same in every row, and one for the last cast.
    allowed = 2 * torch.finfo(dtype).eps
    by_weight, by_bias = weight.grad.double().cpu(), bias.grad.double().cpu()
    torch.testing.assert_close(by_weight, exact[:, None].expand(3, 2), rtol=allowed, atol=0)
    torch.testing.assert_close(by_bias, exact, rtol=allowed, atol=0)


def test_small_gradients_survive_float16(backend, device):
    """p / num_items is 1e-9, below float16; the loss scale brings it back, if the gradient waits for it."""
    n, size, items, scale = 6, 1024, 2.0**20, 2.0**20
    hidden = torch.zeros(n, 2, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.eye(2, dtype=torch.float16, device=device).repeat(size // 2, 1)
    labels = torch.arange(n, device=device)
    keywords = {"objective": "nll", "num_items": items, "backend": backend}
    (fused_linear_deft_loss(hidden, weight, labels, **keywords) * scale).backward()
    # Half of the probability lies on either row of the identity.
    exact = 0.5 - F.one_hot(labels % 2, 2).double()
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["nll", "deft, exact", "deft, order inf, exact", "function"])
def test_gradcheck(name, reduction):
    problem = Problem("cpu", (2,), n=4, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    call = fused(
        objective=OBJECTIVES[name], reduction=reduction, softcap=4.0, logit_scale=0.7, chunk_bytes=600
    )

    def loss(hidden, weight, bias):
        return call(hidden, weight, problem.labels, bias)

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_embedding(reduction, device):
    """The head's weight is the embedding's: both gradients arrive."""
    problem, ids = Problem(device), torch.arange(N, device=device)
    results = []
    for double in (False, True):
        weight = (problem.weight.double() if double else problem.weight).clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, weight))
        call = unfused(reduction=reduction) if double else fused(reduction=reduction, backend="torch")
        loss = call(hidden, weight, problem.labels, None)
        loss.backward(random_upstream(loss).to(loss))
        results.append((loss.detach(), [weight.grad], None))
    agree(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, device):
    """The products are made in autocast's dtype, the gradients arrive in the parameters' own."""
    problem = Problem(device, IGNORED["some"])
    upstream = torch.ones(N if reduction == "none" else ())

    def ours(*args):
        with torch.autocast(device, dtype=torch.bfloat16):
            return fused(reduction=reduction, backend="torch")(*args)

    def theirs(hidden, weight, labels, bias):
        with torch.autocast(device, dtype=torch.bfloat16):
            return deft_loss(F.linear(hidden, weight, bias), labels, reduction=reduction, backend="torch")

    mine, other = problem.run(ours, upstream), problem.run(theirs, upstream)
    torch.testing.assert_close(mine[0], other[0], rtol=1e-6, atol=1e-6)
    for one, two in zip(mine[1], other[1], strict=True):
        assert one.dtype == torch.float32
        scale = two.abs().max().item()
        torch.testing.assert_close(one, two, rtol=2**-7, atol=2**-8 * scale)


def test_autocast_leaves_float64_alone(device):
    problem = Problem(device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = fused()(problem.hidden, problem.weight, problem.labels, problem.bias)
    assert loss.dtype == torch.float64


# Bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden: expected a Tensor"),
        ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, TypeError, "hidden: expected float32"),
        ({"weight": torch.zeros(V, D, dtype=torch.bfloat16)}, TypeError, "weight: is torch.bfloat16"),
        ({"bias": torch.zeros(V, dtype=torch.float64)}, TypeError, "bias: is torch.float64"),
        ({"hidden": torch.zeros(())}, ValueError, "hidden: expected shape"),
        ({"hidden": torch.zeros(N, 0), "weight": torch.zeros(V, 0)}, ValueError, "hidden: expected shape"),
        ({"weight": torch.zeros(0, D)}, ValueError, "weight: the vocabulary .* is empty"),
        ({"weight": torch.zeros(D, V)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(V)}, ValueError, "weight: expected shape"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias: expected shape"),
        ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, "labels: expected shape"),
        ({"labels": torch.zeros(N)}, TypeError, "labels: expected an integer"),
        ({"labels": torch.full((N,), V)}, IndexError, "labels: 37"),
        ({"class_weight": torch.ones(D)}, ValueError, "class_weight: expected one weight a class"),
        ({"token_weight": torch.ones(V)}, ValueError, "token_weight: expected the labels' shape"),
        ({"num_items": 3.0, "reduction": "sum"}, ValueError, "num_items"),
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"objective": "deaft"}, ValueError, "objective: unknown name"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"logit_scale": torch.ones(())}, TypeError, "logit_scale"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes"),
        ({"skip_ignored": None}, TypeError, "skip_ignored"),
        ({"shift": 1.0}, TypeError, "shift"),
        ({"return_stats": None}, TypeError, "return_stats"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"objective": focal, "label_smoothing": 0.1}, ValueError, "label_smoothing"),
        ({"objective": lambda r: r.logp.sum()}, ValueError, "objective: must return one loss a row"),
    ],
)
def test_bad_input_is_named(change, error, named):
    problem = Problem("cpu")
    tensors = {
        "hidden": problem.hidden,
        "weight": problem.weight,
        "labels": problem.labels,
        "bias": problem.bias,
    }
    with pytest.raises(error, match=named):
        fused_linear_deft_loss(**(tensors | change))


def test_forward_mode_is_refused():
    problem = Problem("cpu")
    with torch.autograd.forward_ad.dual_level():
        hidden = torch.autograd.forward_ad.make_dual(problem.hidden, torch.ones_like(problem.hidden))
        with pytest.raises(RuntimeError, match="hidden: forward-mode"):
            fused_linear_deft_loss(hidden, problem.weight, problem.labels)
