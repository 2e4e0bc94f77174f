"""Defects that well-known loss kernels had, one test or more for each. The docstrings name them by number:

1.  the gradient of a confident token lost: p / N stored in half precision, then 1 / N subtracted
2.  the weight's gradient summed over chunks in half precision (`test_weight_gradient_is_summed_in_fp32`)
3.  reduction="none" or token weights wrong, because the forward had made the gradient for a mean
4.  logits overwritten without a word to autograd
5.  every label ignored: NaN, or a loss without a graph
6.  row offsets in int32
7.  a tail tile that is not masked
8.  a frozen input, and no gradient for the others (`test_frozen_inputs`)
9.  the host waits for the device
10. two options together, one of them without effect
11. tests on small random logits only

2 and 8 are defects of the linear call: their tests are in `test_linear`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from rows import KINDS, ULP, gradient_excess, loss_excess, make
from torch import Tensor
from waits import refusing_waits

from deft_kernels import deft_loss, objectives, row_statistics
from deft_kernels.core import checks
from deft_kernels.core.spec import Spec
from deft_kernels.core.statistics import Field
from deft_kernels.operators import logits as logits_operators

MODES = {
    "backward": {"grad_in_forward": False},
    "forward": {"grad_in_forward": True},
    "inplace backward": {"grad_in_forward": False, "inplace": True},
    "inplace forward": {"grad_in_forward": True, "inplace": True},
}


def focal(r):
    return -((1 - r.logp.exp()) ** 2) * r.logp


@pytest.mark.filterwarnings("ignore:.*to float16 before the loss scale:RuntimeWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("objective", ["nll", "deft"])
def test_confident_token_keeps_its_gradient(objective, dtype, mode, backend, device):
    """Trap 1: p / N stored in bf16 and 1 / N subtracted from what was read back is 0 at p = 0.999.

    num_items = 4096 stands for a large batch without its cost: p - 1 = -0.001 becomes -2.4e-7, one step of
    bf16 below p / N itself. fp16 holds that with 2 of its bits, so it takes 64.
    """
    items = 64 if dtype == torch.float16 else 4096
    p, vocabulary = 0.999, 5
    logits = torch.zeros(2, vocabulary, dtype=torch.float64)
    labels = torch.tensor([1, 4])
    logits[torch.arange(2), labels] = math.log(p / (1 - p) * (vocabulary - 1))
    logits = logits.to(device, dtype)
    labels = labels.to(device)
    x = logits.clone().requires_grad_()
    loss = deft_loss(x, labels, objective=objective, num_items=items, backend=backend, **MODES[mode])
    loss.backward()
    y = logits.double().requires_grad_()
    deft_loss(y, labels, objective=objective, num_items=items, backend="reference").backward()
    ours, exact = x.grad.double()[torch.arange(2), labels], y.grad[torch.arange(2), labels]
    assert (ours < 0).all()
    step = {torch.float32: 1e-4}.get(dtype, 2 * ULP.get(dtype, 0.0))
    # a subnormal of fp16, whose spacing is absolute
    floor = 2.0**-25 if dtype == torch.float16 else 0.0
    assert ((ours - exact).abs() <= step * exact.abs() + floor).all()


@pytest.mark.parametrize("keywords", [{}, {"objective": "nll"}, {"objective": "cayley"},
                                      {"objective": objectives.deft(detach=False)}, {"objective": focal},
                                      {"inplace": True}, {"shift": True}, {"label_smoothing": 0.1},
                                      ])  # fmt: skip
def test_none_takes_any_upstream(keywords, backend, device):
    """Trap 3: a gradient made in the forward for a mean, rows then scaled wrongly. Random upstream, with a
    zero and a negative one, per row, against float64."""
    logits, labels = make("plain", 5, 19, torch.float32)
    logits, labels = logits.to(device), labels.to(device)
    upstream = torch.tensor([1.3, 0.0, -0.7, 100.0, 1e-3], device=device)
    x = logits.clone().requires_grad_()
    deft_loss(x, labels, reduction="none", backend=backend, **keywords).backward(upstream)
    y = logits.double().requires_grad_()
    keywords = {name: value for name, value in keywords.items() if name != "inplace"}
    deft_loss(y, labels, reduction="none", backend="reference", **keywords).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
    assert not x.grad[1].any()


@pytest.mark.parametrize("scale", [1.0, -3.7, 0.0, 2.0**16])
@pytest.mark.parametrize("mode", MODES)
def test_scalar_upstream(mode, scale, backend, device):
    """Trap 3 again: a loss that is scaled before the backward (loss scaling, accumulation)."""
    logits, labels = make("plain", 3, 19, torch.float32)
    x = logits.to(device, copy=True).requires_grad_()
    (deft_loss(x, labels.to(device), backend=backend, **MODES[mode]) * scale).backward()
    y = logits.to(device).double().requires_grad_()
    (deft_loss(y, labels.to(device), backend="reference") * scale).backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6 * max(1.0, abs(scale)))


@pytest.mark.parametrize("mode", ["inplace backward", "inplace forward"])
@pytest.mark.parametrize("leaf", [True, False])
def test_inplace_bumps_the_version_counter(leaf, mode, backend, device):
    """Trap 4: logits overwritten and autograd none the wiser. The square's backward wants the old logits."""
    logits, labels = make("plain", 3, 19, torch.float32)
    x = logits.to(device, copy=True).requires_grad_()
    z = x if leaf else x * 1.0
    version = z._version
    squared = (z * z).sum()
    loss = deft_loss(z, labels.to(device), backend=backend, **MODES[mode])
    if mode == "inplace backward":
        assert z._version == version
        loss.backward()
    assert z._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


@pytest.mark.parametrize("mode", ["inplace backward", "inplace forward"])
def test_inplace_after_another_change_raises(mode, backend, device):
    """Trap 4, seen from the loss: somebody else changes the logits between forward and backward."""
    logits, labels = make("plain", 3, 19, torch.float32)
    z = logits.to(device, copy=True).requires_grad_() * 1.0
    if mode == "inplace backward":
        loss = deft_loss(z, labels.to(device), backend=backend, **MODES[mode])
        z.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss = deft_loss(z, labels.to(device), backend=backend, **MODES[mode])
        gradient = z.detach().clone()
        assert not torch.equal(gradient.cpu(), logits)
        y = logits.to(device).double().requires_grad_()
        deft_loss(y, labels.to(device), backend="reference").backward()
        torch.testing.assert_close(gradient.double(), y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grad", ["no_grad", "constant"])
def test_inplace_without_a_gradient_leaves_the_logits(grad, backend, device):
    """Trap 4: evaluation with the training call must not destroy the logits."""
    logits, labels = make("plain", 3, 19, torch.float32)
    x = logits.to(device, copy=True).requires_grad_(grad == "no_grad")
    with torch.set_grad_enabled(grad != "no_grad"):
        loss = deft_loss(x, labels.to(device), inplace=True, grad_in_forward=True, backend=backend)
    assert not loss.requires_grad
    assert torch.equal(x.detach().cpu(), logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_stays_connected(reduction, mode, backend, device):
    """Trap 5: NaN, or a loss cut off from the graph, on which distributed training hangs."""
    parameter = torch.randn(3, 4, device=device, requires_grad=True)
    logits = parameter @ torch.randn(4, 19, device=device)
    labels = torch.full((3,), -100, device=device)
    loss = deft_loss(logits, labels, reduction=reduction, backend=backend, **MODES[mode])
    assert loss == 0 and loss.grad_fn is not None
    loss.backward()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("mode", ["backward", "inplace backward", "inplace forward", "statistics"])
def test_offsets_beyond_two_to_the_31(mode, backend, device):
    """Trap 6: row offsets in int32. Rows 2^31 + 8 elements apart: 4 GiB of bf16 that is reserved, never
    touched but for two rows. A plain backward's gradient is new and dense, in place it has the stride."""
    vocabulary, stride = 19, 2**31 + 8
    storage = torch.empty(stride + vocabulary, dtype=torch.bfloat16, device=device)
    logits = torch.as_strided(storage, (2, vocabulary), (stride, 1))
    values, labels = make("plain", 2, vocabulary, torch.bfloat16)
    logits.copy_(values.to(device))
    labels = labels.to(device)
    y = values.to(device).double().requires_grad_()
    if mode == "statistics":
        ours = row_statistics(logits.requires_grad_(), labels, backend=backend)
        expected = row_statistics(y, labels, backend="reference")
        torch.testing.assert_close(ours.entropy.double(), expected.entropy, rtol=1e-5, atol=0)
        ours.entropy.sum().backward()
        expected.entropy.sum().backward()
    else:
        x = logits.requires_grad_()
        deft_loss(x, labels, reduction="sum", backend=backend, **MODES[mode]).backward()
        deft_loss(y, labels, reduction="sum", backend="reference").backward()
    gradient = logits.detach() if mode.startswith("inplace") else logits.grad
    torch.testing.assert_close(gradient.double(), y.grad, rtol=2.0**-8, atol=1e-6)


def test_fields_beyond_two_to_the_31(device):
    """Trap 6, of the packed rows: field 18 lies 18 N elements behind field 0, from N = 119,304,648 on 2^31.
    9 GB that are reserved, and touched at four rows: the kernels run for these alone."""
    from deft_kernels.backends.triton import gradient_kernels, kernels, launch, tuning

    n, some, vocabulary = 119_304_648, 4, 19
    logits, labels = make("plain", some, vocabulary, torch.bfloat16)
    logits, labels = logits.to(device), labels.to(device)
    spec = Spec(objectives.deft(), backend="triton")
    call = launch.Call(logits, labels, None, spec)
    _, expected = logits_operators.row_loss(logits, labels, None, -100, *spec.encode())
    rows = torch.empty(19 * n, device=device)
    loss, gradient = torch.empty(some, device=device), torch.empty_like(logits)
    plan, laid = tuning.statistics(vocabulary, 2, False), (logits, call.strides)
    kernels.statistics_kernel[(some,)](
        logits, labels, logits, logits, rows, loss, n, call.strides, vocabulary, -100, call.variants.numbers,
        call.variants.rows, launch.plan_of(plan, launch.peel(plan.width, laid)), num_warps=plan.num_warps,
        **call.variants.compiler_of_reductions,
    )  # fmt: skip
    found = torch.stack([rows[field * n : field * n + some] for field in range(19)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    plan = tuning.gradient(vocabulary, 2)
    gradient_kernels.gradient_kernel[(some, 1)](
        logits, labels, logits, rows, torch.ones(some, device=device), rows, gradient, n, call.strides,
        call.strides, 1, vocabulary, 4096, call.variants.numbers, False, call.variants.gradient,
        launch.plan_of(plan, launch.peel(plan.width, laid, laid)), num_warps=plan.num_warps,
        **call.variants.compiler,
    )  # fmt: skip
    leaf = logits.clone().requires_grad_()
    deft_loss(leaf, labels, reduction="sum", backend="triton").backward()
    assert torch.equal(gradient, leaf.grad)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "dense"), (torch.float32, "offset"), (torch.bfloat16, "offset")]
)
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 255, 256, 257, 639, 641, 1280, 1281])
def test_tails(vocabulary, dtype, kind, backend, device):
    """Trap 7: a tail tile that is not masked. A warp's tile is 128 fp32 or 256 bf16 logits and the loop takes
    four (statistics) or two (gradient) after the head, so the sizes stand on and beside 1, 2 and 5 tiles and
    between them. Neighbouring memory is full of huge values and NaN; outputs are poisoned beforehand and
    nothing beside the rows may change."""
    n = 2
    base, labels = make("plain", n, vocabulary, dtype, seed=vocabulary)
    lead = 3 if kind == "offset" else 0
    padded = torch.full((n + 2, vocabulary + lead + 5), 3e38 if vocabulary % 2 else math.nan)
    padded = padded.to(device, dtype)
    logits = padded[1:-1, lead : lead + vocabulary]
    logits.copy_(base.to(device))
    labels = labels.to(device)
    spec = Spec(objectives.deft(detach=False), statistics=True, backend=backend)
    implementation = logits_operators.implementation(spec)
    loss, rows = implementation.row_loss(logits, labels, None, -100, spec)
    upstream = torch.tensor([1.3, -0.6], device=device)
    room = torch.full((n + 2, vocabulary + 9), math.nan, device=device, dtype=dtype)
    out = room[1:-1, 4 : 4 + vocabulary]
    implementation.gradient(logits, labels, None, rows, upstream, spec, out)
    second = torch.full_like(room, math.nan)
    fused = second[1:-1, 4 : 4 + vocabulary]
    fused_loss, fused_rows = implementation.row_loss_with_gradient(
        logits, labels, upstream, None, -100, spec, fused
    )

    y = base.to(device).double().requires_grad_()
    expected, stats = deft_loss(
        y, labels, objective=spec.objective, reduction="none", return_stats=True, backend="reference"
    )
    expected.backward(upstream.double())
    assert loss_excess(loss.double(), expected.detach(), stats.gate) <= 1
    assert loss_excess(fused_loss.double(), expected.detach(), stats.gate) <= 1
    for field, name in (
        (Field.COLLISION, "collision"),
        (Field.ENTROPY, "entropy"),
        (Field.MAX_PROB, "max_prob"),
    ):
        for found in (rows, fused_rows):
            torch.testing.assert_close(found[field].double(), getattr(stats, name), rtol=2e-5, atol=2e-6)
    assert gradient_excess(out, y.grad) <= 1
    assert gradient_excess(fused, y.grad) <= 1
    for buffer in (room, second):
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:-1, 4 : 4 + vocabulary] = False
        assert buffer[outside].isnan().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_written(inplace, backend, device):
    """Trap 7's sibling: a gradient buffer that is not cleared where the kernel has nothing to say."""
    logits, labels = make("plain", 4, 130, torch.float32)
    logits, labels = logits.to(device), labels.to(device)
    labels[[0, 2]] = -100
    spec = Spec(objectives.deft(), backend=backend)
    implementation = logits_operators.implementation(spec)
    ones = torch.ones(4, device=device)
    outs = []
    _, rows = implementation.row_loss(logits, labels, None, -100, spec)
    for call in ("gradient", "fused"):
        source = logits.clone()
        out = source if inplace else torch.full_like(logits, math.nan)
        if call == "gradient":
            implementation.gradient(source, labels, None, rows, ones, spec, out)
        else:
            implementation.row_loss_with_gradient(source, labels, ones, None, -100, spec, out)
        assert not out[[0, 2]].any()
        assert not out.isnan().any() and out[[1, 3]].any()
        outs.append(out)
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("keywords", [
    {}, {"reduction": "none"}, {"grad_in_forward": True}, {"inplace": True},
    {"inplace": True, "grad_in_forward": True}, {"objective": "cayley"}, {"objective": focal},
    {"objective": objectives.deft(math.inf, detach=False).within("p>=0.01")},
    {"weighted": True, "shift": True},
    {"return_stats": True, "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}])  # fmt: skip
def test_no_host_synchronisation(keywords, device, monkeypatch):
    """Trap 9: on the kernels' path nothing asks a tensor for its value.

    A GPU reports it itself (sync debug mode). The interpreter runs the same launchers, with the ways from a
    tensor to a Python value closed while they run; only the host's check of CPU labels is left out.
    """
    logits, labels = make("plain", 4, 19, torch.float32)
    x, labels = logits.to(device).reshape(2, 2, 19).requires_grad_(), labels.to(device).reshape(2, 2)
    keywords = dict(keywords)
    if keywords.pop("weighted", False):
        keywords |= {"weight": torch.rand(19, device=device), "token_weight": torch.rand(2, 2, device=device)}
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    if device == "cuda":
        with refusing_waits():
            loss = deft_loss(x, labels, backend="triton", **keywords)
            (loss[0] if isinstance(loss, tuple) else loss).sum().backward()
        return
    from deft_kernels.backends.triton import backend as triton_backend

    inside = []

    def closed(name: str, original):
        def method(self, *args, **kwargs):
            if not inside:
                raise AssertionError(f"Tensor.{name} on the kernels' path")
            return original(self, *args, **kwargs)

        return method

    class Kernel:
        """A kernel whose interpretation may read what it likes."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*args, **kwargs):
                inside.append(1)
                self.kernel[grid](*args, **kwargs)
                inside.pop()

            return run

    for name in [name for name in vars(triton_backend) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_backend, name, Kernel(getattr(triton_backend, name)))
    for name in (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    ):
        monkeypatch.setattr(torch.Tensor, name, closed(name, getattr(torch.Tensor, name)))
    loss = deft_loss(x, labels, backend="triton", **keywords)
    (loss[0] if isinstance(loss, tuple) else loss).sum().backward()
    monkeypatch.undo()
    assert torch.isfinite(x.grad).all()


OPTIONS = {
    "objective": {"objective": objectives.cayley()},
    "through": {"objective": objectives.deft(1, detach=False)},
    "band": {"objective": objectives.deft().within("p>=0.05")},
    "reduction": {"reduction": "sum"},
    "ignore_index": {"ignore_index": 4},
    "token_weight": {"token_weight": torch.linspace(0.3, 2.0, 4).reshape(2, 2)},
    "weight": {"weight": torch.linspace(0.3, 2.0, 19)},
    "num_items": {"num_items": 11},
    "shift": {"shift": True},
    "softcap": {"softcap": 2.0},
    "temperature": {"temperature": 1.7},
    "z_loss": {"z_loss": 0.05},
    "label_smoothing": {"label_smoothing": 0.3},
}


def pairs():
    for one, other in itertools.combinations(OPTIONS, 2):
        if not set(OPTIONS[one]) & set(OPTIONS[other]) and {one, other} != {"reduction", "num_items"}:
            yield one, other


@pytest.mark.sampled
@pytest.mark.parametrize(("one", "other"), list(pairs()))
def test_no_option_is_ignored_beside_another(one, other, backend, device):
    """Trap 10: two options, one of them silently without effect. Each pair equals the float64 oracle, loss
    and gradient, and differs from either alone. Half of the pairs take each way of making the gradient."""
    logits, labels = make("plain", 4, 19, torch.float32, seed=11)
    logits, labels = (logits * 0.5).reshape(2, 2, 19).to(device), labels.reshape(2, 2).to(device)
    labels[0, 1] = 4

    def run(keywords, own, source, **extra):
        keywords = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
        x = source.clone().requires_grad_()
        loss = deft_loss(x, labels, backend=own, **keywords, **extra)
        loss.backward()
        return loss.detach().double(), x.grad.double()

    both = OPTIONS[one] | OPTIONS[other]
    loss, gradient = run(both, "reference", logits.double())
    for alone in (one, other):
        less = run(OPTIONS[alone], "reference", logits.double())
        assert not torch.allclose(less[1], gradient, rtol=1e-3, atol=1e-6)
    possible = (
        "objective" not in both or "band" in (one, other) and not {"reduction", "num_items"}.isdisjoint(both)
    )
    possible |= "through" in (one, other)
    forward = possible and list(pairs()).index((one, other)) % 2
    ours = run(both, backend, logits, **MODES["forward" if forward else "backward"])
    torch.testing.assert_close(ours[0], loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["nll", "deft", "cayley"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_temperament(kind, objective, dtype, backend, device):
    """Trap 11: tests on tame logits. Peaked, uniform, confident, conflicting, far from zero and masked rows;
    V = 300 is more than one tile and no multiple of one."""
    logits, labels = (t.to(device) for t in make(kind, 3, 300, dtype, seed=2))
    upstream = torch.tensor([0.8, -1.2, 1.0], device=device)
    x = logits.clone().requires_grad_()
    loss = deft_loss(x, labels, objective=objective, reduction="none", backend=backend)
    loss.backward(upstream)
    y = logits.double().requires_grad_()
    expected, stats = deft_loss(
        y, labels, objective=objective, reduction="none", return_stats=True, backend="reference"
    )
    expected.backward(upstream.double())
    assert loss_excess(loss.detach().double(), expected.detach(), stats.gate) <= 1
    assert gradient_excess(x.grad, y.grad) <= 1


@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_second_backward(mode, reduction, upstream, backend, device):
    """Trap 4's other half: with retain_graph the gradient is the same again, or in place there is an error
    and never a gradient of the gradient."""
    if reduction == "none" and mode.endswith("forward"):
        mode = "backward"
    logits, labels = make("plain", 3, 19, torch.bfloat16)
    x = logits.to(device, copy=True).requires_grad_()
    loss = deft_loss(x, labels.to(device), reduction=reduction, backend=backend, **MODES[mode])
    weights = torch.full_like(loss, upstream)
    (first,) = torch.autograd.grad(loss, x, weights, retain_graph=True)
    first = first.clone()
    if mode.startswith("inplace"):
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(loss, x, weights, retain_graph=True)
        return
    (second,) = torch.autograd.grad(loss, x, weights, retain_graph=True)
    assert torch.equal(second, first)
    (third,) = torch.autograd.grad(loss, x, 2 * weights)
    assert torch.equal(third, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward(weights)


def test_stored_gradient_is_not_shared(backend, device):
    """A gradient handed out as .grad and then changed (clipping, zeroing) must not come back."""
    logits, labels = make("plain", 3, 19, torch.float32)
    x = logits.to(device, copy=True).requires_grad_()
    loss = deft_loss(x, labels.to(device), grad_in_forward=True, backend=backend)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    x.grad.zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, first)


@pytest.mark.parametrize("keywords", [*MODES.values(), {"reduction": "none"}, {"objective": focal}])
def test_second_derivative_is_refused(keywords, backend, device):
    """A gradient penalty on a hand-written backward must not vanish without a word."""
    logits, labels = make("plain", 3, 19, torch.float32)
    x = logits.to(device, copy=True).requires_grad_()
    loss = deft_loss(x, labels.to(device), backend=backend, **keywords)
    with pytest.raises(RuntimeError, match=r"not differentiable a second time .*backend=\"reference\""):
        (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (loss.sum().detach() + gradient.square().sum() + x.sum()).backward()


def test_reference_has_second_derivatives(device):
    logits, labels = make("plain", 3, 7, torch.float32)
    x = logits.double().to(device).requires_grad_()
    loss = deft_loss(x, labels.to(device), objective="nll", reduction="sum", backend="reference")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    gradient[:, 0].sum().backward()
    p = torch.softmax(logits.double(), -1)
    expected = p[:, :1] * (F.one_hot(torch.zeros(3, dtype=torch.long), 7) - p)
    torch.testing.assert_close(x.grad.cpu(), expected)


def test_runs_are_reproducible(backend, device):
    """No atomics: the same bits every time."""
    logits, labels = make("plain", 3, 700, torch.float32)
    results = []
    for _ in range(2):
        x = logits.to(device, copy=True).requires_grad_()
        loss = deft_loss(x, labels.to(device), backend=backend)
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
