"""`RowStatistics.predicted`: the first class with the largest logit, as torch.argmax has it; -1 for none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import DTYPES, make
from torch import Tensor

from deft_kernels import RowStatistics, deft_loss, fused_linear_deft_loss, objectives, row_statistics
from deft_kernels.backends.states import state_size
from deft_kernels.backends.triton import tuning
from deft_kernels.backends.triton.tuning import Launch
from deft_kernels.core import statistics
from deft_kernels.core.spec import Spec
from deft_kernels.core.statistics import Field, predicted_classes
from deft_kernels.operators.logits import implementation

BACKENDS = ("triton", "torch")
VOCABULARY = 3333  # turns, tail and edges of one warp, as in test_launch.py


def predicted(z: Tensor, y: Tensor, backend: str, **keywords: Any) -> Tensor:
    stats = row_statistics(z, y, backend=backend, **keywords)
    assert stats.predicted is not None
    assert stats.predicted.dtype == torch.int64
    assert stats.predicted.shape == y.shape
    return stats.predicted


def tied(at: list[int], vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """One row whose largest logit stands at the columns `at`, and a label that is none of them."""
    z = make("plain", 1, vocabulary, dtype, seed=sum(at))[0].clamp(max=3.0)
    z[0, at] = 5.0
    label = next(column for column in range(vocabulary) if column not in at)
    return z, torch.tensor([label])


@pytest.mark.sampled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 1025, VOCABULARY])
def test_is_the_arg_max(vocabulary: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Odd vocabularies put rows off a 16-byte boundary; half-precision rows have ties by themselves."""
    for kind in ("plain", "peaked", "uniform", "masked"):
        z, y = make(kind, 5, vocabulary, dtype)
        expected = z.argmax(-1)
        _, stats = deft_loss(z.to(device), y.to(device), backend=backend, return_stats=True)
        assert torch.equal(stats.predicted.cpu(), expected), kind
        assert torch.equal(predicted(z.to(device), y.to(device), backend).cpu(), expected), kind
        assert torch.equal(predicted(z, y, "reference"), expected), kind


@pytest.mark.sampled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize(
    "at",
    [
        [2, 3331],  # both edges
        [1500, 1501],  # one lane, the same load
        [1300, 100],  # lanes in order, tiles not
        [1299, 400, 3332],  # three lanes, the first column in the last of them
        [3300, 40],  # tail and first turn
        [9, 8],
        [2047, 1792, 255],
        list(range(700, 2800, 13)),  # nearly every lane
    ],
)
def test_ties_go_to_the_first(at: list[int], in_forward: bool, backend: str, device: str) -> None:
    """Of the lanes that have met the largest logit, the one with the first column need not be the first."""
    for lead in (0, 3):
        z, y = tied(at, VOCABULARY)
        row = torch.full((2, VOCABULARY + lead), 7.0, dtype=z.dtype, device=device)[:, :VOCABULARY]
        row.copy_(z.expand(2, -1))
        row = row.detach().requires_grad_()
        loss, stats = deft_loss(
            row, y.expand(2).to(device), backend=backend, return_stats=True, grad_in_forward=in_forward
        )
        loss.backward()
        assert stats.predicted.tolist() == [min(at)] * 2


@pytest.mark.parametrize("vocabulary", [21, 37, 270, 300])
def test_ties_of_every_pair(vocabulary: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges, one tile or two: every column against some others, in one call of many rows."""
    monkeypatch.setattr(tuning, "statistics", lambda *given: Launch(1, 8, given[-1]))
    generator = torch.Generator().manual_seed(vocabulary)
    pairs = torch.randint(0, vocabulary, (20, 2), generator=generator)
    z = torch.randn(20, vocabulary, generator=generator).clamp(max=2.0).bfloat16()
    z.scatter_(1, pairs, 4.0)
    found = predicted(z.to(device), torch.zeros(20, dtype=torch.long, device=device), "triton")
    assert torch.equal(found.cpu(), pairs.amin(1))


@pytest.mark.sampled
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("at", [[3000], [3000, 5], [1700, 1601, 1600], list(range(100, 3333, 50))])
def test_split_rows(splits: int, at: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a row by programs of their own; ties inside of a slice and between them."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    z, y = tied(at, VOCABULARY)
    assert predicted(z.to(device), y.to(device), "triton").item() == min(at)
    _, stats = deft_loss(z.to(device), y.to(device), objective="cayley", backend="triton", return_stats=True)
    assert stats.predicted.item() == min(at)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"temperature": 3.0}, {"label_smoothing": 0.1}])
def test_transformed_logits(options: dict[str, float], backend: str, device: str) -> None:
    z, y = make("plain", 6, 700, torch.float32)
    _, stats = deft_loss(z.to(device), y.to(device), backend=backend, return_stats=True, **options)
    assert torch.equal(stats.predicted.cpu(), z.argmax(-1))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_without_a_prediction(backend: str, device: str) -> None:
    """Ignored rows, and those of a NaN, of +inf or of masks alone: -1; torch.argmax gives a column."""
    z, y = make("plain", 6, 300, torch.float32)
    z[1, 7], z[2, 8], z[3] = float("nan"), float("inf"), float("-inf")
    y[4] = -100
    device = "cpu" if backend == "reference" else device
    expected = z.argmax(-1)
    expected[[1, 2, 3, 4]] = -1
    z, y = z.to(device), y.to(device)
    assert torch.equal(predicted(z, y, backend).cpu(), expected)
    _, stats = deft_loss(z, y, backend=backend, return_stats=True)
    assert torch.equal(stats.predicted.cpu(), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_that_a_band_drops_keep_it(backend: str, device: str) -> None:
    z, y = make("plain", 6, 300, torch.float32)
    device = "cpu" if backend == "reference" else device
    _, stats = deft_loss(
        z.to(device), y.to(device), objective=objectives.deft().within("p>=0.9"), backend=backend,
        return_stats=True,
    )  # fmt: skip
    assert not stats.gate.any()
    assert torch.equal(stats.predicted.cpu(), z.argmax(-1))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("objective", ["deft", "eaft", lambda r: -r.logp], ids=["deft", "eaft", "function"])
def test_linear(objective: Any, backend: str, device: str) -> None:
    """Through the linear call, in several chunks, with rows that are left out."""
    device = "cpu" if backend == "reference" else device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 16, generator=generator).to(device).requires_grad_()
    weight = torch.randn(333, 16, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, 333, (2, 5), generator=generator).to(device)
    labels[0, 3] = labels[1, 0] = -100
    keywords = {} if backend == "reference" else {"chunk_bytes": 4 * 333 * 3}
    loss, stats = fused_linear_deft_loss(
        hidden, weight, labels, objective=objective, backend=backend, return_stats=True, **keywords
    )
    loss.backward()
    expected = torch.nn.functional.linear(hidden, weight).argmax(-1)
    assert torch.equal(stats.predicted, expected.masked_fill(labels == -100, -1))


def test_an_objective_of_ones_own_sees_it() -> None:
    """And nothing of the record moves over because alpha and gate are None."""
    seen = []

    def objective(stats: RowStatistics) -> Tensor:
        seen.append(stats.predicted)
        return -stats.logp

    z, y = make("plain", 4, 50, torch.float32)
    y[1] = -100
    _, stats = deft_loss(z.requires_grad_(), y, objective=objective, return_stats=True)
    assert stats.alpha is None
    assert stats.gate is None
    assert torch.equal(stats.predicted, seen[0])
    assert stats.predicted[1] == -1
    assert not stats.predicted.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_vocabulary(backend: str, device: str) -> None:
    """States of three parts as of three ranks, where the largest logit stands in two of them."""
    z, y = make("plain", 4, 500, torch.float32)
    z[0, [450, 220]], z[1, [300, 499]], z[2, [0, 250]] = 9.0, 9.0, 9.0
    spec = Spec(objectives.deft(), statistics=True, backend=backend)
    functions = implementation(spec)
    states, z, y = [], z.to(device), y.to(device)
    for start, stop in ((0, 210), (210, 340), (340, 500)):
        own = y - start
        own = own.where((own >= 0) & (own < stop - start), stop - start)
        part = functions.row_states(z[:, start:stop], own, None, -1, spec)
        part[:, -1] += start
        states.append(part)
    _, rows = functions.states_loss(torch.stack(states), y, None, 500, -100, spec)
    assert torch.equal(predicted_classes(rows, y.shape, 500), z.argmax(-1))


def test_costs_nothing_where_nobody_asks() -> None:
    """No number more of a state, which ranks send to each other."""
    spec = Spec(objectives.deft())
    assert state_size(replace(spec, statistics=True)) == state_size(spec) + 1 == 6


def test_more_classes_than_fp32_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^24 + 1 is no fp32 number: None, rather than a neighbour."""
    rows = torch.zeros(len(Field), 1)
    rows[Field.PREDICTED] = 2.0**24
    assert predicted_classes(rows, torch.Size([1]), 2**24).item() == 2**24 - 1
    assert predicted_classes(rows, torch.Size([1]), 2**24 + 1) is None
    assert predicted_classes(rows.double(), torch.Size([1]), 2**24 + 1) is not None
    monkeypatch.setattr(statistics, "COUNTABLE", 20)
    z, y = make("plain", 2, 21, torch.float32)
    assert row_statistics(z, y).predicted is None
    assert deft_loss(z, y, return_stats=True)[1].predicted is None
    assert row_statistics(z.double(), y).predicted is not None


def test_under_torch_compile() -> None:
    z, y = make("plain", 4, 700, torch.float32)
    y[2] = -100

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = deft_loss(z, y, return_stats=True)
        return loss, stats.predicted + row_statistics(z, y).predicted

    found = compiled(z.requires_grad_(), y)[1]
    assert torch.equal(found, 2 * z.argmax(-1).masked_fill(y == -100, -1))
