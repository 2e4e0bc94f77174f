"""A focus index for each token, and an anchor to a reference model: every mode against the float64 oracle.

An objective, an anchor, or both; formulas of the rows go through `operators/terms.py` like `weighted`.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import ranks
import torch
import torch._dynamo.testing
import torch.distributed as dist
from formulas import LINEAR, SETTINGS, N, V, head, keywords_of, problem, step
from sampling import first_of
from torch import Tensor

from deft_kernels import (
    DEFTLoss,
    FusedLinearDEFTLoss,
    VocabShard,
    deft_loss,
    fused_linear_deft_loss,
    objectives,
)  # fmt: skip


def of_tokens(own: Tensor, z: Tensor) -> dict:
    """An alpha for each token, 0 and 1 among them; NaN where the row is ignored."""
    alpha = own.clone()
    alpha[:2] = torch.tensor([0.0, 1.0])
    return {"objective": objectives.tsallis(alpha)}


def reference(own: Tensor) -> Tensor:
    """log p of a reference model, near and far from this one's; NaN where the row is ignored."""
    return -8 * own


CASES = {
    "tokens": of_tokens,
    "number": lambda own, z: {"objective": objectives.tsallis(torch.tensor(0.3, dtype=torch.float64))},
    "band": lambda own, z: {"objective": objectives.tsallis(own).within("p<=0.5")},
    "anchored": lambda own, z: {"anchor": 0.2, "reference_logp": reference(own)},
    "anchored eaft": lambda own, z: {
        "objective": objectives.eaft(detach=False), "anchor": 0.1, "reference_logp": reference(own),
    },
    "anchored cayley": lambda own, z: {
        "objective": "cayley", "anchor": 0.1, "reference_logp": reference(own),
    },
    "both": lambda own, z: {**of_tokens(own, z), "anchor": 0.3, "reference_logp": reference(own)},
    "anchored weights": lambda own, z: {
        "objective": objectives.mile(), "anchor": 0.3, "reference_logp": reference(own),
    },
    "anchored function": lambda own, z: {
        "objective": lambda r: -r.logp * (1 - r.entropy / 6), "anchor": 0.3, "reference_logp": reference(own),
    },
}  # fmt: skip


def refused(case: str, settings: dict) -> bool:
    """What the call refuses whatever the formula: with a function, a band or a batch's mean p."""
    in_forward = settings.get("grad_in_forward", False)
    mean = settings.get("reduction", "mean") == "mean" and "num_items" not in settings
    return (
        (
            case == "anchored function"
            and bool({"inplace", "grad_in_forward", "label_smoothing"} & set(settings))
        )
        or (case == "band" and in_forward and mean)
        or (case == "anchored cayley" and in_forward)
    )


def pairs(settings: dict) -> list[tuple[str, str, str]]:
    """(case, setting, backend). The formulas are not the kernels': those have every case and every setting,
    not all pairs."""
    found = [(case, name) for case in CASES for name in settings if not refused(case, settings[name])]
    few = [pair for pair in found if pair[0] in ("both", "anchored eaft") or pair[1] == "plain"]
    return [(*pair, "torch") for pair in found] + [(*pair, "triton") for pair in few]


@pytest.mark.sampled
@pytest.mark.parametrize(("case", "name", "backend"), pairs(SETTINGS))
def test_against_the_oracle(case, name, backend, device):
    logits, labels, own = problem(device)
    own = own.nan_to_num(0.5) if name == "shifted" else own
    given, keywords = CASES[case](own, logits), keywords_of(name, device)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, gradient = step(lambda z: deft_loss(z * 1.0, labels, backend=backend, **given, **keywords), leaf)
    shared = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    expected, wanted = step(lambda z: deft_loss(z, labels, backend="reference", **given, **shared), exact)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=1e-6)
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    assert ((gradient.double() - wanted).abs() <= scale * 6e-5).all()
    assert not gradient[4].any() or name == "shifted"


@pytest.mark.sampled
@pytest.mark.parametrize(("case", "name", "backend"), pairs(LINEAR))
def test_from_hidden_states(case, name, backend, device):
    _, labels, own = problem(device)
    own = own.nan_to_num(0.5) if name == "shifted" else own
    keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in LINEAR[name].items()}
    inputs = [t.requires_grad_() for t in head(device)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    given = CASES[case](own, inputs[0])
    loss = fused_linear_deft_loss(*inputs[:2], labels, inputs[2], backend=backend, **given, **keywords)
    shared = {("weight" if k == "class_weight" else k): v for k, v in keywords.items() if k != "chunk_bytes"}
    logits = torch.nn.functional.linear(*exact)
    expected = deft_loss(logits, labels, backend="reference", **given, **shared)
    torch.testing.assert_close(loss.double(), expected, rtol=3e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64, device=device).reshape(loss.shape)
    (loss * upstream.to(loss)).sum().backward()
    (expected * upstream).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(ours.grad.double() / scale, theirs.grad / scale, rtol=1e-4, atol=3e-6)


MASKED = {
    "chord": objectives.chord(),
    "tsallis": objectives.tsallis(torch.tensor(0.5)),
    "power": objectives.dft(0.5),
    "banded": objectives.tsallis(torch.tensor(1.0)).within("p<=0.9"),
    "mile": objectives.mile(),
}
BESIDE = {
    "z-loss": {"z_loss": 1e-2},
    "smoothed": {"label_smoothing": 0.1},
    "class weight 0": {"label_smoothing": 0.1, "z_loss": 1e-2, "weight": 0.0},
    "class weight": {"z_loss": 1e-2, "weight": 0.7},
}


def masked(settings: dict, device: str) -> tuple[Tensor, Tensor, dict]:
    """(logits, labels, keywords): the target of the first row has the logit -inf, and this class weight."""
    logits, labels, _ = problem(device)
    keywords = dict(settings)
    if "weight" in keywords:
        weight = torch.linspace(0.2, 2.0, V, device=device)
        weight[labels[0]] = keywords["weight"]
        keywords["weight"] = weight
    logits[:, labels[0]] = -math.inf
    return logits, labels, keywords


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("case", MASKED)
def test_a_masked_target_beside_other_terms(case, beside, in_forward, backend, device):
    """The formula's loss of probability 0 is finite, or infinite, and so is the whole; never inf - inf."""
    logits, labels, keywords = masked(BESIDE[beside], device)
    keywords |= {"objective": MASKED[case]} | ({"num_items": 5.0} if in_forward else {"reduction": "none"})
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, gradient = step(
        lambda z: deft_loss(z, labels, backend=backend, grad_in_forward=in_forward, **keywords), leaf
    )
    expected, wanted = step(lambda z: deft_loss(z, labels, backend="reference", **keywords), exact)
    assert expected.isfinite().all() or case == "mile" or beside == "smoothed"
    # A class weight of 0 times an infinite loss is NaN there, too.
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-6, equal_nan=case == "mile")
    if wanted.isfinite().all():
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum"])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("case", MASKED)
def test_a_masked_target_of_a_head(case, beside, reduction, backend, device):
    _, labels, keywords = masked(BESIDE[beside], device)
    hidden, weight, bias = head(device)
    bias[labels[0]] = -math.inf
    classes = keywords.pop("weight", None)
    keywords |= {"objective": MASKED[case], "reduction": reduction}
    own, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, gradient = step(
        lambda h: fused_linear_deft_loss(
            h, weight, labels, bias, class_weight=classes, backend=backend, **keywords
        ),
        own,
    )
    expected, wanted = step(
        lambda h: deft_loss(
            torch.nn.functional.linear(h, weight.double(), bias.double()),
            labels,
            backend="reference",
            weight=classes,
            **keywords,
        ),
        exact,
    )
    torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-6, equal_nan=case == "mile")
    if wanted.isfinite().all():
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize(
    "settings", [{"z_loss": 1e-4}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "z_loss": 1e-4}]
)
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("name", ["neg_prob", "tsallis", "dft"])
def test_other_terms_cost_no_digits(name, in_forward, settings, backend, device):
    """Targets of probability e^-40 have a large -logp, and a small loss by these formulas."""
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(device) * 8
    labels = torch.arange(64, device=device) % 32
    by_backend, by_rows = {
        "neg_prob": (objectives.neg_prob(), objectives.tsallis(torch.tensor(1.0))),
        "tsallis": (objectives.tsallis(0.5), objectives.tsallis(torch.tensor(0.5))),
        "dft": (objectives.dft(), objectives.weighted(lambda r: r.logp.exp())),
    }[name]
    exact = logits.double().requires_grad_()
    keywords = dict(settings) | ({"num_items": 1.0} if in_forward else {"reduction": "none"})
    expected, wanted = step(
        lambda z: deft_loss(z, labels, objective=by_backend, backend="reference", **keywords), exact
    )
    size = wanted.abs().amax(-1, keepdim=True)

    def errors(objective) -> Tensor:
        given = {"objective": objective, "backend": backend, "grad_in_forward": in_forward, **keywords}
        loss, gradient = step(lambda z: deft_loss(z, labels, **given), logits.clone().requires_grad_())
        of_loss = (loss.double() - expected).abs() / expected.abs()
        return torch.stack([of_loss.max(), ((gradient.double() - wanted).abs() / size).max()])

    # A rounding more: the formula's part is rounded before the others are added.
    assert (errors(by_rows) <= errors(by_backend) + 1.2e-7).all(), (errors(by_rows), errors(by_backend))


def test_one_alpha_is_the_number(backend, device):
    """To rounding: the kernels' formula and the rows' one."""
    logits, labels, _ = problem(device)
    for alpha in (0.0, 1e-40, 1e-6, 0.4, 1.0, 2.5):
        own = torch.full((N,), alpha, device=device)
        one, other = (logits.clone().requires_grad_() for _ in range(2))
        found, gradient = step(
            lambda z, own=own: deft_loss(z, labels, objective=objectives.tsallis(own), backend=backend), one
        )
        expected, wanted = step(
            lambda z, a=alpha: deft_loss(z, labels, objective=objectives.tsallis(a), backend=backend), other
        )
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


def test_statistics_show_alpha(backend, device):
    logits, labels, own = problem(device)
    own = own.nan_to_num(0.5)
    objective = objectives.tsallis(own).within("p>=0.001")
    _, stats = deft_loss(logits, labels, objective=objective, backend=backend, return_stats=True)
    counted = labels != -100
    inside = counted & (stats.logp.exp() >= 0.001)
    assert 0 < inside.sum() < counted.sum()
    torch.testing.assert_close(stats.alpha, own.where(counted, 0.0))
    torch.testing.assert_close(stats.gate, (own * stats.logp).exp().where(inside, 0.0))
    assert (stats.entropy[counted] > 0).all() or stats.entropy[counted].min() >= 0


def test_the_anchor_keeps_the_statistics(backend, device):
    logits, labels, own = problem(device)
    given = CASES["anchored"](own, logits)
    plain = deft_loss(logits, labels, backend=backend, return_stats=True)[1]
    anchored = deft_loss(logits, labels, backend=backend, return_stats=True, **given)[1]
    for name, value in plain._asdict().items():
        assert torch.equal(value, getattr(anchored, name)), name


def test_the_anchor_is_the_k3_estimate():
    """In float64, by autograd over the plain formula; the reference model itself costs nothing."""
    logits, labels, _ = problem("cpu", torch.float64)
    log_p = torch.log_softmax(logits, -1)
    logp = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    for far in (0.0, 1e-5, 2.0):
        ratio = torch.full_like(logp, far)
        found = deft_loss(
            logits, labels, objective="nll", reduction="none", anchor=0.5, reference_logp=logp + ratio
        )
        expected = -logp + 0.5 * (torch.expm1(ratio) - ratio)
        torch.testing.assert_close(found, torch.where(labels != -100, expected, 0.0), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alpha", [torch.tensor(math.nan), torch.tensor([0.5] * 8 + [math.nan])])
def test_a_nan_shows(alpha, backend, device):
    logits, labels, _ = problem(device)
    objective = objectives.tsallis(alpha.to(device))
    leaf = logits.clone().requires_grad_()
    rows, gradient = step(
        lambda z: deft_loss(z, labels, objective=objective, backend=backend, reduction="none"), leaf
    )
    wrong = (alpha.expand(N).isnan() & (labels != -100).cpu()).to(device)
    assert torch.equal(rows.isnan(), wrong)
    assert torch.equal(gradient.isnan().any(-1), wrong)


@pytest.mark.parametrize("wrong", [-0.5, math.inf])
def test_a_wrong_alpha_that_nobody_sees_shows(wrong, backend):
    """As where a call is traced, or on a device: NaN in its rows, and in no other."""
    logits, labels, _ = problem("cpu")
    alpha = torch.full((N,), 0.5)
    alpha[2] = wrong

    @torch.compile(fullgraph=True, backend="aot_eager")
    def train(z, alpha):
        objective = objectives.tsallis(alpha)
        return deft_loss(z, labels, objective=objective, backend=backend, reduction="none")

    torch.compiler.reset()
    rows, gradient = step(lambda z: train(z, alpha), logits.clone().requires_grad_())
    assert rows.isnan().nonzero().tolist() == gradient.isnan().any(-1).nonzero().tolist() == [[2]]


def test_impossible_targets(backend, device):
    logits, labels, own = problem(device)
    logits[1, labels[1]] = -math.inf
    alpha = torch.full((N,), 0.5, device=device)
    leaf = logits.clone().requires_grad_()
    rows, gradient = step(
        lambda z: deft_loss(
            z, labels, objective=objectives.tsallis(alpha), backend=backend, reduction="none"
        ),
        leaf,
    )
    assert rows[1] == 2.0 and not gradient[1].any() and rows.isfinite().all()
    anchored = {"anchor": 0.1, "reference_logp": reference(own).nan_to_num(-1.0)}
    rows = deft_loss(logits, labels, backend=backend, reduction="none", **anchored)
    assert rows[1] == math.inf and rows[labels != -100].isnan().sum() == 0


def test_three_products_with_an_anchor():
    _, labels, own = problem("cpu")
    inputs = [t.requires_grad_() for t in head("cpu")[:2]]
    activities = [torch.profiler.ProfilerActivity.CPU]
    for case in ("tokens", "anchored", "both"):
        with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as seen:
            fused_linear_deft_loss(*inputs, labels, **CASES[case](own, inputs[0])).backward()
        sizes = [e.input_shapes for e in seen.events() if e.name in ("aten::mm", "aten::addmm")]
        assert sum(V in {n for shape in shapes for n in shape} for shapes in sizes) == 3, case


def test_a_schedule_is_one_graph():
    """alpha as a tensor without a dimension changes from call to call; nothing is compiled again."""
    logits, labels, own = problem("cpu")
    ref = reference(own).nan_to_num(0.0)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def train(z, y, alpha, ref):
        objective = objectives.tsallis(alpha)
        return deft_loss(z, y, objective=objective, anchor=0.1, reference_logp=ref)

    for alpha in (0.0, 0.25, 0.5, 1.0):
        eager, traced = (logits.clone().requires_grad_() for _ in range(2))
        objective = objectives.tsallis(alpha)
        expected = deft_loss(eager, labels, objective=objective, anchor=0.1, reference_logp=ref)
        found = train(traced, labels, torch.tensor(alpha), ref)
        torch.testing.assert_close(found, expected)
        expected.backward()
        found.backward()
        torch.testing.assert_close(traced.grad, eager.grad)
    assert counter.frame_count == 1


def test_compiled_from_hidden_states():
    _, labels, own = problem("cpu")
    hidden, weight, _ = head("cpu")
    ref = reference(own).nan_to_num(0.0)

    def train(h, y, alpha, ref):
        objective = objectives.tsallis(alpha)
        return fused_linear_deft_loss(h, weight, y, objective=objective, anchor=0.1, reference_logp=ref)

    torch.compiler.reset()
    eager, traced = (hidden.clone().requires_grad_() for _ in range(2))
    own = own.nan_to_num(0.5)
    expected = train(eager, labels, own, ref)
    found = torch.compile(train, fullgraph=True, backend="aot_eager")(traced, labels, own, ref)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    torch.testing.assert_close(traced.grad, eager.grad)


def test_modules():
    logits, labels, own = problem("cpu")
    hidden, weight, _ = head("cpu")
    ref = reference(own)
    expected = deft_loss(logits, labels, anchor=0.2, reference_logp=ref)
    assert torch.equal(DEFTLoss(anchor=0.2)(logits, labels, reference_logp=ref), expected)
    expected = fused_linear_deft_loss(hidden, weight, labels, anchor=0.2, reference_logp=ref)
    found = FusedLinearDEFTLoss(anchor=0.2)(hidden, weight, labels, reference_logp=ref)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="^anchor: needs reference_logp"):
        DEFTLoss(anchor=0.2)(logits, labels)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: {"objective": objectives.tsallis(torch.ones(N, dtype=torch.int64))}, "^alpha: .* floating"),
        (lambda: {"objective": objectives.tsallis(torch.ones(N, dtype=torch.complex64))}, "^alpha: "),
        (lambda: {"objective": objectives.tsallis(torch.rand(N, requires_grad=True))}, "^alpha: .* gradient"),
        (lambda: {"objective": objectives.tsallis(torch.rand(N).to_sparse())}, "^alpha: "),
        (lambda: {"objective": objectives.tsallis(torch.rand(N), q=0.5)}, "^alpha, q: give exactly one"),
        (lambda: {"objective": objectives.tsallis(torch.rand(N + 1))}, "^alpha: expected the labels' shape"),
        (
            lambda: {"objective": objectives.tsallis(torch.rand(N) - 2)},
            "^alpha: expected finite numbers >= 0",
        ),
        (lambda: {"objective": objectives.tsallis(torch.tensor(-0.5))}, "^alpha: expected finite .* -0.5"),
        (lambda: {"objective": objectives.tsallis(torch.tensor(math.inf))}, "^alpha: expected finite .* inf"),
        (lambda: {"objective": objectives.tsallis(torch.rand(N, device="meta"))}, "^alpha: is on meta"),
        (lambda: {"anchor": 0.1}, "^anchor: needs reference_logp"),
        (lambda: {"reference_logp": torch.zeros(N)}, "^reference_logp: needs anchor"),
        (lambda: {"anchor": -0.1, "reference_logp": torch.zeros(N)}, "^anchor: "),
        (lambda: {"anchor": math.nan, "reference_logp": torch.zeros(N)}, "^anchor: "),
        (lambda: {"anchor": 0.1, "reference_logp": -1.0}, "^reference_logp: expected a Tensor"),
        (lambda: {"anchor": 0.1, "reference_logp": torch.zeros(N, 1)}, "^reference_logp: .* labels' shape"),
        (
            lambda: {"anchor": 0.1, "reference_logp": torch.zeros(N, dtype=torch.int64)},
            "^reference_logp: .* floating",
        ),
        (
            lambda: {"anchor": 0.1, "reference_logp": torch.zeros(N, requires_grad=True)},
            "^reference_logp: requires a gradient",
        ),
        (lambda: {"anchor": 0.1, "reference_logp": torch.zeros(N, device="meta")}, "^reference_logp: is on"),
    ],
)
def test_bad_input(make, error, backend):
    logits, labels, _ = problem("cpu")
    for name in (backend, "reference"):
        with pytest.raises((TypeError, ValueError), match=error):
            deft_loss(logits, labels, backend=name, **make())
    with pytest.raises((TypeError, ValueError), match=error):
        fused_linear_deft_loss(*head("cpu")[:2], labels, backend=backend, **make())


def test_second_derivatives_raise():
    logits, labels, own = problem("cpu")
    leaf = logits.clone().requires_grad_()
    loss = deft_loss(leaf, labels, **CASES["both"](own, logits))
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
    hidden, weight, bias = head(ranks.device())
    for case in CASES:
        given = CASES[case](own, logits)
        whole, mine = logits.clone().requires_grad_(), logits[:, columns].clone().requires_grad_()
        expected, wanted = step(lambda z, g=given: deft_loss(z, labels, **g), whole)
        loss, gradient = step(lambda z, g=given: deft_loss(z, labels, group=place, **g), mine)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted[:, columns], rtol=1e-4, atol=1e-7)
        alone = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        parts = [t.clone().requires_grad_() for t in (hidden, weight[columns], bias[columns])]
        expected = fused_linear_deft_loss(*alone[:2], labels, alone[2], chunk_bytes=1248, **given)
        loss = fused_linear_deft_loss(*parts[:2], labels, parts[2], group=place, chunk_bytes=1248, **given)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(parts[0].grad, alone[0].grad, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(parts[1].grad, alone[1].grad[columns], rtol=1e-4, atol=2e-6)


def dtensors() -> None:
    """Rows or columns of DTensor logits on a mesh: row inputs are DTensors where the rows are sharded."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh(ranks.device(), (dist.get_world_size(),))
    logits, labels, own = problem(ranks.device())
    for placement, rows in ((Shard(0), Shard(0)), (Shard(1), Replicate())):

        def spread(x: Tensor, p=rows) -> Tensor:
            return distribute_tensor(x, mesh, [p])

        for case in ("tokens", "number", "anchored", "both"):
            whole = logits.clone().requires_grad_()
            expected, wanted = step(lambda z, c=case: deft_loss(z, labels, **CASES[c](own, z)), whole)
            given = CASES[case](own, logits)
            if "reference_logp" in given:
                given["reference_logp"] = spread(given["reference_logp"])
            if case in ("tokens", "both"):
                alpha = given["objective"].inputs["alpha"]
                given["objective"] = objectives.tsallis(spread(alpha))
            mine = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            loss = deft_loss(mine, spread(labels), **given)
            (loss * 0.5).backward()
            torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine.grad.full_tensor(), wanted, rtol=1e-4, atol=1e-7)
    wrong = torch.full((N,), 0.5, device=ranks.device())
    wrong[-1] = -0.5
    mine, targets, wrong = (distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, labels, wrong))
    if ranks.device() == "cpu":
        with pytest.raises(ValueError, match="^alpha: expected finite numbers >= 0, got -0.5"):
            deft_loss(mine, targets, objective=objectives.tsallis(wrong))
    with pytest.raises(TypeError, match=r"^(alpha|labels|reference_logp): "):
        mine = distribute_tensor(logits, mesh, [Shard(0)])
        deft_loss(mine, distribute_tensor(labels, mesh, [Shard(0)]), **CASES["tokens"](own, logits))


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run([split_vocabulary, dtensors], count)


@pytest.mark.parametrize("case", ["split_vocabulary", "dtensors"])
@pytest.mark.parametrize("count", first_of([3, 2]))
def test_in_processes(count, case):
    for rank, outcome in enumerate(outcomes(count)[case]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
