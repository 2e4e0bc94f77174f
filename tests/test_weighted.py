"""objectives.weighted: w (-logp), w a function of the row's statistics that is held constant.

Everything against the float64 oracle, which takes the weights from statistics of its own.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from formulas import LINEAR, SETTINGS, N, V, head, keywords_of, problem, step
from sampling import first_of
from torch import Tensor

from deft_kernels import VocabShard, deft_loss, fused_linear_deft_loss, objectives
from deft_kernels.core.spec import Spec
from deft_kernels.objectives import Weighted, nll
from deft_kernels.operators import logits as logits_operators
from deft_kernels.operators import terms as terms_operators


def mixed(own: Tensor) -> Weighted:
    return objectives.weighted(
        lambda r, own: own.to(r.logp) * (1 + r.entropy) * r.max_prob.sqrt() + r.collision * r.logp.exp(),
        own=own,
    )


@pytest.mark.sampled
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_oracle(name, dtype, backend, device):
    logits, labels, own = problem(device, dtype)
    # Under a shift other rows are ignored, and what is padding is no longer.
    own = own.nan_to_num(0.5) if name == "shifted" else own
    objective, keywords = mixed(own), keywords_of(name, device)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    if dtype == torch.float16 and name == "both":
        pytest.skip("rounds before the loss scale is known, and says so")
    loss, gradient = step(
        lambda z: deft_loss(z * 1.0, labels, objective=objective, backend=backend, **keywords), leaf
    )
    shared = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    expected, wanted = step(
        lambda z: deft_loss(z, labels, objective=objective, backend="reference", **shared), exact
    )
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=1e-6)
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    # Half an ulp of the dtype, and one and a half where a finished gradient is scaled.
    digits = {torch.float32: 3e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    # and half of the least number that fp16 has, where a mean makes gradients that small.
    least = 2.0**-25 if dtype == torch.float16 else 0.0
    assert ((gradient.double() - wanted).abs() - 1.6 * least <= scale * (1.6 * digits + 3e-5)).all()
    assert not gradient[4].any() or name == "shifted"


def test_statistics_show_the_weight(backend, device):
    logits, labels, _ = problem(device)
    _, stats = deft_loss(logits, labels, objective=objectives.mile(2.0), backend=backend, return_stats=True)
    valid = labels != -100
    torch.testing.assert_close(stats.gate[valid], (1 + stats.entropy[valid]) ** 2)
    assert not stats.alpha.any() and not stats.gate[~valid].any()


def infosft_of(p: Tensor, threshold: float) -> Tensor:
    """The weight of arXiv:2605.14967, in the form of its authors' code."""
    return p * torch.relu(1 - torch.logit(p) / math.log(threshold / (1 - threshold)))


@pytest.mark.parametrize(
    ("objective", "weight"),
    [
        (objectives.chord(), lambda p, h: p * (1 - p)),
        (objectives.mile(1.5), lambda p, h: (1 + h) ** 1.5),
        (objectives.weighted(lambda r: r.logp.exp()), lambda p, h: p),
        (objectives.dft(0.5), lambda p, h: p.sqrt()),
        (objectives.dft(2.0), lambda p, h: p**2),
        (objectives.infosft(), lambda p, h: infosft_of(p, 0.93)),
        (objectives.infosft(0.7), lambda p, h: infosft_of(p, 0.7)),
    ],
    ids=["chord", "mile", "dft", "dft 0.5", "dft 2", "infosft", "infosft 0.7"],
)
def test_published_formulas(objective, weight):
    logits, labels, _ = problem("cpu", torch.float64)
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    own = weight(logp.exp(), -(log_p.exp() * log_p).sum(-1))
    found = deft_loss(logits, labels, objective=objective, reduction="none")
    torch.testing.assert_close(found, torch.where(labels != -100, -own * logp, 0.0), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("power", [0.3, 1.0, 2.5])
def test_dft_with_a_power_has_the_gradient_of_tsallis(power, backend, device):
    logits, labels, _ = problem(device)
    found, wanted = (
        step(
            lambda z, o=o: deft_loss(z, labels, objective=o, backend=backend), logits.clone().requires_grad_()
        )
        for o in (objectives.dft(power), objectives.tsallis(power))
    )
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infosft_at_the_ends(dtype, backend, device):
    """p = 0 and p = 1, where the logit is infinite; the threshold; a few in between."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no fp64")
    p = torch.tensor([0.0, 1e-30, 1e-3, 0.3, 0.5, 0.93, 0.9999999, 1.0], dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], -1).to(dtype).to(device)
    labels = torch.zeros(len(p), dtype=torch.int64, device=device)
    leaf = logits.requires_grad_()
    loss, stats = deft_loss(
        leaf, labels, objective=objectives.infosft(), reduction="none", backend=backend, return_stats=True
    )
    loss.sum().backward()
    assert loss.isfinite().all() and leaf.grad.isfinite().all()
    exact = infosft_of(p[1:-1], 0.93)
    torch.testing.assert_close(stats.gate[1:-1].double().cpu(), exact, rtol=1e-5, atol=1e-6)
    assert stats.gate[0] == 0 and not stats.gate[-2:].any() and stats.gate[5] < 1e-5


def test_dft_by_weights_is_dft(backend, device):
    """Another way to the same formula: the same gradient to rounding."""
    logits, labels, _ = problem(device)
    by_weight = objectives.weighted(lambda r: r.logp.exp())
    one, other = (logits.clone().requires_grad_() for _ in range(2))
    loss, gradient = step(lambda z: deft_loss(z, labels, objective=by_weight, backend=backend), one)
    same, wanted = step(lambda z: deft_loss(z, labels, objective="dft", backend=backend), other)
    torch.testing.assert_close(loss, same, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LINEAR)
def test_from_hidden_states(name, backend, device):
    _, labels, own = problem(device)
    own = own.nan_to_num(0.5) if name == "shifted" else own
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in LINEAR[name].items()}
    inputs = [t.requires_grad_() for t in head(device)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    objective = mixed(own)
    loss = fused_linear_deft_loss(
        *inputs[:2], labels, inputs[2], objective=objective, backend=backend, **keywords
    )
    shared = {("weight" if k == "class_weight" else k): v for k, v in keywords.items() if k != "chunk_bytes"}
    logits = torch.nn.functional.linear(*exact)
    expected = deft_loss(logits, labels, objective=objective, backend="reference", **shared)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape)
    (loss * upstream.to(loss)).sum().backward()
    (expected * upstream).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad.double() / scale, theirs.grad / scale, rtol=1e-4, atol=3e-6)


def test_three_products():
    """Of N D V each: one forward and two for the gradients, where a function of statistics takes four."""
    _, labels, own = problem("cpu")

    def products(objective) -> int:
        inputs = [t.requires_grad_() for t in head("cpu")[:2]]
        activities = [torch.profiler.ProfilerActivity.CPU]
        # Without `acc_events` torch 2.11 warns that it would clear events.
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as seen:
            fused_linear_deft_loss(*inputs, labels, objective=objective).backward()
        sizes = [e.input_shapes for e in seen.events() if e.name in ("aten::mm", "aten::addmm")]
        return sum(V in {n for shape in shapes for n in shape} for shapes in sizes)

    assert products(mixed(own)) == products("nll") == 3
    assert products(lambda r: -r.logp) == 4


def test_compiled_in_one_graph():
    logits, labels, own = problem("cpu")
    hidden, weight, _ = head("cpu")

    def over_logits(z, y, own):
        return deft_loss(z, y, objective=objectives.weighted(lambda r, own: own * (1 + r.entropy), own=own))

    def over_hidden(h, y, own):
        objective = objectives.weighted(lambda r, own: own * (1 + r.entropy), own=own)
        return fused_linear_deft_loss(h, weight, y, objective=objective)

    for call, given in ((over_logits, logits), (over_hidden, hidden)):
        torch.compiler.reset()
        eager, traced = (given.clone().requires_grad_() for _ in range(2))
        expected = call(eager, labels, own)
        found = torch.compile(call, fullgraph=True, backend="aot_eager")(traced, labels, own)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.parametrize("name", ["row_loss_of_terms", "linear_row_loss_of_terms"])
def test_opcheck(name):
    logits, labels, _ = problem("cpu")
    code, numbers = Spec(nll(), statistics=True).encode()
    loss, rows = logits_operators.row_loss(logits, labels, None, -100, code, numbers)
    own = torch.rand(4, N)
    if name == "row_loss_of_terms":
        args = (logits.requires_grad_(), labels, None, rows, loss, own, code, numbers)
    else:
        inputs = [t.requires_grad_() for t in head("cpu")]
        wanted = [True, True, True]
        args = (*inputs, labels, None, rows, loss, own, wanted, torch.float32, 2**20, code, numbers)
    result = torch.library.opcheck(getattr(terms_operators, name), args)
    assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    kind = torch._library.custom_ops.CustomOpDef
    found = {name for name, value in vars(terms_operators).items() if isinstance(value, kind)}
    marks = {mark.args[0]: mark.args[1] for mark in test_opcheck.pytestmark}
    assert found == set(marks["name"])


def changing(r) -> Tensor:
    r.entropy.add_(1.0)
    return r.entropy


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: objectives.weighted(3), "^function: expected a function"),
        (lambda: objectives.weighted(lambda r, x: x, x=3.0), "^x: expected a Tensor"),
        (lambda: objectives.weighted(lambda r, x: x, x=torch.rand(N + 1)), "^x: expected the labels' shape"),
        (
            lambda: objectives.weighted(lambda r, x: x, x=torch.rand(N, dtype=torch.complex64)),
            "^x: expected a real",
        ),
        (lambda: objectives.weighted(lambda r: r.logp.sum()), "^objective: .* one weight a row"),
        (lambda: objectives.weighted(lambda r: 1.0), "^objective: .* one weight a row"),
        (
            lambda: objectives.weighted(lambda r: r.logp * torch.ones(N, requires_grad=True)),
            "^objective: .* require a gradient",
        ),
        (lambda: objectives.weighted(changing), "^objective: .* in place"),
        (lambda: objectives.mile(-1.0), "^gamma: "),
        (lambda: objectives.infosft(0.5), "^threshold: "),
        (lambda: objectives.infosft(1.0), "^threshold: expected a probability below 1"),
        (lambda: objectives.dft(0.0), "^power: "),
        (lambda: objectives.dft(2.0, detach=False), "^detach: False is for power=1"),
    ],
)
def test_bad_input(make, error):
    logits, labels, _ = problem("cpu")
    for backend in ("torch", "reference"):
        with pytest.raises((TypeError, ValueError), match=error):
            deft_loss(logits, labels, objective=make(), backend=backend)
    with pytest.raises((TypeError, ValueError), match=error):
        fused_linear_deft_loss(*head("cpu")[:2], labels, objective=make())


def test_in_the_forward_needs_a_mean_or_a_sum():
    logits, labels, own = problem("cpu")
    with pytest.raises(ValueError, match="^grad_in_forward: "):
        deft_loss(logits, labels, objective=mixed(own), grad_in_forward=True, reduction="none")


def test_second_derivatives_raise():
    logits, labels, own = problem("cpu")
    for keywords in ({}, {"grad_in_forward": True}):
        leaf = logits.clone().requires_grad_()
        loss = deft_loss(leaf, labels, objective=mixed(own), **keywords)
        with pytest.raises(RuntimeError, match="second time"):
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            gradient.sum().backward()


def split_vocabulary() -> None:
    """Columns of the logits, or rows of the head, in parts: every rank gets the whole loss."""
    logits, labels, own = problem(ranks.device())
    widths = {2: (200, 111), 3: (200, 0, 111)}[dist.get_world_size()]
    start = sum(widths[: dist.get_rank()])
    columns = slice(start, start + widths[dist.get_rank()])
    place = VocabShard(dist.group.WORLD, start, V)
    for keywords in ({}, {"reduction": "none"}, {"grad_in_forward": True}, {"label_smoothing": 0.1}):
        whole, mine = logits.clone().requires_grad_(), logits[:, columns].clone().requires_grad_()
        expected, wanted = step(lambda z, k=keywords: deft_loss(z, labels, objective=mixed(own), **k), whole)
        loss, gradient = step(
            lambda z, k=keywords: deft_loss(z, labels, objective=mixed(own), group=place, **k), mine
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted[:, columns], rtol=1e-4, atol=1e-7)
    hidden, weight, bias = head(ranks.device())
    for keywords in ({"chunk_bytes": 2 * 156 * 4}, {"reduction": "none"}):
        alone = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        mine = [t.clone().requires_grad_() for t in (hidden, weight[columns], bias[columns])]
        expected = fused_linear_deft_loss(*alone[:2], labels, alone[2], objective=mixed(own), **keywords)
        given = {"objective": mixed(own), "group": place, **keywords}
        loss = fused_linear_deft_loss(*mine[:2], labels, mine[2], **given)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(mine[0].grad, alone[0].grad, rtol=1e-4, atol=2e-6)
        for i in (1, 2):
            torch.testing.assert_close(mine[i].grad, alone[i].grad[columns], rtol=1e-4, atol=2e-6)


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run([split_vocabulary], count)


@pytest.mark.parametrize("count", first_of([3, 2]))
def test_in_processes(count):
    for rank, outcome in enumerate(outcomes(count)["split_vocabulary"]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
