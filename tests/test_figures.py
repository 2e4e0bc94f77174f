"""Numbers and names in the prose of README, docs and docstrings, held to what the code does."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from documents import ROOT, prose, text
from torch import Tensor

from deft_kernels import deft_loss, objectives, row_statistics
from deft_kernels.backends.pytorch.objectives import LN2
from deft_kernels.backends.states import state_size
from deft_kernels.core.spec import Spec
from deft_kernels.core.statistics import Field
from deft_kernels.objectives import Objective

QWEN = 151_936


def test_a_page_lists_the_keywords_of_deft_loss() -> None:
    sentence = re.search(r"Keywords: (.*?); each is explained", prose("docs/start.md"))
    assert sentence
    named = re.findall(r"`(\w+)`", sentence[1])
    own = [p.name for p in inspect.signature(deft_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert sorted([*named, "objective"]) == sorted(own)
    documented = inspect.getdoc(deft_loss) or ""
    for name in named:
        assert re.search(rf"\b{name}\b", documented), name


# The table of docs/choosing.md: its formulas as code, p and the statistics of a row given.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "-log p": lambda p, alpha, w: -p.log(),
    "1 - p": lambda p, alpha, w: 1 - p,
    "(1 - p^alpha) / alpha": lambda p, alpha, w: (1 - p**alpha) / alpha,
    "-log p / (1 - alpha log p)": lambda p, alpha, w: -p.log() / (1 - alpha * p.log()),
    "sg(p) (-log p)": lambda p, alpha, w: p * -p.log(),
    "sg(w) (-log p)": lambda p, alpha, w: w * -p.log(),
    "1": lambda p, alpha, w: torch.ones_like(p),
    "p": lambda p, alpha, w: p,
    "p^alpha": lambda p, alpha, w: p**alpha,
    "(1 - alpha log p)^-2": lambda p, alpha, w: (1 - alpha * p.log()) ** -2,
    "w = (H / ln 20)^power": lambda p, alpha, w: w,
}
ALPHAS: dict[str, Callable[..., Tensor]] = {
    "alpha = sum p^2": lambda s: s.collision,
    "alpha = exp(-H)": lambda s: (-s.entropy).exp(),
    "alpha = max p": lambda s: s.max_prob,
    "alpha = f + (1 - f) p / (2 - p)": lambda s: focus_of_cayley(s.logp.exp()),
}


def focus_of_cayley(p: Tensor) -> Tensor:
    """f is half the batch's mean p."""
    f = p.mean() / 2
    return f + (1 - f) * p / (2 - p)


def rows_of_the_table() -> list[tuple[str, str, str]]:
    """(objective, loss, gate) of that table; the same loss and a gate by its alpha written out."""
    rows, last = [], ""
    for line in re.findall(
        r"^\| (`\"?.*?) \| (.*?) \| (.*?) \|$", text("docs/choosing.md"), flags=re.MULTILINE
    ):
        name, loss, gate = (cell.replace("`", "") for cell in line)
        if name == "objective=":
            continue
        last = loss if loss != "the same" else last
        rows.append((name.replace(" (default)", ""), last, gate))
    return rows


@pytest.mark.parametrize("name, loss, gate", rows_of_the_table(), ids=lambda cell: cell[:24])
def test_the_table(name: str, loss: str, gate: str) -> None:
    z = torch.randn(6, 11, dtype=torch.float64) * 2
    y = torch.randint(0, 11, (6,))
    given = row_statistics(z, y)
    p, w = given.logp.exp(), given.entropy / math.log(20)
    for number, words in enumerate(name.split(", ") if "order" in name else re.split(" or |, ", name)[:1]):
        scope = {"objectives": objectives, "math": math, "alpha": 0.3, "deft": objectives.deft}
        objective: Objective | str = eval(words, scope)
        got, stats = deft_loss(z, y, objective=objective, reduction="none", return_stats=True)
        cell = gate.split(", ")[number] if "order" in name else gate.split(", ")[0].split(", over")[0]
        of_alpha = ALPHAS.get(cell)
        alpha = stats.alpha if of_alpha is None else of_alpha(given)
        torch.testing.assert_close(got, FORMULAS[loss](p, alpha, w))
        shape = FORMULAS.get(cell, FORMULAS["p^alpha"])
        torch.testing.assert_close(stats.gate, shape(p, alpha, w))
        torch.testing.assert_close(stats.alpha, alpha)


def test_nineteen_numbers_a_row() -> None:
    for words in (deft_loss.__doc__, row_statistics.__doc__, prose("docs/linear.md")):
        assert words and re.search(r"19 numbers a\s+row", words)
    assert len(Field) == 19


def test_numbers_that_are_sent() -> None:
    assert "5 fp32 numbers a row" in prose("docs/parallel.md")
    assert state_size(Spec(objectives.deft())) == 5
    assert state_size(Spec(objectives.deft(), label_smoothing=0.1)) == 6
    assert state_size(Spec(objectives.deft(math.inf, detach=False))) == 6
    assert state_size(Spec(objectives.deft(math.inf, detach=False), label_smoothing=0.1)) == 7
    assert state_size(Spec(objectives.deft(), statistics=True)) == 6
    assert state_size(Spec(objectives.of_statistics(), statistics=True)) == 7


def test_what_eps_damps() -> None:
    """13 % of loss and gradient of a uniform row at V = 151,936."""
    assert "13 % for a uniform row at V = 151,936" in re.sub(r"\s+", " ", objectives.deft.__doc__ or "")
    z, y = torch.zeros(1, QWEN, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    ratio = deft_loss(z, y, objective=objectives.deft(eps=1e-6)) / deft_loss(z, y)
    assert round(100 * (1 - ratio.item())) == 13


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_the_bounds_of_cayley(backend: str, device: str) -> None:
    """The focus index stays within [0.001, 1] as its docstring says: each backend has the two numbers."""
    said = re.search(
        r"clamped to \[([\d.]+), ([\d.]+)\]", re.sub(r"\s+", " ", objectives.cayley.__doc__ or "")
    )
    assert said
    lowest, highest = float(said[1]), float(said[2])
    z = torch.tensor([[0.0, 30.0], [30.0, 0.0]], device=device if backend == "triton" else "cpu")
    y = torch.zeros(2, dtype=torch.int64, device=z.device)
    # Without a floor and without eps it is p / (2 - p): 5e-14 for the first row, 1 for the second.
    objective = objectives.cayley(mean_prob=0.0)
    _, stats = deft_loss(z, y, objective=objective, reduction="none", return_stats=True, backend=backend)
    torch.testing.assert_close(stats.alpha.cpu(), torch.tensor([lowest, highest]), rtol=0.0, atol=0.0)


def test_what_expm1_saves() -> None:
    """1 - p^alpha loses 7e-4 relative at alpha = 1/V, in fp32."""
    assert "loses 7e-4 relative at alpha = 1/V" in prose("docs/mathematics.md")
    alpha = torch.tensor(1 / QWEN, dtype=torch.float64)
    logp = -torch.linspace(1.0, math.log(QWEN), 200, dtype=torch.float64)
    exact = -torch.expm1(alpha * logp) / alpha
    naive = (1 - torch.exp(alpha.float() * logp.float())) / alpha.float()
    stable = -torch.expm1(alpha.float() * logp.float()) / alpha.float()
    assert 3e-4 < ((naive - exact) / exact).abs().max() < 7e-3
    assert ((stable - exact) / exact).abs().max() < 1e-6


def confident(n: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows whose label has p from 0.9 to 1 - 1e-7."""
    z, y = torch.randn(n, vocabulary), torch.randint(0, vocabulary, (n,))
    rest = torch.logspace(-1, -7, n, dtype=torch.float64)
    rows = torch.arange(n)
    others = z.double().scatter(1, y.unsqueeze(1), -torch.inf).logsumexp(1)
    z[rows, y] = (others + torch.log((1 - rest) / rest)).float()
    return z, y


@pytest.mark.parametrize("n, vocabulary", [(60, 20_000), (20, 128_256)])
def test_digits_of_confident_rows(n: int, vocabulary: int) -> None:
    """The table of mathematics.md, by its order of magnitude: random rows are not those it was made with."""
    row = re.search(rf"\| {n} x {vocabulary:,} \| (\S+) \| (\S+) \|", text("docs/mathematics.md"))
    assert row
    theirs, ours = float(row[1]), float(row[2])
    z, y = confident(n, vocabulary)
    exact = F.cross_entropy(z.double(), y, reduction="none")
    error = (deft_loss(z, y, objective="nll", reduction="none") - exact).abs().max().item()
    assert error <= 2 * ours
    if torch.__version__.startswith("2.13"):
        assert (F.cross_entropy(z, y, reduction="none") - exact).abs().max().item() >= theirs / 20


def eaft_rows() -> list[tuple[str, float, float]]:
    """(row, weight of the top 20, weight of the whole vocabulary) as moving.md has them."""
    page = text("docs/integrations/moving.md").split("| row, V = 151,936 |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    return [(name, float(top), float(whole)) for name, top, whole in rows]


@pytest.mark.parametrize("name, top, whole", eaft_rows(), ids=lambda cell: str(cell)[:30])
def test_eaft_and_its_top_20(name: str, top: float, whole: float) -> None:
    """moving.md: how far the entropy of the whole vocabulary is from that of the 20 largest logits."""
    z = torch.zeros(QWEN, dtype=torch.float64) if "equal" in name else torch.randn(QWEN, dtype=torch.float64)
    alone = re.search(r"p = ([\d.]+) for one", name)
    if alone or "ten" in name:
        count, p = (1, float(alone[1])) if alone else (10, 0.99)
        z[:count] = z[count:].logsumexp(0) + math.log(p / (1 - p) / count)
    y = torch.zeros(1, dtype=torch.int64)
    weight = deft_loss(z.unsqueeze(0), y, objective="eaft", return_stats=True)[1].gate.item()
    of_20 = torch.special.entr(z.topk(20).values.softmax(-1)).sum().item() / math.log(20)
    assert weight == pytest.approx(whole, rel=0.02)
    assert of_20 == pytest.approx(top, rel=0.1)
    assert f"{math.log(QWEN) / math.log(20):.2f} at V = 151,936" in prose("docs/integrations/moving.md")


def test_what_smoothing_errs() -> None:
    """0.1 of it, by the size of the logits."""
    page = prose("docs/mathematics.md")
    assert "are off by 5e-7 where" in page and "near 300 by 5e-6, and near 3,000 by 4e-5" in page
    for shift, off in ((0, 5e-7), (300, 5e-6), (3000, 4e-5)):
        z, y = torch.randn(100, 500) + shift, torch.randint(0, 500, (100,))
        keywords = {"label_smoothing": 0.1, "reduction": "none"}
        exact = F.cross_entropy(z.double(), y, **keywords)
        assert (deft_loss(z, y, objective="nll", **keywords) - exact).abs().max() < 2 * off


# MiB of tensors beyond the gradient, fp32 and bf16, as measured.md and cpu.md say.
USUAL, PEAKS = 8.2, 26.0
EXACT_PEAK = objectives.deft(math.inf, detach=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"softcap": 30.0},
        {"label_smoothing": 0.1},
        {"objective": "eaft", "return_stats": True},
        {"objective": objectives.deft(1, detach=False), "reduction": "none"},
        {"objective": EXACT_PEAK},
    ],
    ids=["deft", "softcap", "smoothing", "entropy", "exact", "exact max p"],
)
def test_memory_beyond_the_gradient(keywords: dict[str, object], dtype: torch.dtype) -> None:
    z = torch.randn(96, 32_000).to(dtype).requires_grad_()
    y = torch.randint(0, 32_000, (96,))

    def step() -> None:
        result = deft_loss(z, y, **keywords)
        loss = result[0] if isinstance(result, tuple) else result
        loss.sum().backward()

    beyond = (peak(step) - z.nbytes) / 2**20
    assert beyond <= (PEAKS if keywords.get("objective") is EXACT_PEAK else USUAL)


def test_memory_is_said_alike() -> None:
    for page in ("docs/measured.md", "docs/cpu.md"):
        assert re.search(r"8 MiB .*?\b26\b", prose(page)), page


def peak(run: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive during `run`, beyond those alive before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        redirect_stderr(StringIO()),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = most = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most


def test_the_exponents_scale() -> None:
    assert "k = log2(e) / temperature" in prose("docs/mathematics.md")
    assert pytest.approx(math.log2(math.e)) == 1 / LN2


def test_scaling_page_is_what_its_script_prints() -> None:
    command = [sys.executable, str(ROOT / "docs" / "scaling.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = text("docs/scaling.md")
    rows = [line for line in printed.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) >= 20
    for row in rows:
        assert row.strip() in page


def test_versions_agree() -> None:
    project = text("pyproject.toml")
    for name, pattern in (("torch", r'"torch>=([\d.]+)"'), ("Triton", r'"triton>=([\d.]+)')):
        lowest = re.search(pattern, project)
        assert lowest and f"{name} {lowest[1]} and newer" in prose("README.md")
