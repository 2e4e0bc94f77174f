"""What the package promises about input it cannot honour, and about rows of NaN, infinities or nothing.

V = 7 and N = 4 wherever only the host's checks or a row's isolation matter: every extra row costs the
interpreter tens of milliseconds.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

from deft_kernels import DEFTLoss, deft_loss, gated_loss, objectives, row_statistics
from deft_kernels.core import checks

N, V = 4, 7
NAMES = ("deft", "nll", "neg_prob", "cayley", "rational", "dft", "eaft")


def rows(device: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, V).to(device, dtype), torch.tensor([0, 3, 6, 2], device=device)


def focal(r):
    return -((1 - r.logp.exp()) ** 2) * r.logp


def vector(*shape: int, **keywords) -> torch.Tensor:
    return torch.ones(*shape, **keywords)


LOGITS = [
    ("a list", [[1.0]], TypeError),
    ("integers", torch.ones(N, V, dtype=torch.int64), TypeError),
    ("bool", torch.ones(N, V, dtype=torch.bool), TypeError),
    ("complex", torch.ones(N, V, dtype=torch.complex64), TypeError),
    ("float8", torch.ones(N, V).to(torch.float8_e4m3fn), TypeError),
    ("sparse", torch.ones(N, V).to_sparse(), TypeError),
    ("scalar", torch.tensor(1.0), ValueError),
    ("V = 0", torch.ones(N, 0), ValueError),
]


@pytest.mark.parametrize("call", [deft_loss, row_statistics])
@pytest.mark.parametrize(("logits", "error"), [case[1:] for case in LOGITS], ids=[c[0] for c in LOGITS])
def test_logits(call, logits, error):
    with pytest.raises(error, match="^logits: "):
        call(logits, torch.zeros(N, dtype=torch.long))


LABELS = [
    ("a list", [0, 1, 2, 3], TypeError),
    ("float", torch.zeros(N), TypeError),
    ("probabilities", torch.rand(N, V), TypeError),
    ("bool", torch.zeros(N, dtype=torch.bool), TypeError),
    ("too few", torch.zeros(N - 1, dtype=torch.long), ValueError),
    ("too many dimensions", torch.zeros(N, 1, dtype=torch.long), ValueError),
    ("the logits' shape", torch.zeros(N, V, dtype=torch.long), ValueError),
    ("another device", torch.zeros(N, dtype=torch.long, device="meta"), ValueError),
]


@pytest.mark.parametrize("call", [deft_loss, row_statistics])
@pytest.mark.parametrize(("labels", "error"), [case[1:] for case in LABELS], ids=[c[0] for c in LABELS])
def test_labels(call, labels, error):
    with pytest.raises(error, match="^labels: "):
        call(torch.randn(N, V), labels)


def test_shape_message_says_what_was_given_and_expected():
    with pytest.raises(ValueError, match=re.escape("(2, 3)") + ".*" + re.escape("(3, 2)")):
        deft_loss(torch.randn(2, 3, V), torch.zeros(3, 2, dtype=torch.long))


KEYWORDS = [
    ("objective", "focal", ValueError),
    ("objective", 3, TypeError),
    ("objective", None, TypeError),
    ("objective", "tsallis", ValueError),
    ("objective", lambda r: 1.0, ValueError),
    ("objective", lambda r: r.logp.sum(), ValueError),
    ("reduction", "average", ValueError),
    ("reduction", None, ValueError),
    ("ignore_index", 1.0, TypeError),
    ("ignore_index", True, TypeError),
    ("ignore_index", None, TypeError),
    ("token_weight", [1.0] * N, TypeError),
    ("token_weight", vector(N, dtype=torch.complex64), TypeError),
    ("token_weight", vector(N, 1), ValueError),
    ("token_weight", vector(1), ValueError),
    ("token_weight", vector(N, device="meta"), ValueError),
    ("weight", [1.0] * V, TypeError),
    ("weight", vector(V, dtype=torch.int64), TypeError),
    ("weight", vector(V - 1), ValueError),
    ("weight", vector(V, 1), ValueError),
    ("weight", vector(V, requires_grad=True), ValueError),
    ("weight", vector(V, device="meta"), ValueError),
    ("num_items", "4", TypeError),
    ("num_items", True, TypeError),
    ("num_items", 0, ValueError),
    ("num_items", -1.0, ValueError),
    ("num_items", math.nan, ValueError),
    ("num_items", vector(2), ValueError),
    ("shift", -1, ValueError),
    ("shift", 1.0, TypeError),
    ("shift", torch.tensor(1), TypeError),
    ("shift", None, TypeError),
    ("softcap", 0.0, ValueError),
    ("softcap", -30.0, ValueError),
    ("softcap", math.nan, ValueError),
    ("softcap", math.inf, ValueError),
    ("softcap", "30", TypeError),
    ("softcap", 1e39, ValueError),
    ("temperature", 1e39, ValueError),
    ("temperature", 1e-39, ValueError),
    ("logit_scale", 1e39, ValueError),
    ("z_loss", 1e39, ValueError),
    ("temperature", 0.0, ValueError),
    ("temperature", -1.0, ValueError),
    ("temperature", math.nan, ValueError),
    ("temperature", math.inf, ValueError),
    ("temperature", None, TypeError),
    ("temperature", True, TypeError),
    ("temperature", torch.tensor(1.0), TypeError),
    ("z_loss", -1e-4, ValueError),
    ("z_loss", math.nan, ValueError),
    ("z_loss", None, TypeError),
    ("label_smoothing", -0.1, ValueError),
    ("label_smoothing", 1.1, ValueError),
    ("label_smoothing", math.nan, ValueError),
    ("label_smoothing", False, TypeError),
    ("inplace", 1, TypeError),
    ("grad_in_forward", "yes", TypeError),
    ("return_stats", 0, TypeError),
    ("backend", "cuda", ValueError),
    ("backend", None, ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), KEYWORDS)
def test_each_keyword(name, value, error):
    logits, labels = rows("cpu")
    with pytest.raises(error, match=f"^{name}: "):
        deft_loss(logits, labels, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [case for case in KEYWORDS if case[0] in ("ignore_index", "shift", "softcap", "temperature", "backend")],
)
def test_each_keyword_of_row_statistics(name, value, error):
    logits, labels = rows("cpu")
    with pytest.raises(error, match=f"^{name}: "):
        row_statistics(logits, labels, **{name: value})


@pytest.mark.parametrize("name", ["softcap", "temperature"])
@pytest.mark.parametrize(("value", "scale"), [(1e-30, 1e30), (1e30, 1e-30), (1e-300, 1e300)])
def test_a_quotient_that_single_precision_does_not_hold(name, value, scale):
    logits, labels = rows("cpu")
    for call in (deft_loss, row_statistics):
        with pytest.raises(ValueError, match=r"^(softcap|temperature|logit_scale): .*3\.40282e\+38\]"):
            call(logits, labels, logit_scale=scale, **{name: value})


def test_the_largest_numbers_are_taken(backend, device):
    """As near to what single precision holds as they may be: no overflow between here and the loss."""
    logits, labels = rows(device)
    largest = torch.finfo(torch.float32).max
    for keywords in ({"objective": objectives.tsallis(largest)}, {"temperature": largest},
                     {"logit_scale": 1e-37}, {"softcap": largest}):  # fmt: skip
        x = logits.clone().requires_grad_()
        loss = deft_loss(x, labels, backend=backend, **keywords)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all(), keywords


def test_shift_needs_a_time_dimension():
    with pytest.raises(ValueError, match="^shift: "):
        deft_loss(torch.randn(V), torch.tensor(1), shift=True)


def test_unknown_keyword_raises():
    logits, labels = rows("cpu")
    with pytest.raises(TypeError, match="lable_smoothing"):
        deft_loss(logits, labels, lable_smoothing=0.1)
    with pytest.raises(TypeError, match="lable_smoothing"):
        DEFTLoss(lable_smoothing=0.1)
    with pytest.raises(ValueError, match="^objective: "):
        DEFTLoss(objective="focal")


OBJECTIVES = [
    ("alpha", lambda: objectives.tsallis(-0.5), ValueError),
    ("alpha", lambda: objectives.tsallis(math.nan), ValueError),
    ("alpha", lambda: objectives.tsallis("half"), TypeError),
    ("alpha", lambda: objectives.tsallis(1e39), ValueError),
    ("q", lambda: objectives.tsallis(q=-1e39), ValueError),
    ("alpha", lambda: objectives.rational(1e39), ValueError),
    ("q", lambda: objectives.tsallis(q=1.5), ValueError),
    ("alpha, q", lambda: objectives.tsallis(), ValueError),
    ("alpha, q", lambda: objectives.tsallis(0.5, q=0.5), ValueError),
    ("order", lambda: objectives.deft(3), ValueError),
    ("order", lambda: objectives.deft("2"), ValueError),
    ("eps", lambda: objectives.deft(eps=-1e-6), ValueError),
    ("detach", lambda: objectives.deft(detach=1), TypeError),
    ("mean_prob", lambda: objectives.cayley(mean_prob=1.5), ValueError),
    ("mean_prob", lambda: objectives.cayley(mean_prob=torch.tensor(0.5)), TypeError),
    ("alpha", lambda: objectives.rational("entropy"), ValueError),
    ("alpha", lambda: objectives.rational(-1.0), ValueError),
    ("power", lambda: objectives.eaft(0.0), ValueError),
    ("top_k", lambda: objectives.eaft(top_k=1), ValueError),
    ("keep", lambda: objectives.nll().within("p>0.1"), ValueError),
    ("keep", lambda: objectives.nll().within("p>=1.5"), ValueError),
    ("keep", lambda: objectives.nll().within((0.5, 0.1)), ValueError),
    ("keep", lambda: objectives.nll().within((0.5,)), ValueError),
    ("keep", lambda: objectives.nll().within(0.5), ValueError),
]


@pytest.mark.parametrize(("name", "build", "error"), OBJECTIVES)
def test_objectives(name, build, error):
    with pytest.raises(error, match=f"^{name}: "):
        build()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("num_items", [8, torch.tensor(8.0)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_num_items_belongs_to_the_mean(reduction, num_items, backend):
    logits, labels = rows("cpu")
    with pytest.raises(ValueError, match="^num_items: "):
        deft_loss(logits, labels, reduction=reduction, num_items=num_items, backend=backend)


UNSUPPORTED = [
    ("grad_in_forward", {"reduction": "none"}),
    ("grad_in_forward", {"objective": "cayley"}),
    ("grad_in_forward", {"objective": objectives.deft().within("p>=0.1")}),
    ("grad_in_forward", {"token_weight": vector(N, requires_grad=True)}),
    ("grad_in_forward", {"num_items": torch.tensor(4.0, requires_grad=True)}),
    ("grad_in_forward", {"objective": focal}),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("name", "keywords"), UNSUPPORTED)
def test_gradient_in_the_forward_that_cannot_be(name, keywords, inplace, backend, device):
    logits, labels = rows(device)
    keywords = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    before = logits.clone()
    name = "inplace" if inplace and callable(keywords.get("objective")) else name
    with pytest.raises(ValueError, match=f"^{name}: "):
        deft_loss(
            logits.requires_grad_(),
            labels,
            grad_in_forward=True,
            inplace=inplace,
            backend=backend,
            **keywords,
        )
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize(("keyword", "value"), [("inplace", True), ("label_smoothing", 0.1)])
def test_function_objective_refuses(keyword, value, backend, device):
    logits, labels = rows(device)
    with pytest.raises(ValueError, match=f"^{keyword}: "):
        deft_loss(logits, labels, objective=focal, backend=backend, **{keyword: value})


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[:1].expand(N, V),
        lambda z: z.t().contiguous().t(),
        lambda z: z.flatten().as_strided((N, V), (1, 1)),
    ],
    ids=["expanded", "vocabulary not contiguous", "overlapping"],
)
def test_inplace_needs_storage_of_its_own(view, backend, device):
    logits, labels = rows(device)
    with pytest.raises(ValueError, match="^inplace: "):
        deft_loss(view(logits).requires_grad_(), labels, inplace=True, backend=backend)


def test_inplace_refuses_rows_that_would_be_copied(backend, device):
    """More than two strides from row to row: the gradient would overwrite a copy."""
    logits = torch.randn(2, 3, 2, 2, V, device=device).permute(3, 1, 0, 2, 4).contiguous()
    logits = logits.permute(2, 1, 3, 0, 4)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"^inplace: .*contiguous\(\)"):
        deft_loss(logits, labels, inplace=True, backend=backend)
    # Rows of dimensions of size 1 lie nowhere, whatever their stride.
    part = torch.randn(3, 4, 2, V, device=device)[:, :3, :1].requires_grad_() * 1
    address = part.data_ptr()
    loss = deft_loss(part, labels.new_zeros(3, 3, 1), inplace=True, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, part)
    assert gradient.data_ptr() == address


def test_triton_refuses_float64(device):
    logits, labels = rows(device, torch.float64)
    with pytest.raises(RuntimeError, match="^backend: .*float64"):
        deft_loss(logits, labels, backend="triton")
    assert deft_loss(logits, labels, backend="auto").dtype == torch.float64


def test_triton_refuses_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    logits, labels = rows("cpu")
    with pytest.raises(RuntimeError, match="^backend: .*cpu"):
        deft_loss(logits, labels, backend="triton")


GATED = [
    ("log_collision", lambda x: {}),
    ("entropy", lambda x: {"objective": "eaft"}),
    ("max_prob", lambda x: {"objective": objectives.deft(math.inf)}),
    ("log_collision", lambda x: {"log_collision": x[:2]}),
    ("valid", lambda x: {"log_collision": x, "valid": x[:2] > 0}),
]


@pytest.mark.parametrize(("name", "keywords"), GATED)
def test_gated_loss(name, keywords):
    logp = -torch.rand(N)
    with pytest.raises(ValueError, match=f"^{name}: "):
        gated_loss(logp, **keywords(logp))
    with pytest.raises(TypeError, match="^logp: "):
        gated_loss(torch.ones(N, dtype=torch.long), logp)


# Labels out of range ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, V, V + 1, 2**40, -(2**40)])
@pytest.mark.parametrize("mode", ["forward", "in forward", "none", "statistics", "function"])
def test_label_out_of_range_is_an_index_error(wrong, mode, backend, device, monkeypatch):
    if device == "cuda":
        monkeypatch.setenv("DEFT_KERNELS_VALIDATE", "1")
    logits, labels = rows(device)
    labels[2] = wrong
    keywords = {
        "forward": {},
        "in forward": {"grad_in_forward": True},
        "none": {"reduction": "none"},
        "function": {"objective": focal},
    }
    with pytest.raises(IndexError, match=f"^labels: {wrong} at flat position 2 .*ignore_index"):
        if mode == "statistics":
            row_statistics(logits, labels, backend=backend)
        else:
            deft_loss(logits.requires_grad_(), labels, backend=backend, **keywords[mode])
    with pytest.raises(IndexError, match=f"^labels: {wrong} "):
        deft_loss(logits, labels, backend="reference")


@pytest.mark.parametrize("ignore_index", [-1, V, 2**40, 3])
def test_ignore_index_may_lie_anywhere(ignore_index, backend, device):
    logits, labels = rows(device)
    labels[1] = ignore_index
    loss = deft_loss(logits, labels, ignore_index=ignore_index, objective="nll", backend=backend)
    expected = torch.nn.functional.cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wrong", [-1, V, 2**40, -(2**40)])
def test_label_out_of_range_where_no_host_looks(wrong, weighted, backend, device, monkeypatch):
    """The GPU's promise, asked of the implementations below the host's check: NaN, in that row alone."""
    monkeypatch.setattr(checks, "check_label_range", lambda *_: None)
    logits, labels = rows(device)
    labels[2] = wrong
    weight = torch.rand(V, device=device) + 0.5 if weighted else None
    x = logits.clone().requires_grad_()
    losses = deft_loss(x, labels, reduction="none", weight=weight, backend=backend)
    losses.sum().backward()
    good = [0, 1, 3]
    y = logits[good].clone().requires_grad_()
    expected = deft_loss(y, labels[good], reduction="none", weight=weight, backend=backend)
    expected.sum().backward()
    assert losses[2].isnan()
    # Not to the bit: another row lies otherwise to a 16-byte boundary, and is summed in another order.
    torch.testing.assert_close(losses[good], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad[good], y.grad, rtol=1e-6, atol=1e-8)
    fused = logits.clone().requires_grad_()
    keywords = {"reduction": "sum", "weight": weight, "grad_in_forward": True, "backend": backend}
    deft_loss(fused, labels, **keywords).backward()
    torch.testing.assert_close(fused.grad[good], y.grad)


# Nothing to count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"shift": True},
                                      {"inplace": True}, {"grad_in_forward": True},
                                      {"grad_in_forward": True, "inplace": True},
                                      {"objective": "cayley"}, {"objective": focal}])  # fmt: skip
def test_no_rows(shape, keywords, backend, device):
    logits = torch.randn(*shape, V, device=device, requires_grad=True)
    labels = torch.zeros(shape, dtype=torch.long, device=device)
    loss, stats = deft_loss(logits, labels, backend=backend, return_stats=True, **keywords)
    assert loss.requires_grad
    assert loss.shape == (shape if keywords.get("reduction") == "none" else ())
    assert loss.sum() == 0
    assert stats.logp.shape == shape
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


@pytest.mark.sampled
@pytest.mark.parametrize("name", [*NAMES, "band", "function"])
@pytest.mark.parametrize("filling", [1.0, math.nan, math.inf])
def test_all_ignored(name, filling, backend, device):
    objective = {"band": objectives.deft().within("p>=0.1"), "function": focal}.get(name, name)
    logits = torch.full((N, V), filling, device=device, requires_grad=True)
    labels = torch.full((N,), -100, device=device)
    loss, stats = deft_loss(logits, labels, objective=objective, backend=backend, return_stats=True)
    assert loss.requires_grad and loss == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    for name, field in stats._asdict().items():
        assert field is None or (field == (-1 if name == "predicted" else 0)).all(), name


def test_band_that_drops_every_row(backend, device):
    logits, labels = rows(device)
    logits.requires_grad_()
    objective = objectives.nll().within("p>=1.0")
    loss = deft_loss(logits, labels, objective=objective, backend=backend)
    assert loss == 0 and loss.requires_grad
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_pass_no_token_weight(reduction, backend, device):
    """Padding may hold NaN in the token weights as in the logits."""
    logits, labels = rows(device)
    labels[1] = -100
    token_weight = torch.tensor([1.0, math.nan, 0.5, 2.0], device=device)
    x = logits.clone().requires_grad_()
    loss = deft_loss(x, labels, token_weight=token_weight, reduction=reduction, backend=backend)
    loss.sum().backward()
    y = logits.clone().requires_grad_()
    clean = token_weight.nan_to_num(0.0)
    expected = deft_loss(y, labels, token_weight=clean, reduction=reduction, backend=backend)
    expected.sum().backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, y.grad)


# NaN and infinities ----------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*NAMES, "smoothed", "function", "in forward"])
def test_poison_stays_in_its_row(name, poison, ignored, backend, device):
    """Loss and gradient of the other rows do not notice; an ignored row is zero whatever it holds."""
    keywords = {"reduction": "none", "objective": name}
    if name == "smoothed":
        keywords = {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-3}
    elif name == "function":
        keywords["objective"] = focal
    elif name == "in forward":
        keywords = {"reduction": "sum", "grad_in_forward": True}
    logits, labels = rows(device)
    poisoned = logits.clone()
    poisoned[2, 1] = poison
    good = [0, 1, 3]
    if ignored:
        labels[2] = -100
    x = poisoned.requires_grad_()
    loss = deft_loss(x, labels, backend=backend, **keywords)
    loss.sum().backward()
    y = logits[good].clone().requires_grad_()
    expected = deft_loss(y, labels[good], backend=backend, **keywords)
    expected.sum().backward()
    torch.testing.assert_close(x.grad[good], y.grad)
    assert not x.grad[good].isnan().any()
    if name == "in forward":
        assert ignored != bool(loss.isnan())
    else:
        torch.testing.assert_close(loss[good], expected)
    if ignored:
        assert torch.equal(x.grad[2], torch.zeros(V, device=device))
        assert name == "in forward" or loss[2] == 0
    else:
        assert x.grad[2].isnan().any()
        assert name == "in forward" or loss[2].isnan()


def test_poisoned_row_has_poisoned_statistics(backend, device):
    logits, labels = rows(device)
    logits[2, 1] = math.nan
    stats = row_statistics(logits, labels, backend=backend)
    for name in ("logp", "lse", "collision", "entropy", "max_prob"):
        field = getattr(stats, name)
        assert field.isnan().tolist() == [False, False, True, False], name
    assert not stats.correct[2]


@pytest.mark.parametrize("mode", ["plain", "inplace", "in forward"])
def test_impossible_target(mode, backend, device):
    """A target of probability 0: deft has loss 1/alpha and no gradient, nll is infinite."""
    logits, labels = rows(device)
    logits[torch.arange(N), labels] = -math.inf
    keywords = {"plain": {"reduction": "none"}, "inplace": {"reduction": "none", "inplace": True},
                "in forward": {"reduction": "sum", "grad_in_forward": True}}[mode]  # fmt: skip
    x = logits.clone().requires_grad_()
    loss = deft_loss(x, labels, backend=backend, **keywords)
    loss.sum().backward()
    alpha = torch.softmax(logits, -1).square().sum(-1)
    expected = alpha.reciprocal() if mode != "in forward" else alpha.reciprocal().sum()
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.equal(x.grad, torch.zeros_like(x))
    x = logits.clone().requires_grad_()
    loss = deft_loss(x, labels, objective="nll", backend=backend, **keywords)
    loss.sum().backward()
    assert (loss == math.inf).all()
    onehot = torch.nn.functional.one_hot(labels, V)
    torch.testing.assert_close(x.grad, torch.softmax(logits, -1) - onehot)


@pytest.mark.parametrize("objective", ["cayley", "rational", "dft", "neg_prob", objectives.tsallis(0.5)])
def test_impossible_target_of_the_others(objective, backend, device):
    logits, labels = rows(device)
    logits[0, labels[0]] = -math.inf
    x = logits.requires_grad_()
    loss, stats = deft_loss(
        x, labels, objective=objective, reduction="none", return_stats=True, backend=backend
    )
    loss.sum().backward()
    limit = 0.0 if objective == "dft" else 1.0 / stats.alpha[0]
    torch.testing.assert_close(loss[0].detach(), torch.as_tensor(limit, device=device))
    assert stats.gate[0] == 0
    assert torch.equal(x.grad[0], torch.zeros(V, device=device))


def test_impossible_target_of_a_row_without_entropy(backend, device):
    """eaft weighs such a row with 0: its loss is 0, not 0 * inf."""
    logits = torch.full((1, V), -math.inf, device=device)
    logits[0, 0] = 0.0
    logits.requires_grad_()
    loss = deft_loss(logits, torch.tensor([1], device=device), objective="eaft", backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.sampled
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_vocabulary(dtype, return_stats, backend, device):
    """-inf logits take no part, whether or not the entropy is wanted. V = 40 leaves whole lanes of a warp
    masked, V = 700 does not."""
    for vocabulary in (40, 700):
        logits = torch.randn(2, vocabulary, device=device).to(dtype)
        allowed = logits[:, ::2].clone()
        logits[:, 1::2] = -math.inf
        labels = torch.tensor([4, 20], device=device)
        x, y = logits.requires_grad_(), allowed.requires_grad_()
        options = {"backend": backend, "return_stats": return_stats, "reduction": "none"}
        masked, plain = deft_loss(x, labels, **options), deft_loss(y, labels // 2, **options)
        if return_stats:
            # Of the logits without the masked ones: every second class.
            expected = plain[1]._replace(predicted=2 * plain[1].predicted)
            for ours, theirs in zip(masked[1], expected, strict=True):
                torch.testing.assert_close(ours, theirs)
            masked, plain = masked[0], plain[0]
        torch.testing.assert_close(masked, plain)
        (masked.sum() + plain.sum()).backward()
        torch.testing.assert_close(x.grad[:, ::2], y.grad)
        assert not x.grad[:, 1::2].any()


@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0, 8.0])
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e20, "finfo", -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_every_size(dtype, mask, temperature, backend, device):
    """Masked with a large finite number instead, as attention code does; a warp's lanes see nothing else."""
    logits = torch.randn(2, 700, device=device).to(dtype)
    logits[:, 30:] = torch.finfo(dtype).min if mask == "finfo" else mask
    labels = torch.tensor([4, 20], device=device)
    for name in ("deft", "eaft"):
        options = {"objective": name, "temperature": temperature, "reduction": "none"}
        x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss, stats = deft_loss(x, labels, backend=backend, return_stats=True, **options)
        expected, oracle = deft_loss(y, labels, backend="reference", return_stats=True, **options)
        (loss.sum() + expected.sum()).backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.entropy.double(), oracle.entropy, rtol=1e-4, atol=1e-5)
        bound = 1e-4 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=bound, atol=1e-6 / temperature)


@pytest.mark.parametrize("size", [2.79e9, 1e30, -1e10, -1e30])
def test_logits_beyond_the_limit_are_not_a_number(size, backend, device):
    """Where the offset's rounding no longer cancels the result is NaN, never a number that is wrong."""
    logits = torch.randn(2, 300, device=device)
    logits[0] += size
    loss, stats = deft_loss(
        logits, torch.tensor([4, 20], device=device), reduction="none", return_stats=True, backend=backend
    )
    assert loss[0].isnan()
    assert stats.logp[0].isnan()
    assert loss[1].isfinite()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["deft", "cayley"])
def test_default_dtype_does_not_matter(name, default, backend, device):
    """Model loaders change PyTorch's default dtype; buffers between launches are fp32 all the same."""
    logits, labels = rows(device)
    expected = deft_loss(logits, labels, objective=name, backend=backend)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        loss = deft_loss(logits, labels, objective=name, backend=backend)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(loss, expected)


def test_statistics_do_not_change_the_loss(backend, device):
    """Label smoothing over masked classes is infinite, whether or not the entropy is reduced beside it."""
    logits, labels = rows(device)
    logits[:, 0] = -math.inf
    labels = labels.clamp(min=1)
    options = {"objective": "nll", "label_smoothing": 0.1, "backend": backend}
    assert deft_loss(logits, labels, **options) == math.inf
    assert deft_loss(logits, labels, return_stats=True, **options)[0] == math.inf


def test_forward_mode_is_refused(backend, device):
    """A tangent would be dropped, and the derivative be 0."""
    logits, labels = rows(device)
    for call in (deft_loss, lambda z, y, **k: row_statistics(z, y, **k).logp):
        with pytest.raises(RuntimeError, match="^logits: forward-mode"):
            torch.func.jvp(
                lambda z, call=call: call(z, labels, backend=backend), (logits,), (torch.ones_like(logits),)
            )
